"""Requests over real routers: engines behind connections, several ingresses before them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from tensorray.actors.protocol import Sampling
from tensorray.actors.wire import Endpoint
from tensorray.cluster.engine import Engine
from tensorray.cluster.engine_link import EngineLink, EngineServer
from tensorray.cluster.replica_choice import Choice, Routing
from tensorray.cluster.replicas import ReplicaLost, Replicas
from tensorray.cluster.request import Delta, GenerationRequest
from tensorray.cluster.router_share import Place
from tests.helpers.null_engine import null_engine

PREFIX, OWN, OUTPUT = 512, 16, 4
GROUPS = 24


class Routers:
    """Engines over null devices, each behind its door."""

    def __init__(self, engines: list[Engine], servers: list[EngineServer]) -> None:
        self.engines = engines
        self.servers = servers

    def finder(self, number: int) -> Callable[[], object]:
        async def find() -> Endpoint:
            return self.servers[number].endpoint

        return find


@asynccontextmanager
async def routers(count: int, **settings: object) -> AsyncIterator[Routers]:
    async with AsyncExitStack() as stack:
        engines, servers = [], []
        for _ in range(count):
            engine = null_engine(**settings)  # type: ignore[arg-type]
            await engine.start()
            stack.push_async_callback(engine.close)
            server = EngineServer(engine)
            await server.start("127.0.0.1")
            stack.push_async_callback(server.close)
            engines.append(engine)
            servers.append(server)
        yield Routers(engines, servers)


@asynccontextmanager
async def ingress(
    found: Routers,
    routing: Routing = "prefix",
) -> AsyncIterator[tuple[Replicas, list[EngineLink]]]:
    links = [
        EngineLink(found.finder(number))  # type: ignore[arg-type]
        for number in range(len(found.engines))
    ]
    try:
        yield Replicas(links, routing), links
    finally:
        for link in links:
            await link.close()


async def collect(stream: AsyncIterator[list[Delta]]) -> list[Delta]:
    return [delta async for deltas in stream for delta in deltas]


def request(name: str, group: int, number: int) -> GenerationRequest:
    shared = [(group * 977 + i * 13) % 250 for i in range(PREFIX)]
    own = [(number * 31 + i * 7) % 250 for i in range(OWN)]
    return GenerationRequest(name, shared + own, Sampling(), OUTPUT)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(wait(), seconds)


def hit_rate(engines: list[Engine]) -> float:
    stats = [engine.scheduler.stats() for engine in engines]
    return sum(each.prefix_hits for each in stats) / sum(each.prefix_queries for each in stats)


async def traffic(routing: str) -> tuple[float, list[int], int]:
    """Hit rate, prompt tokens computed by each of three routers, requests told to be routed by
    prefix. Their caches hold nine of 24 prefixes each, of which the first is asked for most."""
    rng = random.Random(7)
    weights = [(rank + 1) ** -0.5 for rank in range(GROUPS)]
    groups = rng.choices(range(GROUPS), weights, k=600)
    async with AsyncExitStack() as stack:
        found = await stack.enter_async_context(
            routers(3, max_model_len=1024, blocks=1 + 10 * (PREFIX // 16 + 2), max_num_seqs=8)
        )
        known: Routing = "balanced" if routing == "random" else routing  # type: ignore[assignment]
        ingresses = [await stack.enter_async_context(ingress(found, known)) for _ in range(2)]
        if routing == "random":
            for replicas, _ in ingresses:
                members = replicas.members()
                replicas._choice.choose = (  # type: ignore[method-assign]
                    lambda *_, members=members: Choice(rng.choice(members), 0)  # type: ignore[misc]
                )
        waiting = asyncio.Semaphore(6)

        async def one(number: int) -> None:
            async with waiting:
                replicas, _ = ingresses[number % 2]
                name = f"r{number}"
                deltas = await collect(replicas.generate(request(name, groups[number], number)))
                assert sum(len(delta.tokens) for delta in deltas) == OUTPUT

        await asyncio.gather(*(one(number) for number in range(len(groups))))
        computed = [
            stats.prefix_queries - stats.prefix_hits
            for stats in (engine.scheduler.stats() for engine in found.engines)
        ]
        routed = sum(engine.prefix_routed for engine in found.engines)
        return hit_rate(found.engines), computed, routed


async def test_prefixes_are_found_more_often_and_the_load_stays_balanced() -> None:
    at_random, much, none = await traffic("random")
    found, computed, routed = await traffic("prefix")
    assert none == 0
    assert found > 1.25 * at_random
    assert sum(computed) < 0.8 * sum(much)
    assert routed > 300
    assert max(computed) < 2 * sum(computed) / 3


async def test_every_ingress_hears_of_the_load_that_others_make() -> None:
    async with (
        routers(2, step_ms=1, max_model_len=1024, max_num_seqs=4) as found,
        ingress(found) as (_, busy),
        ingress(found) as (idle, links),
    ):
        for number in range(2):  # so that there are connections
            await collect(links[number].generate(GenerationRequest("a", [1], Sampling(), 1)))
        await until(lambda: [link.load for link in links] == [0, 0])
        streams = [
            busy[0].generate(GenerationRequest(f"b{i}", [1, 2], Sampling(), 900)) for i in range(6)
        ]
        for stream in streams[:4]:
            await stream.__anext__()
        waiting = [asyncio.ensure_future(stream.__anext__()) for stream in streams[4:]]
        await until(lambda: (links[0].load or 0) >= 6 * 128)
        assert links[1].load == 0
        for number in range(3):
            await collect(idle.generate(GenerationRequest(f"c{number}", [1], Sampling(), 1)))
        assert found.engines[1].scheduler.stats().prefix_queries == 4  # of one token each
        for task in waiting:
            task.cancel()
        for stream in streams[:4]:
            await stream.aclose()
        await until(lambda: links[0].load == 0)


async def test_replicas_come_and_go() -> None:
    async with routers(2) as found, ingress(found) as (replicas, links):
        replicas.retire("0")
        for number in range(3):
            await collect(replicas.generate(GenerationRequest(f"a{number}", [1], Sampling(), 1)))
        assert found.engines[0].scheduler.stats().prefix_queries == 0
        replicas.add("2", links[0])
        replicas.retire("1")
        await collect(replicas.generate(GenerationRequest("c", [1], Sampling(), 1)))
        assert found.engines[0].scheduler.stats().prefix_queries == 1


class Doubtful:
    """A replica that may be out of reach. It answers with one token."""

    def __init__(self) -> None:
        self.reachable = True
        self.served = 0
        self.searched = 0
        self.load: int | None = 0
        self.room: int | None = None

    async def connect(self) -> None:
        self.searched += 1
        if not self.reachable:
            raise ReplicaLost("out of reach")

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        if not self.reachable:
            raise ReplicaLost("out of reach")
        self.served += 1
        yield [Delta(0, [1], finish_reason="length")]

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        pass


async def ask(replicas: Replicas[Doubtful], count: int) -> None:
    for number in range(count):
        request = GenerationRequest(f"r{number}", [1, 2, 3], Sampling(), 1)
        assert len(await collect(replicas.generate(request))) == 1


async def test_a_lost_replica_is_used_again_once_it_is_back() -> None:
    clients = [Doubtful(), Doubtful()]
    replicas = Replicas(clients)
    clients[0].reachable = False
    await ask(replicas, 10)
    assert clients[1].served == 10  # nobody waited for the lost one
    await until(lambda: clients[0].searched >= 2)
    assert clients[0].served == 0
    clients[0].reachable = True
    await until(lambda: all(member.lost is None for member in replicas.members()))
    await ask(replicas, 10)
    assert clients[0].served == 5
    await replicas.close()


async def test_room_is_what_usable_replicas_have_together() -> None:
    clients = [Doubtful(), Doubtful(), Doubtful()]
    replicas = Replicas(clients)
    assert replicas.has_room(10_000), "nobody has said otherwise"
    for client, room in zip(clients, (2, 0, 3), strict=True):
        client.room = room
    assert replicas.has_room(5)
    assert not replicas.has_room(6)
    clients[2].reachable = False
    while not (lost := [each.lost for each in replicas.members()])[2]:
        await ask(replicas, 1)
    assert lost[:2] == [None, None]
    assert replicas.has_room(2)
    assert not replicas.has_room(3)
    replicas.retire("0")
    assert not replicas.has_room(1)
    await replicas.close()


async def test_a_lost_replica_that_is_gone_is_not_looked_for() -> None:
    clients = [Doubtful(), Doubtful()]
    replicas = Replicas(clients)
    clients[0].reachable = False
    await ask(replicas, 4)
    replicas.retire("0")
    await until(lambda: not replicas._searches)
    assert len(replicas.members()) == 1


async def test_of_many_replicas_a_share_is_sent_to_as_long_as_it_can_be() -> None:
    place = Place(1, 10)
    replicas: Replicas[Doubtful] = Replicas(place=place)
    clients = {f"router-{number}": Doubtful() for number in range(400)}
    for name, client in clients.items():
        replicas.add(name, client)
    senders = place.senders(400)
    near = {name for name in clients if place.sends_to(name, senders)}
    assert 40 < len(near) < 160
    await ask(replicas, 3 * len(near))
    assert {name for name, client in clients.items() if client.served} <= near
    assert sum(client.served > 0 for client in clients.values()) > len(near) / 2
    for name in near:
        clients[name].load, clients[name].reachable = None, False
    served = {name: client.served for name, client in clients.items()}
    await ask(replicas, 5)
    others = [name for name, client in clients.items() if client.served > served[name]]
    assert others
    assert not near.intersection(others)
    await replicas.close()
