"""Replicas that retire, are lost, are full, or have failed: requests find their way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from tensorray.actors.protocol import Sampling
from tensorray.actors.wire import Endpoint
from tensorray.cluster.engine import Engine, EngineFailed
from tensorray.cluster.engine_link import EngineLink, EngineServer
from tensorray.cluster.replicas import Replicas
from tensorray.cluster.request import Delta, GenerationRequest, QueueFull
from tests.helpers.null_engine import null_engine


class Remembering(Replicas[EngineLink]):
    def __init__(self, **settings: Any) -> None:
        super().__init__(routing="balanced", **settings)
        self.gone: list[EngineLink] = []

    def forgotten(self, client: EngineLink) -> None:
        self.gone.append(client)


class Fleet:
    def __init__(self, stack: AsyncExitStack, replicas: Remembering) -> None:
        self._stack = stack
        self.replicas = replicas
        self.engines: list[Engine] = []
        self.servers: list[EngineServer] = []
        self.links: list[EngineLink] = []

    async def add(self, **settings: Any) -> None:
        """A replica more, named by its number."""
        engine = null_engine(**settings)
        await engine.start()
        server = EngineServer(engine)
        endpoint = await server.start("127.0.0.1")

        async def find() -> Endpoint:
            return endpoint

        link = EngineLink(find)
        for close in (engine.close, server.close, link.close):
            self._stack.push_async_callback(close)
        self.replicas.add(str(len(self.engines)), link)
        self.engines.append(engine)
        self.servers.append(server)
        self.links.append(link)

    def running(self) -> list[int]:
        return [engine.scheduler.unfinished for engine in self.engines]


@asynccontextmanager
async def fleet(count: int, patience: float = 60.0, **settings: Any) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        found = Fleet(stack, Remembering(patience=patience))
        for _ in range(count):
            await found.add(**settings)
        yield found


def request(name: str, tokens: int = 60) -> GenerationRequest:
    return GenerationRequest(name, [1, 2, 3], Sampling(seed=7), tokens)


async def gather(stream: AsyncIterator[list[Delta]]) -> list[int]:
    return [token async for deltas in stream for delta in deltas for token in delta.tokens]


async def begun(replicas: Remembering, names: list[str]) -> list[asyncio.Task[list[int]]]:
    """Tasks that read so many streams, each of which has had a token."""

    async def read(stream: Any, first: list[Delta]) -> list[int]:
        return [token for delta in first for token in delta.tokens] + await gather(stream)

    tasks = []
    for name in names:
        stream: Any = replicas.generate(request(name))
        tasks.append(asyncio.create_task(read(stream, await stream.__anext__())))
    return tasks


async def expected() -> list[int]:
    engine = null_engine()
    await engine.start()
    tokens = await gather(engine.generate(request("alone")))
    await engine.close()
    return tokens


async def test_one_that_retires_ends_what_it_has_and_gets_no_more() -> None:
    async with fleet(2, step_ms=5) as found:
        tasks = await begun(found.replicas, ["a", "b", "c", "d"])
        assert found.running() == [2, 2]
        found.replicas.retire("0")
        tasks += await begun(found.replicas, ["e", "f"])
        assert found.engines[1].scheduler.unfinished >= found.engines[0].scheduler.unfinished
        assert found.replicas.gone == []
        assert await asyncio.gather(*tasks) == [await expected()] * 6
        assert found.replicas.gone == [found.links[0]]
        assert [member.name for member in found.replicas.members()] == ["1"]


async def test_the_last_one_serves_until_there_is_another() -> None:
    async with fleet(1, step_ms=1) as found:
        found.replicas.retire("0")
        assert await gather(found.replicas.generate(request("late"))) == await expected()
        assert found.replicas.gone == []
        await found.add(step_ms=1)
        assert found.replicas.gone == [found.links[0]]
        await gather(found.replicas.generate(request("later")))


async def test_what_a_lost_one_ran_goes_on_at_another() -> None:
    async with fleet(2, step_ms=5) as found:
        tasks = await begun(found.replicas, ["a", "b", "c", "d"])
        await found.servers[0].close()
        await found.engines[0].close()
        assert await asyncio.gather(*tasks) == [await expected()] * 4


async def test_what_the_only_one_ran_waits_for_its_successor() -> None:
    async with fleet(1, step_ms=5) as found:
        tasks = await begun(found.replicas, ["a", "b"])
        await found.servers[0].close()
        found.replicas.retire("0")
        late = asyncio.create_task(gather(found.replicas.generate(request("late"))))
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in [*tasks, late])
        await found.add()
        assert await asyncio.gather(*tasks, late) == [await expected()] * 3


async def test_a_full_or_failed_one_is_passed_over() -> None:
    async with fleet(3, step_ms=5, max_num_seqs=1, max_waiting=0) as found:
        found.engines[0].fail("out of luck")
        tasks = await begun(found.replicas, ["a", "b"])
        assert sorted(found.running()) == [0, 1, 1]
        with pytest.raises((QueueFull, EngineFailed)):
            await gather(found.replicas.generate(request("c")))
        assert await asyncio.gather(*tasks) == [await expected()] * 2
        # What has been told of is never turned away, however full the others are.
        (task,) = await begun(found.replicas, ["d"])
        full = await begun(found.replicas, ["e"])
        (at,) = (i for i in (1, 2) if any(name[0] == "d" for name in found.engines[i]._streams))
        await found.servers[at].close()
        assert await asyncio.gather(task, *full) == [await expected()] * 2
