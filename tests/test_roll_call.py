"""Many are asked, and none holds up the others."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import Any, cast

import pytest

from tensorray.cluster.backend import EngineStatus
from tensorray.cluster.engine import EngineFailed
from tensorray.cluster.replicas import ReplicaLost
from tensorray.cluster.roll_call import RollCall
from tensorray.cluster.routers import Routers, SplitRouters


class People:
    """Who answer with how often they were asked, while nobody holds them up."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.held: dict[str, asyncio.Event] = {}
        self.lost: set[str] = set()
        self.at_once = self.most_at_once = 0

    async def ask(self, who: str) -> tuple[str, int]:
        self.asked[who] += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0)
        if who in self.held:
            await self.held[who].wait()
        self.at_once -= 1
        if who in self.lost:
            raise EngineFailed(f"{who} is lost")
        return who, self.asked[who]


async def test_each_is_asked_anew_where_they_are_few() -> None:
    people = People()
    call = RollCall(people.ask, asking_seconds=0)
    for time in range(1, 4):
        found = await call.answers("abc")
        assert [each.answer for each in found] == [("a", time), ("b", time), ("c", time)]
        assert not any(each.silent for each in found)


async def test_who_hangs_is_asked_once_and_what_it_said_last_is_told() -> None:
    people = People()
    call = RollCall(people.ask, patience=0.05, asking_seconds=0)
    while [each.silent for each in await call.answers("abc")] != ["", "", ""]:
        pass  # on a machine that is slower than that
    asked = people.asked.copy()
    people.held["b"] = asyncio.Event()
    for _ in range(4):
        found = await call.answers("abc")
        assert [each.answer[0] for each in found] == ["a", "b", "c"]
        assert found[1].answer[1] == asked["b"]
        assert found[1].silent == "it has not answered within 0.05 s"
    assert people.asked["b"] == asked["b"] + 1
    assert people.asked["a"] >= asked["a"] + 1
    people.held.pop("b").set()
    while (found := await call.answers("abc"))[1].silent:
        await asyncio.sleep(0.01)
    assert found[1].answer[1] > asked["b"]


async def test_who_is_lost_is_told_as_such_and_who_never_spoke_is_not() -> None:
    people = People()
    people.lost = {"b"}
    call = RollCall(people.ask, asking_seconds=0)
    assert [each.answer[0] for each in await call.answers("ab")] == ["a"]
    people.lost = {"a"}
    assert [each.silent for each in await call.answers("ab")] == ["a is lost", ""]
    people.lost = set()
    assert [each.silent for each in await call.answers("ab")] == ["", ""]
    assert [each.answer[0] for each in await call.answers("b")] == ["b"]
    people.lost = {"a"}
    assert [each.answer[0] for each in await call.answers("ab")] == ["b"], "it came anew"


async def test_those_who_ask_at_the_same_time_share_the_answers() -> None:
    people = People()
    call = RollCall(people.ask, asking_seconds=0)
    found = await asyncio.gather(*(call.answers("abc") for _ in range(10)))
    assert all(each == found[0] or each[0].answer == ("a", 1) for each in found)
    assert set(people.asked.values()) == {1}


async def test_answers_are_good_for_as_long_as_asking_all_takes() -> None:
    people = People()
    call = RollCall(people.ask, asking_seconds=1000)
    for _ in range(5):
        assert [each.answer[1] for each in await call.answers("abc")] == [1, 1, 1]


async def test_few_are_asked_at_once_and_those_who_hang_let_others_pass() -> None:
    people = People()
    everyone = [str(number) for number in range(200)]
    call = RollCall(people.ask, patience=60, at_once=8)
    assert len(await call.answers(everyone)) == 200
    assert 1 < people.most_at_once <= 8
    people = People()
    for who in everyone[:20]:
        people.held[who] = asyncio.Event()
    call = RollCall(people.ask, patience=0.05, at_once=8, turn_seconds=0.01, asking_seconds=1000)
    await asyncio.wait_for(call.answers(everyone), 60)
    assert people.asked.total() == 200
    while len(await call.answers(everyone)) < 180:
        await asyncio.sleep(0.01)
    for event in people.held.values():
        event.set()
    while len(await call.answers(everyone)) < 200:
        await asyncio.sleep(0.01)
    assert people.asked.total() == 200


class FakeRouter:
    """A router that answers while nobody holds it up, and is lost when somebody says so."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.go = asyncio.Event()
        self.go.set()
        self.lost = False

    async def _answer(self) -> None:
        await self.go.wait()
        if self.lost:
            raise ReplicaLost("its router does not answer")

    async def failure(self) -> str | None:
        await self._answer()
        return None

    async def metrics(self) -> bytes:
        await self._answer()
        return f'# HELP up\n# TYPE up gauge\nup{{engine="{self.name}"}} 1\n'.encode()

    async def status(self) -> EngineStatus:
        await self._answer()
        return EngineStatus(self.name, None, "cpu", 1, 1, 0.5, [])


def routers_of(*names: str) -> tuple[Routers, dict[str, FakeRouter]]:
    routers = Routers(cast(Any, None), "model")
    for roll_call in (routers._scrapes, routers._statuses):
        roll_call._patience, roll_call._asking_seconds = 0.05, 0.0
    fakes = {name: FakeRouter(name) for name in names}
    for name, fake in fakes.items():
        routers.add(name, cast(Any, fake))
    return routers, fakes


def engines(scrape: bytes) -> set[str]:
    assert scrape.count(b"# HELP") == 1
    return set(re.findall(r'engine="(\w+)"', scrape.decode()))


async def test_a_router_that_hangs_holds_up_neither_scrapes_nor_health() -> None:
    decode, fakes = routers_of("0", "1")
    prefill, apart = routers_of("prefill")
    both = SplitRouters(prefill, decode, 1)

    async def told(expected: set[str]) -> list[EngineStatus]:
        """The status, once just these tell their figures and that they can serve."""
        while True:  # a slow machine makes them late
            found = await both.status()
            serving = {each.engine for each in found if not each.failure}
            if serving == engines(await both.metrics()) == expected:
                return found

    await asyncio.wait_for(told({"0", "1", "prefill"}), 60)
    for each in (fakes["1"], apart["prefill"]):
        each.go.clear()
    assert await asyncio.wait_for(both.failure(), 60) is None
    for lost in (False, True):
        found = await asyncio.wait_for(told({"0"}), 60)
        assert [each.engine for each in found] == ["0", "1", "prefill"]
        assert "its router has not answered for" in (found[1].failure or "")
        if not lost:
            for each in (fakes["1"], apart["prefill"]):
                each.lost = True
                each.go.set()
    fakes["0"].lost = True
    with pytest.raises(EngineFailed, match="no router answers"):
        await both.metrics()
