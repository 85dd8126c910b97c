"""Prompts handed from a replica that prefills to one that decodes, over real shards' doors."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.gpu_shards import make_gpu_shard
from helpers.handover import Pair, engine, pair, split
from helpers.running import make_shard
from helpers.tiny_models import directory
from numpy.typing import NDArray

from tensorray.actors import kv_door
from tensorray.actors.gpu_shard import GraphSizes, Limits
from tensorray.actors.kv_door import HandoverError, KVDoor, fetch
from tensorray.actors.protocol import Door, Sampling, SequenceStart, StepPlan
from tensorray.actors.tcp_link import ShardServer, TcpLink
from tensorray.actors.wire import PEER_SECONDS, Endpoint
from tensorray.cluster import prefill_first
from tensorray.cluster.engine import Engine
from tensorray.cluster.handover import AT_ONCE
from tensorray.cluster.request import BeamSearch, Delta, GenerationRequest, QueueFull, Source
from tensorray.cluster.scheduler import Scheduler

GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=0.9, seed=3, repetition_penalty=1.2, frequency_penalty=0.3, logprobs=2)
PROMPT = [3 + (i * i * 7 + 5 * i) % 80 for i in range(30)]


def request(name: str = "a", sampling: Sampling = GREEDY, **fields: Any) -> GenerationRequest:
    fields = {"prompt": PROMPT, "max_tokens": 12, **fields}
    return GenerationRequest(request_id=name, sampling=sampling, **fields)


async def answer(client: Any, asked: GenerationRequest) -> list[dict[str, Any]]:
    """By sequence: its tokens, log-probabilities, and how it ended."""
    found: list[dict[str, Any]] = [{"tokens": [], "logprobs": []} for _ in range(asked.n)]
    async for deltas in client.generate(asked):
        for delta in deltas:
            found[delta.index]["tokens"] += delta.tokens
            found[delta.index]["logprobs"] += [entry.token for entry in delta.logprobs]
            if delta.finish_reason is not None:
                assert "end" not in found[delta.index]
                found[delta.index]["end"] = delta.finish_reason
    return found


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), 60)


def free(engine: Engine) -> bool:
    stats = engine.scheduler.stats()
    return stats.free_blocks == stats.total_blocks and not engine.scheduler.unfinished


REQUESTS = {
    "greedy": request(),
    "drawn": request(sampling=DRAWN, prompt=PROMPT[:27]),
    "a whole number of blocks": request(sampling=DRAWN, prompt=PROMPT[:28]),
    "several sequences": request(sampling=DRAWN, n=3),
    "told at its end": request(whole=True),
}


@pytest.mark.parametrize("model", ["gemma3", "llama3"])  # with sliding windows, and without
@pytest.mark.parametrize("caching", [True, False])
def test_two_replicas_tell_what_one_tells(model: str, caching: bool) -> None:
    async def run() -> None:
        async with pair(model, enable_prefix_caching=caching) as both:
            for asked in REQUESTS.values():
                here = await answer(both.client, asked)
                assert both.decode.handovers.stats.failed == 0
                assert here == await answer(both.prefill, asked)
            stats = both.decode.handovers.stats
            assert both.prefill.handovers.stats.held == 7
            # What the cache has is not fetched; of the shorter prompt windows need another block.
            assert stats.fetched == ({"gemma3": 2, "llama3": 1}[model] if caching else 7)
            groups, (block,) = both.decode.info.kv, {stats.bytes / stats.blocks}
            assert block == both.decode.info.kv_cache_bytes / groups.num_blocks
            await until(lambda: free(both.prefill) and free(both.decode))

    asyncio.run(run())


@pytest.mark.parametrize(
    "asked",
    [
        request(prompt=PROMPT[:7]),
        request(max_tokens=1),
        request(reuse_prefix=False),
        request(beams=BeamSearch(width=2), sampling=Sampling(beam=True, logprobs=4)),
        request(pooling="last", max_tokens=1),
    ],
    ids=["short", "one token", "prompt logprobs", "beams", "pooled"],
)
def test_what_is_not_worth_it_or_not_possible_is_computed_by_one(asked: GenerationRequest) -> None:
    async def run() -> None:
        async with pair() as both:
            assert await answer(both.client, asked) == await answer(both.decode, asked)
            assert both.prefill.handovers.stats.held == 0

    asyncio.run(run())


def test_the_first_token_may_be_the_last() -> None:
    async def run() -> None:
        async with pair() as both:
            (first,) = await answer(both.decode, request(max_tokens=1))
            stops = Sampling(temperature=0.0, stop_token_ids=first["tokens"])
            (found,) = await answer(both.client, request(sampling=stops))
            assert found["tokens"] == first["tokens"]
            assert found["end"] == "stop"
            assert both.prefill.handovers.stats.held == 0
            assert both.decode.handovers.stats.fetched == 0

    asyncio.run(run())


def test_a_client_that_leaves_in_between_leaves_nothing_behind() -> None:
    async def run() -> None:
        async with pair() as both:
            stream: Any = both.client.generate(request())
            async for _ in stream:
                break
            assert both.prefill.handovers.stats.held == 1
            await stream.aclose()
            await until(lambda: free(both.prefill) and free(both.decode))

    asyncio.run(run())


def test_a_sequence_that_has_ended_at_a_stop_string_does_not_go_on() -> None:
    async def run() -> None:
        async with pair() as both:
            asked = request(n=2, sampling=DRAWN)
            ends: list[Delta] = []
            async for deltas in both.client.generate(asked):
                if any(delta.source for delta in deltas):
                    await both.client.cancel(asked.request_id, 0)
                ends += [each for each in deltas if each.finish_reason]
            assert [(each.index, each.finish_reason) for each in ends] == [(1, "length")]
            await until(lambda: free(both.prefill) and free(both.decode))

    asyncio.run(run())


Spoil = Callable[[Pair], Awaitable[None]]


async def _let_it_expire(both: Pair) -> None:
    (seq,) = both.prefill._tracked
    both.prefill.handovers._too_late(seq)
    # The shard hears of it in the next plan.
    await answer(both.prefill, request("other", prompt=PROMPT[::-1]))


async def _lose_the_engine(both: Pair) -> None:
    both.prefill.fail("lost")


@pytest.mark.parametrize("spoil", [_let_it_expire, _lose_the_engine])
def test_what_can_not_be_fetched_is_computed(spoil: Spoil) -> None:
    async def run() -> None:
        async with pair() as both:
            whole = await answer(both.decode, request())
            async with engine(enable_prefix_caching=False) as decode:
                both.client = split(both.prefill, decode)
                tokens: list[int] = []
                async for deltas in both.client.generate(request()):
                    if any(delta.source for delta in deltas):
                        await spoil(both)
                    tokens += [token for delta in deltas for token in delta.tokens]
                assert [tokens] == [each["tokens"] for each in whole]
                if spoil is _let_it_expire:
                    assert decode.handovers.stats.failed == 1
                    assert both.prefill.handovers.stats.expired == 1
                await until(lambda: free(decode))

    asyncio.run(run())


@pytest.mark.parametrize("other", [{"block_size": 8}, {"tensor_parallel_size": 2}])
def test_replicas_unlike_each_other_compute_their_own(other: dict[str, Any]) -> None:
    async def run() -> None:
        async with engine("gemma3", **other) as prefill, engine("gemma3") as decode:
            client = split(prefill, decode)
            assert await answer(client, request()) == await answer(decode, request())
            assert decode.handovers.stats.failed == 1

    asyncio.run(run())


@pytest.mark.parametrize("layout", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_each_shard_fetches_its_part(layout: str) -> None:
    async def run() -> None:
        async with pair("gemma3", enable_prefix_caching=False, **{layout: 2}) as both:
            asked = REQUESTS["drawn"]
            assert await answer(both.client, asked) == await answer(both.prefill, asked)
            assert both.decode.handovers.stats.fetched == 1
            assert both.decode.handovers.stats.failed == 0

    asyncio.run(run())


def test_a_few_prompts_are_fetched_at_a_time_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what nobody waits for any more is not."""

    async def run() -> None:
        go = asyncio.Event()
        begun: list[int] = []

        async def wait(door: Door, source: Door, seq: int, *rest: Any) -> int:
            begun.append(seq)
            await go.wait()
            return await fetch(door, source, seq, *rest)

        monkeypatch.setattr(kv_door, "fetch", wait)
        async with pair("llama3", enable_prefix_caching=False) as both:
            names = [str(number) for number in range(8)]
            tasks = [asyncio.create_task(answer(both.client, request(name))) for name in names]
            await until(lambda: len(both.decode.scheduler._fetching) == len(names))
            await until(lambda: len(begun) == AT_ONCE)
            waiting = list(both.decode.scheduler._fetching)[AT_ONCE:]
            await both.decode.cancel(waiting[-1].sequence.request.request_id)
            assert len(begun) == AT_ONCE
            go.set()
            await asyncio.gather(*tasks)
            assert begun[AT_ONCE:] == [each.source.seq for each in waiting[:-1]]
            assert both.decode.handovers.stats.fetched == len(begun)
            await until(lambda: free(both.prefill) and free(both.decode))

    asyncio.run(run())


def test_who_waits_too_long_for_a_turn_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async def never(*rest: Any) -> int:
            raise AssertionError("there was no time left")

        monkeypatch.setattr(kv_door, "fetch", never)
        async with pair("llama3") as both:
            both.decode.handovers._seconds = -1.0
            assert await answer(both.client, request()) == await answer(both.prefill, request())
            assert both.decode.handovers.stats.failed == 1

    asyncio.run(run())


def test_nobody_gets_blocks_that_may_still_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that ends in a way nobody foresaw is a shard that failed."""

    async def run() -> None:
        async def surprise(*rest: Any) -> int:
            raise KeyError("unforeseen")

        monkeypatch.setattr(kv_door, "fetch", surprise)
        async with pair() as both:
            (found,) = await answer(both.client, request())
            assert found["end"] == "error"
            assert both.decode.failure is not None
            assert "unforeseen" in both.decode.failure

    asyncio.run(run())


def test_a_machine_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would answer no call at all; a fetch has until much later."""
    waited: list[float] = []

    def connect(address: object, timeout: float) -> socket.socket:
        waited.append(timeout)
        raise TimeoutError("no answer")

    monkeypatch.setattr(socket, "create_connection", connect)

    async def run() -> None:
        door = KVDoor(make_shard(directory("llama3"), num_blocks=8))
        try:
            gone = Door(Endpoint.new("192.0.2.1", 1), 0)
            with pytest.raises(HandoverError, match="no answer"):
                await fetch(door.renew(), gone, 7, [3], [4], 600)
        finally:
            door.close()

    asyncio.run(run())
    assert waited == [PEER_SECONDS]


def test_a_door_stays_open_when_one_caller_can_not_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "too many open files")]

    def fail_first(listener: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", fail_first)

    async def run() -> None:
        door = KVDoor(make_shard(directory("llama3"), num_blocks=8))
        try:
            own = door.renew()
            with pytest.raises(HandoverError, match="held no more"):
                await fetch(own, own, 7, [3], [4], 60)
        finally:
            door.close()

    asyncio.run(run())
    assert not failures


class GatedPages:
    """Pages of one byte a block, whose writes wait until somebody lets them."""

    page_layout = "one byte"
    block_bytes = 1

    def __init__(self, pass_gate: Callable[[], object]) -> None:
        self.pages = np.zeros(16, np.uint8)
        self._pass_gate = pass_gate

    def runs(self, seq: int) -> bool:
        return True

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        return self.pages[blocks]

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        self._pass_gate()
        self.pages[blocks] = data


@pytest.fixture
def lender() -> Iterator[tuple[KVDoor, Door]]:
    pages = GatedPages(lambda: None)
    pages.pages[:] = range(16)
    door = KVDoor(pages)
    yield door, door.renew()
    door.close()


def test_a_fetch_does_not_wait_for_what_another_one_writes(lender: tuple[KVDoor, Door]) -> None:
    met = threading.Barrier(2, timeout=60)  # each write waits for the other
    pages = GatedPages(met.wait)
    door = KVDoor(pages)
    ours, theirs = door.renew(), lender[1]

    async def run() -> None:
        await asyncio.gather(*(fetch(ours, theirs, 7, [n], [n + 1], 120) for n in (3, 8)))

    try:
        asyncio.run(run())
    finally:
        door.close()
    assert [pages.pages[4], pages.pages[9]] == [3, 8]


def test_no_life_ends_while_something_is_written_for_it(lender: tuple[KVDoor, Door]) -> None:
    written, renewed = threading.Event(), threading.Event()
    begun, go = threading.Event(), threading.Event()

    def gate() -> None:
        begun.set()
        assert go.wait(60)
        assert not renewed.is_set()
        written.set()

    door = KVDoor(GatedPages(gate))
    ours = door.renew()

    def renew() -> None:
        door.renew()
        assert written.is_set()
        renewed.set()

    async def run() -> None:
        writing = asyncio.create_task(fetch(ours, lender[1], 7, [3, 4], [5, 6], 120))
        await until(begun.is_set)
        renewing = asyncio.create_task(asyncio.to_thread(renew))
        await until(lambda: door._life.number != ours.life)
        with pytest.raises(HandoverError, match="started anew"):
            await fetch(ours, lender[1], 7, [3], [7], 60)  # nor does one begin
        go.set()
        assert await writing == 2
        await renewing

    try:
        asyncio.run(run())
    finally:
        door.close()


def test_a_doors_secret_is_its_own_and_shown_to_nobody() -> None:
    doors = [KVDoor(GatedPages(lambda: None)) for _ in range(2)]
    one, other = (door.renew() for door in doors)
    for door in doors:
        door.close()
    assert one.endpoint.secret != other.endpoint.secret
    asked = request(source=Source([one], 7, [[1]]))
    for shown in (repr(one), repr(asked), f"{Delta(0, [], source=asked.source)}"):
        assert f"Endpoint(127.0.0.1:{one.endpoint.port})" in shown
        assert "secret" not in shown
        assert repr(one.endpoint.secret)[2:-1] not in shown


def test_a_full_queue_says_so_before_anything_is_computed() -> None:
    """And what is being prefilled has its place in it."""

    async def run() -> None:
        async with pair(max_num_seqs=2, max_waiting=1) as both:
            whole = await answer(both.decode, request())
            plan, none = both.decode.scheduler.schedule, lambda: None
            both.decode.scheduler.schedule = none  # type: ignore[method-assign]
            waiting: Any = [both.decode.generate(request(f"w{i}")) for i in range(3)]
            with pytest.raises(QueueFull, match="max_waiting"):
                await answer(both.client, request())
            assert both.prefill.handovers.stats.held == 0
            await both.decode.cancel("w0")
            streams: Any = [both.client.generate(request(name)) for name in "ab"]
            first = await anext(streams[0])  # its prompt is computed; b gets its place meanwhile
            other = asyncio.create_task(anext(streams[1]))
            await until(lambda: both.decode.scheduler.unfinished == 3)
            both.decode.scheduler.schedule = plan  # type: ignore[method-assign]
            for stream, begun in zip(streams, (first, await other), strict=True):
                tokens = [token for each in begun for token in each.tokens]
                async for deltas in stream:
                    tokens += [token for each in deltas for token in each.tokens]
                assert tokens == whole[0]["tokens"]
            assert both.prefill.handovers.stats.held == 1
            for each in waiting:
                await each.aclose()
            await until(lambda: free(both.prefill) and free(both.decode))

    asyncio.run(run())


def test_what_the_replica_that_decodes_has_is_prefilled_nowhere_else() -> None:
    async def run() -> None:
        long = {"max_model_len": 256, "num_kv_blocks": 600}
        async with engine(**long) as prefill, engine(**long) as decode:
            client = split(prefill, decode, min_tokens=32)
            turn = [*range(3, 80)] * 2
            await answer(client, request("first", prompt=turn))
            assert prefill.handovers.stats.held == 1
            more = turn + PROMPT[:20]  # 128 tokens of which are known to be there
            again = request("again", prompt=more)
            assert await answer(client, again) == await answer(prefill, again)
            assert prefill.handovers.stats.held == 2
            shorter = request("shorter", prompt=more[:159])
            assert await answer(client, shorter) == await answer(prefill, shorter)
            other = request("salted", prompt=more[:159], cache_salt="other")
            assert prefill.handovers.stats.held == 2
            assert await answer(client, other) == await answer(prefill, other)
            assert prefill.handovers.stats.held == 3

    asyncio.run(run())


def test_who_prefills_not_at_all_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with pair() as both:
            whole = await answer(both.decode, request())
            assert await answer(both.client, request()) == whole
            assert not said
            both.prefill.fail("lost")
            for _ in range(3):
                assert await answer(both.client, request()) == whole

    said: list[str] = []
    monkeypatch.setattr(prefill_first.logger, "warning", lambda _, why: said.append(why))
    asyncio.run(run())
    assert said == ["lost"]  # once, not with each prompt


def test_an_engine_that_fails_in_mid_prompt_loses_nothing() -> None:
    async def run() -> None:
        async with pair() as both:
            asked = request(n=2, sampling=DRAWN)
            whole = await answer(both.decode, asked)
            task = asyncio.create_task(answer(both.client, asked))
            await until(lambda: both.prefill.scheduler.unfinished > 0)
            both.prefill.fail("lost")
            assert await task == whole

    asyncio.run(run())


def test_sequences_that_end_at_once_do_not_keep_others_held() -> None:
    async def run() -> None:
        async with pair() as both:
            (one, other) = await answer(both.decode, request(n=2, sampling=DRAWN, max_tokens=1))
            stops = msgspec.structs.replace(DRAWN, stop_token_ids=one["tokens"])
            assert one["tokens"] != other["tokens"]
            async for deltas in both.client.generate(request(n=2, sampling=stops)):
                if any(not delta.source and delta.index == 1 for delta in deltas):
                    assert not both.prefill.handovers._held

    asyncio.run(run())


def start(seq: int) -> StepPlan:
    held = SequenceStart(seq, [5, 6, 7], 3, 0, [[1]], GREEDY)
    return StepPlan(0, [seq], [3], starts=[held])


def test_shards_on_any_device_read_each_others_pages() -> None:
    """A CPU's and a GPU's, where dtype and shape are the same; and only of sequences they hold."""
    path = directory("llama3")
    cpu = make_shard(path, num_blocks=64)
    gpu = make_gpu_shard(
        path,
        num_blocks=64,
        limits=Limits(max_model_len=64, max_num_seqs=4, step_tokens=16),
        graphs=GraphSizes([], []),
    )
    assert cpu.page_layout == gpu.page_layout
    rng = np.random.default_rng(1)
    some = rng.integers(0, 255, 5 * cpu.block_bytes).astype(np.uint8)
    blocks = np.array([9, 3, 30, 31, 12], np.int32)
    gpu.write_blocks(blocks, some)
    gpu.submit(start(7))()

    async def run() -> None:
        doors = [KVDoor(cpu), KVDoor(gpu)]
        ours, theirs = (door.renew() for door in doors)
        try:
            came = await fetch(ours, theirs, 7, [3, 30], [40, 41], 60)
            assert came == 2 * cpu.block_bytes
            with pytest.raises(HandoverError, match="held no more"):
                await fetch(ours, theirs, 8, [3], [42], 60)
            stale = doors[1].renew()  # its shard has forgotten what it held
            with pytest.raises(HandoverError, match="held no more"):
                await fetch(ours, theirs, 7, [3], [42], 60)
            doors[0].renew()
            with pytest.raises(HandoverError, match="started anew"):
                await fetch(ours, stale, 7, [3], [42], 60)
        finally:
            for door in doors:
                door.close()

    asyncio.run(run())
    found = cpu.read_blocks(np.array([40, 41, 42], np.int32))
    expected = gpu.read_blocks(np.array([3, 30, 60], np.int32))
    assert np.array_equal(found, expected)
    assert found.any()


@asynccontextmanager
async def gpu_engine() -> AsyncIterator[Engine]:
    """Over a GPU shard on NumPy arrays, two steps ahead."""
    limits = Limits(max_model_len=64, max_num_seqs=8, step_tokens=24)
    shard = make_gpu_shard(directory("gemma3"), limits=limits, graphs=GraphSizes([], []))
    door, server = KVDoor(shard), ShardServer(shard)
    shard.info = msgspec.structs.replace(shard.info, doors=[door.renew()])
    link = await TcpLink.connect(server.endpoint)
    scheduler = Scheduler(link.info.kv, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=24)
    found = Engine(link, scheduler)
    await found.start()
    try:
        yield found
    finally:
        await found.close()
        door.close()
        server.close()


def test_gpu_shards_fetch_between_their_steps() -> None:
    async def run() -> None:
        async with gpu_engine() as prefill, gpu_engine() as decode:
            client = split(prefill, decode)
            many = [
                request(str(i), DRAWN, prompt=PROMPT[i:] + PROMPT[:i], max_tokens=25)
                for i in range(10)
            ]
            alone = await asyncio.gather(*(answer(prefill, each) for each in many))
            apart = await asyncio.gather(*(answer(client, each) for each in many))
            assert apart == alone
            assert decode.handovers.stats.fetched == len(many)
            await until(lambda: free(prefill) and free(decode))

    asyncio.run(run())


def test_a_source_that_nobody_answers_for_is_given_up_in_time() -> None:
    async def run() -> None:
        async with pair(enable_prefix_caching=False) as both:
            doors = [msgspec.structs.replace(each, life=0) for each in both.prefill.info.doors]
            blocks = [[1, 2] for _ in both.prefill.info.kv.windows]
            asked = request(source=Source(doors, 0, blocks))
            assert await answer(both.decode, asked) == await answer(both.prefill, request())
            assert both.decode.handovers.stats.failed == 1

    asyncio.run(run())
