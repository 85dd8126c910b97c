"""The engine behind a connection behaves like the engine itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from tensorray.actors import wire
from tensorray.actors.protocol import Sampling
from tensorray.actors.wire import Endpoint
from tensorray.cluster.engine import Engine, EngineFailed
from tensorray.cluster.engine_link import EngineLink, EngineServer
from tensorray.cluster.replicas import ReplicaLost, Replicas
from tensorray.cluster.request import Delta, GenerationRequest, QueueFull, RequestRefused
from tests.helpers.null_engine import null_engine


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[Engine, EngineServer, EngineLink]]:
    engine = null_engine(**settings)
    await engine.start()
    server = EngineServer(engine)
    endpoint = await server.start("127.0.0.1")

    async def find() -> Endpoint:
        return endpoint

    link = EngineLink(find)
    try:
        yield engine, server, link
    finally:
        await link.close()
        await server.close()
        await engine.close()


def request(name: str, tokens: int = 8, n: int = 1, prompt: int = 5) -> GenerationRequest:
    return GenerationRequest(name, list(range(prompt)), Sampling(seed=7), tokens, n=n)


async def gather(stream: AsyncIterator[list[Delta]]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async for deltas in stream:
        for delta in deltas:
            tokens.setdefault(delta.index, []).extend(delta.tokens)
    return tokens


async def until(condition: object, seconds: float = 60.0) -> None:
    async def wait() -> None:
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.002)

    await asyncio.wait_for(wait(), seconds)


async def test_same_tokens_as_without_the_link() -> None:
    async with serving() as (engine, _, link):
        near = await gather(engine.generate(request("near", n=3)))
        far = await asyncio.gather(
            *[gather(link.generate(request(f"far{i}", n=3))) for i in range(20)]
        )
        assert sorted(near) == [0, 1, 2]
        assert all(len(tokens) == 8 for tokens in near.values())
        assert all(tokens == near for tokens in far)


async def test_refusals_keep_their_kind() -> None:
    async with serving(max_num_seqs=1, max_waiting=0, step_ms=20) as (_, _, link):
        with pytest.raises(RequestRefused):
            await gather(link.generate(request("long", prompt=300)))
        running = link.generate(request("first", tokens=200))
        await running.__anext__()
        with pytest.raises(QueueFull):
            await gather(link.generate(request("second")))
        await running.aclose()


async def test_an_ingress_knows_how_many_more_would_be_queued() -> None:
    async with serving(max_num_seqs=2, max_waiting=4, step_ms=2) as (engine, _, link):
        assert link.room is None
        running = link.generate(request("first", tokens=200, n=3))
        await running.__anext__()
        assert engine.room == link.room == 3
        more = asyncio.create_task(gather(link.generate(request("second", n=2))))
        await asyncio.sleep(0)
        assert link.room == 1, "what is on its way counts"
        await running.aclose()
        await more
        assert engine.room == 6
        await gather(link.generate(request("third")))
        assert link.room == 6


async def test_closing_a_stream_cancels_it() -> None:
    async with serving(step_ms=2) as (engine, server, link):
        stream = link.generate(request("left", tokens=200))
        await stream.__anext__()
        assert engine.scheduler.stats().running == 1
        await stream.aclose()
        await until(lambda: engine.scheduler.stats().running == 0)
        await until(lambda: server.running() == 0)


async def test_cancelling_one_of_several_sequences() -> None:
    async with serving(step_ms=2) as (_, _, link):
        reasons: dict[int, str] = {}
        stream = link.generate(request("pair", tokens=100, n=2))
        async for deltas in stream:
            await link.cancel("pair", 1)
            reasons |= {d.index: d.finish_reason for d in deltas if d.finish_reason}
        assert reasons == {0: "length", 1: "abort"}


async def test_an_ingress_that_vanishes_leaves_nothing_running() -> None:
    async with serving(step_ms=2) as (engine, _, link):
        stream = link.generate(request("orphan", tokens=200))
        await stream.__anext__()
        await link.close()
        await until(lambda: engine.scheduler.stats().running == 0)
        with pytest.raises(EngineFailed):
            await gather(stream)


async def test_a_failed_engine_says_why() -> None:
    async with serving(step_ms=2) as (engine, _, link):
        stream = link.generate(request("doomed", tokens=200))
        await stream.__anext__()
        engine.fail("the shard failed: out of luck")
        last = [delta async for deltas in stream for delta in deltas][-1]
        assert (last.finish_reason, last.error) == ("error", "the shard failed: out of luck")
        with pytest.raises(EngineFailed, match="out of luck"):
            await gather(link.generate(request("late")))


async def test_a_restarted_router_is_found_again() -> None:
    engine = null_engine(step_ms=2)
    await engine.start()
    servers = [EngineServer(engine), EngineServer(engine)]
    endpoints = [await server.start("127.0.0.1") for server in servers]
    calls = iter(endpoints)

    async def find() -> Endpoint:
        return next(calls)

    link = EngineLink(find)
    stream = link.generate(request("first", tokens=200))
    await stream.__anext__()
    await servers[0].close()
    with pytest.raises(EngineFailed, match="connection"):
        await gather(stream)
    assert len((await gather(link.generate(request("second"))))[0]) == 8
    await link.close()
    await servers[1].close()
    await engine.close()


async def test_a_wrong_secret_is_turned_away() -> None:
    async with serving() as (_, server, _):

        async def find() -> Endpoint:
            return Endpoint(server.endpoint.host, server.endpoint.port, b"x" * 32)

        stranger = EngineLink(find)
        with pytest.raises(EngineFailed, match="ended"):
            await gather(stranger.generate(request("stranger")))
        await stranger.close()


async def test_a_lagging_reader_gets_merged_tokens() -> None:
    async with serving() as (engine, _, link):
        stream = link.generate(request("lazy", tokens=200))
        first = await stream.__anext__()
        await until(lambda: engine.scheduler.stats().running == 0)
        assert link._line is not None
        (mailbox,) = link._line.mailboxes.values()
        await until(lambda: any(delta.finish_reason for delta in mailbox._deltas))
        rest = [deltas async for deltas in stream]
        assert len(first[0].tokens) < 200
        assert len(rest) == 1
        assert sum(len(d.tokens) for d in [*first, *rest[0]]) == 200


async def test_drain_waits_for_what_runs() -> None:
    async with serving(step_ms=2) as (_, server, link):
        stream = link.generate(request("last", tokens=30))
        (first,) = await stream.__anext__()
        draining = asyncio.create_task(server.drain())
        tokens = await gather(stream)
        assert len(first.tokens) + sum(map(len, tokens.values())) == 30
        await asyncio.wait_for(draining, 60)
        assert server.running() == 0


async def test_all_who_wait_for_a_lost_router_share_one_attempt() -> None:
    attempts = 0

    async def find() -> Endpoint:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0.05)
        raise EngineFailed("its router does not answer")

    link = EngineLink(find)
    answers = await asyncio.gather(
        *[gather(link.generate(request(f"r{i}"))) for i in range(20)], return_exceptions=True
    )
    assert all(isinstance(answer, EngineFailed) for answer in answers)
    assert attempts == 1
    with pytest.raises(EngineFailed):  # who comes later tries again
        await gather(link.generate(request("late")))
    assert attempts == 2


async def test_a_lost_router_is_a_pause_for_those_who_are_patient() -> None:
    """Nothing told twice, nothing left out, whatever each sequence had when the router died."""
    engines = [null_engine(step_ms=10) for _ in range(3)]
    servers = [EngineServer(engine) for engine in engines]
    endpoints = []
    for engine, server in zip(engines, servers, strict=True):
        await engine.start()
        endpoints.append(await server.start("127.0.0.1"))
    alone = await gather(engines[0].generate(request("alone", tokens=60, n=3)))

    async def find() -> Endpoint:
        if not endpoints:
            raise ReplicaLost("its router does not answer")
        return endpoints[0]

    link = Replicas([EngineLink(find)], patience=60)
    scored = request("scored", tokens=60)
    scored = msgspec.structs.replace(
        scored, sampling=Sampling(seed=7, prompt_logprobs=0, logprobs=0), reuse_prefix=False
    )
    deltas: list[Delta] = []

    async def read(stream: AsyncIterator[list[Delta]]) -> None:
        async for each in stream:
            deltas.extend(each)

    tasks = [
        asyncio.create_task(gather(link.generate(request(f"r{i}", tokens=60, n=3))))
        for i in range(10)
    ]
    tasks.append(asyncio.create_task(read(link.generate(scored))))  # type: ignore[arg-type]
    for server in servers[:2]:
        await asyncio.sleep(0.04)
        assert not any(task.done() for task in tasks)
        lost = endpoints.pop(0)
        await server.close()
        assert lost not in endpoints
    found = await asyncio.wait_for(asyncio.gather(*tasks), 60)
    assert all(tokens == alone for tokens in found[:-1])
    assert [token for delta in deltas for token in delta.tokens] == alone[0]
    told = [entry.token for delta in deltas for entry in delta.logprobs]
    assert told == alone[0]
    assert [entry.token for delta in deltas for entry in delta.prompt_logprobs] == [1, 2, 3, 4]
    assert engines[2].scheduler.stats().running == 0
    endpoints.clear()
    await servers[2].close()
    await link.close()
    for engine in engines:
        await engine.close()


async def test_a_sequence_that_was_cancelled_is_not_resumed() -> None:
    engines = [null_engine(step_ms=2) for _ in range(2)]
    servers = [EngineServer(engine) for engine in engines]
    endpoints = []
    for engine, server in zip(engines, servers, strict=True):
        await engine.start()
        endpoints.append(await server.start("127.0.0.1"))

    async def find() -> Endpoint:
        return endpoints[0]

    link = Replicas([EngineLink(find)], patience=60)
    stream = link.generate(request("pair", tokens=150, n=2))
    await stream.__anext__()
    endpoints.pop(0)
    await link.cancel("pair", 1)
    await servers[0].close()  # before anything is heard of the cancellation
    tokens = await gather(stream)
    assert len(tokens[0]) > 100
    assert len(tokens.get(1, [])) < 50
    await link.close()
    await servers[1].close()
    for engine in engines:
        await engine.close()


async def test_patience_has_an_end() -> None:
    async def find() -> Endpoint:
        raise ReplicaLost("its router does not answer")

    link = Replicas([EngineLink(find)], patience=0.4)
    with pytest.raises(EngineFailed, match="does not answer"):
        await asyncio.wait_for(gather(link.generate(request("r"))), 60)
    await link.close()


async def test_many_long_answers_travel_in_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that would be too long is split between its streams; vectors come whole."""
    monkeypatch.setattr(wire, "MAX_FRAME", 400)
    async with serving() as (_, _, link):
        pooled = [
            GenerationRequest(f"pooled{i}", [5] * (3 + i), Sampling(), 1, pooling="mean")
            for i in range(12)
        ]

        async def vector(request: GenerationRequest) -> bytes:
            found = [delta async for deltas in link.generate(request) for delta in deltas]
            return found[-1].pooled

        found = await asyncio.gather(*map(vector, pooled))
        assert [np.frombuffer(each, "<f4").tolist() for each in found] == [
            [3.0 + i] * 8 for i in range(12)
        ]
