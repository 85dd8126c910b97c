"""A server that goes ends what it has, and tells whoever comes that it goes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tensorray.cluster.closing import Closing
from tests.helpers.null_engine import LocalBackend, serving, write_model

BODY = {"prompt": "Hello", "max_tokens": 200}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


async def until_running(backend: LocalBackend) -> None:
    async def wait() -> None:
        while not backend.engine.scheduler.stats().running:
            await asyncio.sleep(0.002)

    await asyncio.wait_for(wait(), 60)


async def test_what_runs_is_ended_and_what_comes_turned_away(model: Path) -> None:
    closing = Closing()
    async with serving(model, closing=closing, step_ms=5) as (http, backend):
        running = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await until_running(backend)
        close = asyncio.create_task(closing.close())
        while not closing.begun:
            await asyncio.sleep(0)
        for answer in (
            await http.post("/v1/completions", json=BODY),
            await http.post("/v1/messages", json={}),
            await http.post("/v2/models/tiny/infer", json={}),
            await http.get("/health"),
            await http.get("/v2/health/ready"),
        ):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert "shutting down" in answer.text
        assert not running.done()
        assert not close.done()
        for path in ("/metrics", "/status", "/v1/models", "/version"):
            assert (await http.get(path)).status_code == 200
        found = (await running).json()
        assert found["usage"]["completion_tokens"] == 200
        await asyncio.wait_for(close, 60)


@pytest.mark.parametrize("ended", ["failed", "left"])
async def test_requests_that_come_to_nothing_are_not_waited_for(model: Path, ended: str) -> None:
    closing = Closing()
    async with serving(model, closing=closing, step_ms=5) as (http, backend):
        if ended == "failed":
            assert (await http.post("/v1/completions", json={})).status_code == 400
        else:
            running = asyncio.create_task(http.post("/v1/completions", json=BODY))
            await until_running(backend)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        assert (await http.get("/health")).status_code == 200
        await asyncio.wait_for(closing.close(), 60)
        with pytest.raises(httpx.HTTPStatusError):
            (await http.get("/health")).raise_for_status()
