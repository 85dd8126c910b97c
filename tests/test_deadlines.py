"""Requests end when their time is over, wherever they are; who does not read is dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tensorray.actors.protocol import Sampling
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.ingress import create_app
from tensorray.cluster.request import GenerationRequest, QueueFull
from tests.helpers.null_engine import LocalBackend, null_engine, serving, write_model

STREAM = {"prompt": "Hello", "max_tokens": 200, "stream": True}


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[tuple[httpx.AsyncClient, LocalBackend]]:
    """An engine that takes a minute for an answer, one at a time."""
    model = write_model(tmp_path / "tiny")
    async with serving(model, step_ms=300, max_num_seqs=1) as found:
        yield found


async def until_idle(backend: LocalBackend) -> None:
    while backend.engine.scheduler.unfinished:
        await asyncio.sleep(0.01)
    stats = backend.engine.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks


@pytest.mark.parametrize("way", ["header", "field"])
@pytest.mark.parametrize("stream", [False, True])
async def test_time_is_over(
    slow: tuple[httpx.AsyncClient, LocalBackend], way: str, stream: bool
) -> None:
    client, backend = slow
    body: dict[str, Any] = {**STREAM, "stream": stream, "seed": 1}
    headers = {"X-Request-Timeout": "1"} if way == "header" else {}
    if way == "field":
        body["timeout"] = 1.0
    answer = await client.post("/v1/completions", json=body, headers=headers)
    if stream:  # tokens came before
        assert answer.status_code == 200
        *events, last = answer.text.removeprefix("data: ").strip().split("\n\ndata: ")
        assert "choices" in json.loads(events[0])
        error = json.loads(last)["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    await until_idle(backend)


async def test_the_wait_in_the_queue_counts(
    slow: tuple[httpx.AsyncClient, LocalBackend],
) -> None:
    client, backend = slow
    first = asyncio.create_task(client.post("/v1/completions", json={**STREAM, "stream": False}))
    while not backend.engine.scheduler.stats().running:
        await asyncio.sleep(0.01)
    answer = await client.post("/v1/completions", json=STREAM, headers={"X-Request-Timeout": ".5"})
    assert answer.status_code == 504
    assert backend.engine.scheduler.unfinished == 1
    first.cancel()


async def test_a_queue_is_bounded_by_what_it_takes_of_memory() -> None:
    engine = null_engine(max_num_seqs=1, max_waiting=1000)  # nothing runs: it is not started
    engine.scheduler._max_waiting_tokens = 500

    def ask(name: str, tokens: int) -> None:
        engine.generate(GenerationRequest(name, [1] * tokens, Sampling(), 8))

    ask("a", 200)
    ask("b", 200)
    with pytest.raises(QueueFull, match="400 tokens wait already and 200 more"):
        ask("c", 200)
    ask("d", 100)
    await engine.cancel("a")
    ask("e", 200)


@pytest.mark.parametrize("asked", ["0", "-1", "soon", "nan", "inf"])
async def test_what_is_no_time_is_refused(
    slow: tuple[httpx.AsyncClient, LocalBackend], asked: str
) -> None:
    client, _ = slow
    answer = await client.post("/v1/completions", json=STREAM, headers={"X-Request-Timeout": asked})
    assert answer.status_code == 400
    assert "seconds, a number above 0" in answer.json()["error"]["message"]


async def test_the_server_has_the_last_word(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    limits = {"request_timeout_seconds": 0.5}
    async with serving(model, limits=limits, step_ms=300) as (client, backend):
        headers = {"X-Request-Timeout": "100"}
        answer = await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == 504
        assert "within its 0.5 s" in answer.json()["error"]["message"]
        await until_idle(backend)


async def test_a_client_that_does_not_read_is_dropped_and_holds_nobody_up(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    config = EngineConfig(model=str(model), served_model_name=["tiny"], read_timeout_seconds=0.5)
    async with LocalBackend(step_ms=5) as backend:
        app = create_app(Frontend.load(config), backend, config)
        body = json.dumps(STREAM).encode()
        blocked = asyncio.Event()

        async def receive() -> Any:
            nonlocal body
            if body:
                sent, body = body, b""
                return {"type": "http.request", "body": sent, "more_body": False}
            return await asyncio.Event().wait()  # nor does it hang up

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                blocked.set()
                await asyncio.Event().wait()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": None,
            "server": None,
        }
        stuck = asyncio.create_task(app(scope, receive, send))
        await blocked.wait()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/v1/completions", json={**STREAM, "stream": False})
            assert answer.json()["usage"]["completion_tokens"] == 200
        with pytest.raises(ConnectionAbortedError):
            await stuck
        await until_idle(backend)
