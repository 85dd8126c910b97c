"""The engine's loop over the null device: streams, cancellation, failure."""

from __future__ import annotations

import asyncio

import pytest

from tensorray.actors.link import LocalLink, ShardError
from tensorray.actors.null_shard import NullShard
from tensorray.actors.protocol import KVGroups, Sampling, ShardInfo, StepPlan, StepResult
from tensorray.cluster.engine import Engine, EngineFailed
from tensorray.cluster.request import Delta, GenerationRequest, QueueFull, RequestRefused, Resumed
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


class CountingLink(LocalLink):
    """Counts the plans that were sent, and keeps them."""

    def __init__(self, executor, **options) -> None:
        super().__init__(executor, **options)
        self.plans: list[StepPlan] = []

    def send(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        super().send(plan)


def make_engine(*, step_ms=0.0, inline=True, depth=1, executor=None, **scheduling) -> Engine:
    options = {"max_num_seqs": 32, "max_num_batched_tokens": 64, **scheduling}
    return Engine(
        CountingLink(executor or NullShard(INFO, step_ms), inline=inline),
        Scheduler(INFO.kv, max_model_len=INFO.max_model_len, **options),
        depth=depth,
    )


@pytest.fixture(params=["inline", "thread", "two in flight"])
async def engine(request):
    engine = make_engine(
        inline=request.param == "inline", depth=2 if request.param == "two in flight" else 1
    )
    await engine.start()
    yield engine
    await engine.close()


def request(name: str, prompt_len: int = 8, max_tokens: int = 8, **fields) -> GenerationRequest:
    fields.setdefault("sampling", Sampling(seed=3))
    return GenerationRequest(name, list(range(1, prompt_len + 1)), max_tokens=max_tokens, **fields)


async def collect(stream) -> list[Delta]:
    return [delta async for deltas in stream for delta in deltas]


def tokens(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.tokens]


async def test_a_stream_brings_every_token_once_and_ends(engine):
    deltas = await collect(engine.generate(request("a")))
    assert len(tokens(deltas)) == 8
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    again = await collect(engine.generate(request("a")))
    assert tokens(again) == tokens(deltas)
    assert again[0].cached_tokens == 4  # one full block; the prompt's last token is computed


async def test_n_sequences_draw_with_seeds_of_their_own(engine):
    deltas = await collect(engine.generate(request("a", n=3)))
    alone = await collect(engine.generate(request("b", sampling=Sampling(seed=5))))
    assert len(tokens(deltas, 0)) == 8
    assert tokens(deltas, 0) != tokens(deltas, 1)
    assert tokens(deltas, 2) == tokens(alone)  # seed 3 + index 2


async def test_prompt_logprobs_come_once_each_whatever_the_chunks(engine):
    sampling = Sampling(prompt_logprobs=0, logprobs=0)
    deltas = await collect(
        engine.generate(request("a", prompt_len=150, sampling=sampling, reuse_prefix=False))
    )
    scored = [entry.token for delta in deltas for entry in delta.prompt_logprobs]
    assert scored == list(range(2, 151))
    chosen = [entry.token for delta in deltas for entry in delta.logprobs]
    assert chosen == tokens(deltas)


async def test_a_reader_that_lags_gets_everything_at_once(engine):
    stream = engine.generate(request("a", max_tokens=20))
    other = engine.generate(request("b", max_tokens=40))
    await collect(other)
    first = await anext(stream)
    assert len(first) == 1
    assert len(first[0].tokens) == 20
    assert first[0].finish_reason == "length"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_reader_of_the_whole_is_woken_at_the_end_alone(engine):
    deltas = engine.generate(request("a", max_tokens=20, whole=True))
    other = engine.generate(request("b", max_tokens=5))
    assert tokens(await collect(other))  # steps have run, and nobody was woken for "a"
    assert not deltas._ready.is_set()
    (only,) = [delta async for found in deltas for delta in found]
    assert len(only.tokens) == 20
    assert only.finish_reason == "length"


async def test_cancel_frees_the_blocks_within_two_steps(engine):
    stream = engine.generate(request("a", prompt_len=100, max_tokens=150))
    await anext(stream)
    steps = len(engine._link.plans)
    await engine.cancel("a")
    stats = engine.scheduler.stats()
    assert len(engine._link.plans) - steps <= 2
    assert stats.free_blocks == stats.total_blocks
    rest = await collect(stream)
    assert rest[-1].finish_reason == "abort"
    await engine.cancel("a")  # again, and of what never was: no harm
    await engine.cancel("nobody")
    assert len(tokens(await collect(engine.generate(request("b"))))) == 8


async def test_cancelling_one_of_n_leaves_the_others(engine):
    stream = engine.generate(request("a", n=2, max_tokens=100))
    await anext(stream)
    await engine.cancel("a", 0)
    deltas = await collect(stream)
    reasons = {delta.index: delta.finish_reason for delta in deltas if delta.finish_reason}
    assert reasons == {0: "abort", 1: "length"}


async def test_a_refused_request_leaves_nothing_behind(engine):
    with pytest.raises(RequestRefused, match="max_model_len"):
        engine.generate(request("a", prompt_len=256))
    assert engine.scheduler.unfinished == 0
    assert len(tokens(await collect(engine.generate(request("a"))))) == 8


async def test_siblings_beyond_the_queue_are_refused_together():
    engine = make_engine(max_num_seqs=2, max_waiting=2)
    with pytest.raises(QueueFull):
        engine.generate(request("a", n=5))
    assert engine.scheduler.unfinished == 0


async def test_a_short_request_overtakes_fifteen_long_ones():
    engine = make_engine()
    long = [engine.generate(request(f"long-{i}", 4, 200)) for i in range(15)]
    await engine.start()
    for stream in long:
        await anext(stream)
    before = len(engine._link.plans)
    short = engine.generate(request("short", 40, 4))
    await anext(short)
    assert len(engine._link.plans) - before <= 3
    await collect(short)
    assert engine.scheduler.unfinished == 15
    await engine.close()


class DyingShard(NullShard):
    def execute(self, plan: StepPlan) -> StepResult:
        if plan.step == 3:
            raise MemoryError("out of luck")
        return super().execute(plan)


@pytest.mark.parametrize("inline", [True, False])
async def test_a_failed_shard_ends_every_stream_with_its_reason(inline):
    engine = make_engine(executor=DyingShard(INFO), inline=inline)
    await engine.start()
    streams = [engine.generate(request(name)) for name in "ab"]
    for stream in streams:
        deltas = await collect(stream)
        assert deltas[-1].finish_reason == "error"
        assert "MemoryError: out of luck" in deltas[-1].error
    assert "out of luck" in engine.failure
    with pytest.raises(EngineFailed, match="out of luck"):
        engine.generate(request("c"))
    await engine.close()


async def test_closing_ends_what_runs():
    engine = make_engine(step_ms=5, inline=False)
    await engine.start()
    stream = engine.generate(request("a", max_tokens=200))
    await anext(stream)
    await engine.close()
    assert (await collect(stream))[-1].finish_reason == "abort"


async def test_a_link_that_breaks_at_send_is_a_failure_not_a_hang():
    class BrokenLink(LocalLink):
        def send(self, plan: StepPlan) -> None:
            raise ShardError("the wire is cut")

    engine = Engine(
        BrokenLink(NullShard(INFO)),
        Scheduler(
            INFO.kv, max_model_len=INFO.max_model_len, max_num_seqs=4, max_num_batched_tokens=64
        ),
    )
    await engine.start()
    deltas = await asyncio.wait_for(collect(engine.generate(request("a"))), 60)
    assert "the wire is cut" in deltas[-1].error
    await engine.close()


async def test_a_shard_that_hangs_is_found_by_the_health_check():
    engine = make_engine(inline=False, step_ms=1000)
    await engine.start()
    engine.check(0.05)  # idle for any time is fine
    stream = engine.generate(request("a"))
    while engine.waits < 0.1:
        await asyncio.sleep(0.01)
    engine.check(60.0)
    with pytest.raises(EngineFailed, match="not answered a step"):
        engine.check(0.05)
    assert [delta.finish_reason for delta in await collect(stream)] == ["error"]
    await engine.close()


class Mortal(NullShard):
    """Dies in the steps it is told to, by their number."""

    def __init__(self, *deaths: int, victim: int | None = None) -> None:
        super().__init__(INFO)
        self.deaths = set(deaths)
        self.victim = victim  # a prompt's first token that is its death, each time

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.step in self.deaths:
            raise MemoryError("out of luck")
        for start in plan.starts:
            if start.tokens[0] == self.victim:
                raise MemoryError("out of luck again")
        return super().execute(plan)


def recovering_engine(shard: Mortal, *, depth: int = 1) -> Engine:

    async def recover(error: ShardError, tell) -> CountingLink:
        tell(f"rank 0: {error}, says Ray")
        await asyncio.sleep(0.02)
        assert engine.recovering.endswith("says Ray")
        shard.reset()
        return CountingLink(shard, inline=True)

    engine = Engine(
        CountingLink(shard, inline=True),
        Scheduler(
            INFO.kv, max_model_len=INFO.max_model_len, max_num_seqs=4, max_num_batched_tokens=64
        ),
        depth=depth,
        recover=recover,
    )
    return engine


@pytest.mark.parametrize("depth", [1, 2])
async def test_requests_outlive_their_shard(depth):
    """Running, waiting and new ones; tokens as if nothing had happened."""
    whole = make_engine()
    await whole.start()
    names = [f"r{i}" for i in range(7)]
    streams = [whole.generate(request(name, 5 + i, 12)) for i, name in enumerate(names)]
    expected = [tokens(await collect(stream)) for stream in streams]
    await whole.close()

    engine = recovering_engine(Mortal(0, 4, 5, 17), depth=depth)
    await engine.start()
    streams = [engine.generate(request(name, 5 + i, 12)) for i, name in enumerate(names)]
    found = await asyncio.gather(*map(collect, streams))
    assert [tokens(deltas) for deltas in found] == expected
    assert engine.failure is None
    assert engine.recovering is None
    stats = engine.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks
    await engine.close()


async def test_what_shards_keep_dying_of_is_given_up():
    engine = recovering_engine(Mortal(victim=9))
    await engine.start()
    poison = GenerationRequest("poison", [9, 9, 9], Sampling(), 5)
    deltas = await asyncio.wait_for(collect(engine.generate(poison)), 60)
    assert deltas[-1].finish_reason == "error"
    assert "3 steps that failed" in deltas[-1].error
    assert len(tokens(await collect(engine.generate(request("fine"))))) == 8
    await engine.close()


async def test_shards_that_can_not_be_put_right_fail_the_engine():
    async def recover(error, tell):
        raise ShardError("no room in the cluster")

    engine = Engine(
        CountingLink(Mortal(2), inline=True),
        Scheduler(
            INFO.kv, max_model_len=INFO.max_model_len, max_num_seqs=4, max_num_batched_tokens=64
        ),
        recover=recover,
    )
    await engine.start()
    deltas = await asyncio.wait_for(collect(engine.generate(request("a"))), 60)
    assert "out of luck" in deltas[-1].error
    assert "no room in the cluster" in deltas[-1].error
    with pytest.raises(EngineFailed, match="no room"):
        engine.check(60)
    await engine.close()


async def test_a_cancelled_request_stays_cancelled_while_shards_are_away():
    engine = recovering_engine(Mortal(3))
    await engine.start()
    streams = [engine.generate(request(name, max_tokens=30)) for name in "ab"]
    while engine.recovering is None:
        await asyncio.sleep(0)
    await engine.cancel("a")
    first, second = await asyncio.gather(*map(collect, streams))
    assert first[-1].finish_reason == "abort"
    assert len(tokens(second)) == 30
    await engine.close()


async def test_a_request_that_another_engine_began_goes_on():
    engine = make_engine()
    await engine.start()
    whole = await collect(engine.generate(request("a", n=3, max_tokens=20)))
    resumed = [Resumed(0, tokens(whole, 0)[:7]), Resumed(2, tokens(whole, 2)[:19])]
    rest = await collect(engine.generate(request("b", n=3, max_tokens=20, resumed=resumed)))
    assert tokens(rest, 0) == tokens(whole, 0)[7:]
    assert tokens(rest, 1) == []
    assert tokens(rest, 2) == tokens(whole, 2)[19:]
    assert [delta.finish_reason for delta in rest if delta.finish_reason] == ["length"] * 2
    await engine.close()
