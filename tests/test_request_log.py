"""Every line about a request has its id, on both sides of the connection; no line has a prompt."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tensorray.actors.link import ShardError
from tensorray.actors.protocol import Sampling
from tensorray.actors.wire import Endpoint
from tensorray.cluster import request_log
from tensorray.cluster.engine_link import EngineLink, EngineServer
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.request_id import request_id
from tests.helpers.null_engine import null_engine, serving, write_model

LOGGERS = ("tensorray", "ray.serve")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


@pytest.fixture
def lines() -> Iterator[Callable[[str], list[str]]]:
    """Has both of the loggers write to memory; gives what they wrote so far, in a form."""
    sink = io.StringIO()
    before = {name: logging.getLogger(name).__dict__.copy() for name in LOGGERS}
    for name in LOGGERS:
        log = logging.getLogger(name)
        log.handlers = [logging.StreamHandler(sink)]

    def written(form: Any) -> list[str]:
        request_log.set_up(form)
        return sink.getvalue().splitlines()

    yield written
    for name, state in before.items():
        logging.getLogger(name).__dict__.update(state)


async def test_json_lines_carry_the_id_the_client_gave(
    model: Path, lines: Callable[[str], list[str]]
) -> None:
    lines("json")
    async with serving(model) as (client, _):
        body = {"prompt": "a secret", "max_tokens": 3, "made_up": 1}
        answer = await client.post("/v1/completions", json=body, headers={"x-request-id": "my-1"})
        assert answer.headers["x-request-id"] == "my-1"
        bad = await client.post("/v1/completions", json={"prompt": "a secret", "n": 0})
    made = bad.headers["x-request-id"]
    found = [json.loads(line) for line in lines("json")]
    assert {each["request_id"] for each in found} == {"my-1", made}
    ends = {each["request_id"]: each for each in found if "status" in each}
    assert (ends["my-1"]["status"], ends[made]["status"]) == (200, 400)
    assert ends["my-1"]["seconds"] > 0
    assert ends["my-1"]["level"] == "INFO"
    assert any("made_up" in each["message"] for each in found)
    assert "secret" not in json.dumps(found)


@pytest.mark.parametrize("given", ["two words", "a\u00fcb", "x" * 129, "", 'quo"te'])
async def test_what_is_no_id_is_replaced(model: Path, given: str) -> None:
    async with serving(model) as (client, _):
        headers = {"x-request-id": given.encode()}
        answer = await client.get("/v1/models", headers=headers)  # type: ignore[arg-type]
    assert answer.headers["x-request-id"] != given
    assert len(answer.headers["x-request-id"]) == 32


async def test_prompts_are_logged_when_asked(
    model: Path, lines: Callable[[str], list[str]]
) -> None:
    lines("text")
    async with serving(model, limits={"log_prompts": True}) as (client, _):
        headers = {"x-request-id": "it"}
        await client.post("/v1/completions", json={"prompt": "a secret"}, headers=headers)
    first, *_ = lines("text")
    assert "[it] asked: " in first
    assert "a secret" in first


async def test_a_router_tells_which_requests_its_shard_failed_under(
    lines: Callable[[str], list[str]],
) -> None:
    lines("json")
    engine = null_engine(step_ms=5)
    broken = asyncio.Event()

    async def recover(error: ShardError, tell: Any) -> Any:
        broken.set()
        raise ShardError("no other")

    engine._recover = recover
    await engine.start()
    server = EngineServer(engine)
    endpoint = await server.start("127.0.0.1")

    async def find() -> Endpoint:
        return endpoint

    link = EngineLink(find)
    token = request_id.set("it-7")
    stream: Any = link.generate(GenerationRequest("one", [1, 2], Sampling(seed=1), 200))
    async with aclosing(stream):
        await stream.__anext__()
        request_id.reset(token)

        async def fail() -> Any:
            raise ShardError("out of luck")

        engine._link.receive = fail  # type: ignore[method-assign]
        async for _ in stream:
            pass
    await broken.wait()
    found = [json.loads(line) for line in lines("json")]
    assert [each["message"] for each in found if each.get("request_id") == "it-7"] == [
        "it ran when the shards failed"
    ]
    await link.close()
    await server.close()
    await engine.close()


def test_text_lines_and_exceptions(lines: Callable[[str], list[str]]) -> None:
    lines("text")
    log = logging.getLogger("tensorray.cluster.engine")
    log.warning("plain")
    log.warning("about one", extra={"request": "it"})
    lines("json")
    try:
        raise RuntimeError("what")
    except RuntimeError:
        log.exception("bad\nthing")
    plain, about, as_json = lines("json")
    assert plain.endswith("WARNING engine plain")
    assert about.endswith("WARNING engine [it] about one")
    told = json.loads(as_json)
    assert told["message"] == "bad\nthing"
    assert "RuntimeError: what" in told["exception"]
    assert told["time"].endswith("Z")
