"""LoRA adapters in the engine: what a name stands for, when a version may go, who shares a prefix,
how many run at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.scheduling import Rig
from pydantic import ValidationError

from tensorray.actors.adapter import Adapter
from tensorray.actors.link import LocalLink
from tensorray.actors.null_shard import NullShard
from tensorray.actors.protocol import KVGroups, Sampling, ShardInfo
from tensorray.builder.checkpoint import CheckpointError
from tensorray.cluster.adapters import AdapterRefused, EngineAdapters, LocalHost
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Engine, EngineFailed
from tensorray.cluster.fleet import AdapterClient, Fleet
from tensorray.cluster.lora_module import LoraModule, check_modules
from tensorray.cluster.replicas import UnderWay
from tensorray.cluster.request import Delta, GenerationRequest, Resumed, UnknownAdapter
from tensorray.cluster.scheduler import Scheduler

INFO = ShardInfo(
    kv=KVGroups(windows=[None], num_blocks=257, block_size=4),
    vocab_size=1000,
    max_model_len=256,
    device="null",
    weight_bytes=0,
    kv_cache_bytes=0,
    load_seconds=0.0,
)


class Running:
    """An engine over a null shard, which fails on a sequence whose adapter it does not have."""

    def __init__(self, depth: int = 2, most: int | None = None) -> None:
        self.shard = NullShard(INFO)
        self.adapters = EngineAdapters(LocalHost([self.shard]), most)
        scheduler = Scheduler(INFO.kv, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64)
        self.engine = Engine(
            LocalLink(self.shard, inline=True), scheduler, depth=depth, adapters=self.adapters
        )
        self._requests = 0

    async def load(self, name: str, id: int) -> None:
        await self.adapters.load(Adapter(name, id, f"/{name}"))
        self.adapters.publish(id)

    def ask(self, lora: str, max_tokens: int = 8) -> Any:
        self._requests += 1
        request = GenerationRequest(
            str(self._requests), [1, 2, 3, 4, 5], Sampling(seed=3), max_tokens, lora=lora
        )
        return self.engine.generate(request)

    @property
    def held(self) -> list[int]:
        return sorted(each.id for each in self.shard.adapters())


@pytest.fixture(params=[1, 2])
async def running(request: Any) -> AsyncIterator[Running]:
    made = Running(request.param)
    await made.engine.start()
    yield made
    assert made.engine.failure is None
    await made.engine.close()


async def tokens(stream: Any) -> int:
    count = 0
    async for deltas in stream:
        count += sum(len(delta.tokens) for delta in deltas)
        assert not any(delta.error for delta in deltas)
    return count


async def until(condition: Any) -> None:
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not come")


async def test_a_version_that_runs_stays_until_its_requests_have_ended(running: Running) -> None:
    await running.load("a", 1)
    await running.adapters.load(Adapter("a", 2, "/a"))
    old = running.ask("a", 100)
    await anext(old)
    running.adapters.publish(2)
    new = running.ask("a", 8)
    assert old.request.adapter == 1
    assert new.request.adapter == 2
    assert await tokens(new) == 8
    assert running.held == [1, 2]
    assert await tokens(old) == 99
    await running.engine.cancel("nobody")
    await tokens(running.ask("", 4))  # the plans that named it have been heard of
    await until(lambda: running.held == [2])


async def test_a_resumed_request_keeps_its_version_or_fails_over(running: Running) -> None:
    await running.load("a", 1)
    await running.adapters.load(Adapter("a", 2, "/a"))
    under_way = UnderWay(GenerationRequest("r", [1, 2, 3], Sampling(seed=3), 100, lora="a"))
    first = running.engine.generate(under_way.request(running.engine))
    under_way.take(await anext(first))
    running.adapters.publish(2)
    under_way.lose()
    resumed = under_way.request(running.engine)
    second = running.engine.generate(resumed)
    assert resumed.adapter == second.request.adapter == 1
    assert await tokens(first) == await tokens(second) == 99
    await tokens(running.ask("", 4))
    await until(lambda: running.held == [2])

    with pytest.raises(EngineFailed, match="has been replaced"):
        running.engine.generate(resumed)
    newer = msgspec.structs.replace(resumed, adapter=3)
    with pytest.raises(UnknownAdapter, match="no adapter 'a'"):  # which has it brought here
        running.engine.generate(newer)


async def test_a_version_that_is_about_to_go_stays_for_who_comes_back(running: Running) -> None:
    adapters = running.adapters
    await running.load("a", 1)
    await adapters.load(Adapter("a", 2, "/a"))
    adapters.in_flight = lambda: 1
    adapters.acquire(1)
    adapters.publish(2)
    adapters.release(1)
    assert adapters.fading
    adapters.acquire(adapters.find("a", 1))
    adapters.heard()
    assert adapters.find("a", 1) == 1
    adapters.release(1)
    adapters.heard()
    assert adapters.find("a", 1) == 2


async def test_an_unloaded_adapter_is_not_found_at_once(running: Running) -> None:
    await running.load("a", 1)
    stream = running.ask("a", 30)
    await anext(stream)
    running.adapters.drop(1)
    assert running.adapters.listed() == []
    with pytest.raises(UnknownAdapter, match="no adapter 'a'"):
        running.ask("a")
    assert await tokens(stream) == 29
    await tokens(running.ask("", 4))
    await until(lambda: running.held == [])
    with pytest.raises(AdapterRefused, match="unloaded meanwhile"):
        await running.load("a", 1)


async def test_cancelling_the_last_request_lets_its_version_go(running: Running) -> None:
    await running.load("a", 1)
    stream = running.ask("a", 100)
    running.adapters.drop(1)
    await running.engine.cancel(stream.request.request_id)
    await tokens(running.ask("", 4))
    await until(lambda: running.held == [])


async def test_loads_unloads_and_requests_in_any_order_do_no_harm() -> None:
    """The shard fails the engine if it is sent a sequence whose adapter it does not have."""
    luck = random.Random(5)
    running = Running(depth=2)
    await running.engine.start()
    open_streams: list[asyncio.Task[int]] = []
    for turn in range(400):
        name = luck.choice("abc")
        what = luck.random()
        if what < 0.15:
            await running.load(name, turn + 1)
        elif what < 0.25:
            for adapter in running.adapters.listed():
                if adapter.name == name:
                    running.adapters.drop(adapter.id)
        elif what < 0.35 and open_streams:
            await running.engine.cancel(luck.choice(list(running.engine._streams) or ["none"]))
        else:
            try:
                stream = running.ask(luck.choice([name, ""]), luck.randint(1, 12))
            except UnknownAdapter:
                continue
            open_streams.append(asyncio.ensure_future(tokens(stream)))
        for _ in range(luck.randint(0, 6)):
            await asyncio.sleep(0)
        assert running.engine.failure is None
    await asyncio.gather(*open_streams)
    await tokens(running.ask("", 4))
    current = sorted(adapter.id for adapter in running.adapters.listed())
    await until(lambda: running.held == current)
    await running.engine.close()


async def test_a_late_publication_does_not_replace_a_newer_version(running: Running) -> None:
    await running.adapters.load(Adapter("a", 1, "/a"))
    await running.load("a", 2)
    running.adapters.publish(1)
    assert [each.id for each in running.adapters.listed()] == [2]
    await until(lambda: running.held == [2])


async def test_without_adapters_a_request_for_one_is_refused() -> None:
    scheduler = Scheduler(INFO.kv, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=64)
    engine = Engine(LocalLink(NullShard(INFO)), scheduler)
    request = GenerationRequest("1", [1], Sampling(), 1, lora="a")
    with pytest.raises(UnknownAdapter, match="--enable-lora"):
        engine.generate(request)
    await engine.close()


def simulation(**options: Any) -> Rig:
    return Rig(num_blocks=200, max_num_seqs=8, **options)


def test_blocks_are_shared_under_the_same_version_alone() -> None:
    """Salts can't be made up to meet another's pages either."""
    prompt = range(1, 18)
    run = simulation()
    hits = {}
    asked: list[tuple[str, int]] = [("", 0), ("", 1), ("", 2), ("\x01", 0), ("", 258)]
    for salt, adapter in [*asked, *asked]:
        seq = run.add(prompt, 4, cache_salt=salt, adapter=adapter)
        run.run()
        hits.setdefault((salt, adapter), []).append(run.sequences[seq].cached_tokens)
    assert hits == {key: [0, 16] for key in asked}


def test_no_more_adapters_run_at_once_than_asked_and_each_has_its_turn() -> None:
    run = simulation(max_adapters=2)
    first = [run.add(range(1, 6), 30, adapter=1 + i % 2) for i in range(4)]
    waiting = run.add(range(1, 6), 4, adapter=3)
    behind = run.add(range(1, 6), 4, adapter=1)
    plain = run.add(range(1, 6), 4)
    most = 0
    while run.scheduler.unfinished:
        run.step()
        adapters = {
            s.request.adapter
            for s in run.sequences.values()
            if s.status.value == "running" and s.request.adapter
        }
        most = max(most, len(adapters))
    assert most == 2
    assert len(run.finished) == 7
    assert run.end_step[plain] < min(run.end_step[seq] for seq in first)
    assert run.end_step[waiting] > max(run.end_step[first[0]], 0)
    assert run.first_token_step[behind] >= run.first_token_step[waiting]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_modules": ["a=/x"]}, "lora_modules needs enable_lora"),
        ({"allow_runtime_lora_updating": True}, "needs enable_lora"),
        ({"enable_lora": True, "lora_modules": ["a"]}, "NAME=PATH"),
        ({"enable_lora": True, "lora_modules": ["a=/x", "a=/y"]}, "'a' is another model's name"),
        ({"enable_lora": True, "lora_modules": ["m=/x"]}, "'m' is another model's name"),
        (
            {"enable_lora": True, "lora_modules": ["a=/x", "b=/y"], "max_cpu_loras": 1},
            "less than the 2 lora_modules",
        ),
        ({"enable_lora": True, "lora_modules": ['{"name": "a"}']}, "path"),
        ({"enable_lora": True, "max_loras": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EngineConfig(model="m", **settings)


def test_an_adapter_that_is_none_is_told_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CheckpointError, match="only LORA is supported"):
        check_modules([LoraModule(name="a", path=str(tmp_path))])
    check_modules([LoraModule(name="a", path="org/on-the-hub")])


def test_modules_are_spelled_as_vllm_does() -> None:
    spelled = ["a=/x", '{"name": "b", "path": "/y", "base_model_name": "m"}']
    config = EngineConfig(model="m", enable_lora=True, lora_modules=spelled)  # type: ignore[arg-type]
    assert [(each.name, each.path) for each in config.lora_modules] == [("a", "/x"), ("b", "/y")]


# --- a replica that lacks an adapter ---


class Scripted:
    """A client whose first replica is lost in the midst of a request, and whose next one has to be
    given the adapter first."""

    def __init__(self, told: list[int]) -> None:
        self.told = told
        self.seen: list[GenerationRequest] = []
        self.cancelled: list[tuple[str, int | None]] = []

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        self.seen.append(request)
        if len(self.seen) == 1:
            if self.told:
                yield [Delta(0, self.told), Delta(1, [7], finish_reason="stop")]
            raise UnknownAdapter("there is no adapter here")
        wanted = request.resumed or [Resumed(0, []), Resumed(1, [])]
        yield [Delta(each.index, [9], finish_reason="length") for each in wanted]

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        self.cancelled.append((request_id, index))


class Spreading(Fleet):
    def __init__(self) -> None:
        super().__init__(list)

    async def spread(self, name: str) -> bool:
        return True


@pytest.mark.parametrize("told", [[], [1, 2]])
async def test_what_was_told_is_not_told_again(told: list[int]) -> None:
    scripted = Scripted(told)
    client = AdapterClient(scripted, Spreading())
    request = GenerationRequest("r", [5], Sampling(), 8, n=2, lora="a")
    found: dict[int, list[int]] = {0: [], 1: []}
    async for deltas in client.generate(request):
        for delta in deltas:
            found[delta.index] += delta.tokens
    assert found == ({0: [1, 2, 9], 1: [7]} if told else {0: [9], 1: [9]})
    assert scripted.seen[1].resumed == ([Resumed(0, [1, 2])] if told else None)


async def test_a_request_is_cancelled_where_it_runs() -> None:
    scripted = Scripted([])
    client = AdapterClient(scripted, Spreading())
    request = GenerationRequest("r", [5], Sampling(), 8, n=2, lora="a")
    async for _ in client.generate(request):
        await client.cancel("r", 1)
    await client.cancel("other")
    assert scripted.cancelled == [(scripted.seen[1].request_id, 1), ("other", None)]


def test_a_resumed_request_that_is_lost_again_keeps_what_it_had() -> None:
    resumed = [Resumed(1, [3, 4], 2)]
    under_way = UnderWay(GenerationRequest("r", [5], Sampling(), 8, n=2, resumed=resumed))
    assert under_way.request(Scripted([])).resumed == resumed
    under_way.take([Delta(1, [6])])
    under_way.lose()
    assert under_way.request(Scripted([])).resumed == [Resumed(1, [3, 4, 6], 2)]
