"""Guessed tokens on the GPU shard, on NumPy arrays: they save steps and change no token."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from helpers.draft_cases import Ahead, alone, assert_like_the_cpu, scheduler, texts
from helpers.gpu_shards import StepwiseShard, make_gpu_shard
from helpers.host_device import HostDevice
from helpers.oracle import Oracle
from helpers.running import Arrival, run, sequence
from helpers.shard_ranks import ShardRanks
from helpers.tiny_models import directory

from tensorray.actors.config import ShardConfig
from tensorray.actors.device_drafts import DeviceDrafts, Guesses, fitting, with_drafts
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.drafter import Drafter
from tensorray.actors.gpu_shard import GpuShard, GraphSizes, Limits
from tensorray.actors.lookup_drafter import LookupDrafter
from tensorray.actors.protocol import Drafting, Logprobs, Sampling, SequenceStart, StepPlan
from tensorray.actors.speculative_config import parse_speculative_config
from tensorray.actors.step_buffers import RunningSequences
from tensorray.builder.model import Layout

LIMITS = Limits(max_model_len=64, max_num_seqs=8, step_tokens=40)
EAGER = GraphSizes([], [])
DRAFTING = Drafting(max_tokens=4, row_cost=0.01, draft_cost=0.0, wait_cost=0.1)


def drafts(drafter: Drafter | None, **changes: Any) -> DeviceDrafts:
    how = {"max_tokens": 4, "row_cost": 0.01, "draft_cost": 0.0, "wait_cost": 0.1} | changes
    return DeviceDrafts(drafter, Drafting(**how), measured=True)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-moe", "gpt2"])
def test_prompt_lookup_changes_no_token(name: str) -> None:
    shard = make_gpu_shard(directory(name), limits=LIMITS, drafts=drafts(LookupDrafter(1, 5)))
    _, plans = assert_like_the_cpu(name, shard)
    stats = plans.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens  # some were wrong, and left no trace


@pytest.mark.parametrize("graphs", [None, EAGER, GraphSizes([8], [40], [4])], ids=str)
def test_whatever_is_guessed_changes_no_token(graphs: GraphSizes | None) -> None:
    wrong = Random(3)
    oracle = Oracle(texts("gemma3"), lambda seq, place: wrong.random() < 0.3)
    shard = make_gpu_shard(
        directory("gemma3"), limits=LIMITS, graphs=graphs, drafts=drafts(oracle, max_tokens=7)
    )
    _, plans = assert_like_the_cpu("gemma3", shard)
    stats = plans.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens


def test_preemption_and_reuse_change_no_token_either() -> None:
    wrong = Random(5)
    oracle = Oracle(texts("llama3"), lambda seq, place: wrong.random() < 0.2)
    shard = make_gpu_shard(directory("llama3"), limits=LIMITS, num_blocks=34, drafts=drafts(oracle))
    _, plans = assert_like_the_cpu("llama3", shard)
    assert plans.stats().preemptions > 0
    assert plans.stats().accepted_tokens > 0


def ranks(name: str, drafter: Drafter, **settings: Any) -> ShardRanks:
    """Two tensor-parallel shards, the first of which guesses."""
    return ShardRanks(
        2,
        lambda layout: make_gpu_shard(
            directory(name),
            limits=LIMITS,
            layout=layout,
            drafts=drafts(drafter if layout.rank == layout.sampler else None),
            **settings,
        ),
    )


def test_all_ranks_run_the_drafts_of_the_one_that_samples() -> None:
    shards = ranks("gemma3", LookupDrafter(1, 5), graphs=GraphSizes([8], [40], [4, 12]))
    _, plans = assert_like_the_cpu("gemma3", shards)
    stats = plans.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens


def test_ranks_agree_on_wrong_guesses_through_preemption_and_a_new_start() -> None:
    name = "llama3"
    wrong = Random(5)
    oracle = Oracle(texts(name), lambda seq, place: wrong.random() < 0.2)
    shards = ranks(name, oracle, num_blocks=34, graphs=GraphSizes([8], [40], [4, 12]))
    for _ in range(2):
        _, plans = assert_like_the_cpu(name, shards)
        assert plans.stats().preemptions > 0
        assert plans.stats().accepted_tokens > 0
        first, second = (shard._running.computed for shard in shards.shards)
        assert (first == second).all()
        shards.join()


def test_right_guesses_save_steps() -> None:
    name, only = "llama3", (0, 1, 2, 3, 4, 7)
    plain, _ = assert_like_the_cpu(name, make_gpu_shard(directory(name), limits=LIMITS), only)
    shard = make_gpu_shard(directory(name), limits=LIMITS, drafts=drafts(Oracle(texts(name))))
    ahead, plans = assert_like_the_cpu(name, shard, only)
    stats = plans.stats()
    assert stats.accepted_tokens == stats.draft_tokens
    assert stats.draft_tokens > 0.5 * sum(len(alone(name, i)[0]) for i in only)
    assert ahead.steps < 0.6 * plain.steps


def test_a_steered_sequence_has_no_guesses_and_tells_that_there_was_room() -> None:
    shard = make_gpu_shard(
        directory("llama3"), limits=LIMITS, drafts=drafts(Oracle(texts("llama3")))
    )
    ahead, _ = assert_like_the_cpu("llama3", shard)
    counts: dict[int, set[bool]] = {}
    for result in ahead.results:
        for seq, drafted in result.drafted.items():
            counts.setdefault(seq, set()).add(drafted > 0)
    assert counts[5] == {False}
    assert True in counts[0]


def logprobs_of(guessing: bool) -> tuple[list[int], list[Logprobs], bool]:
    path = directory("llama3")
    sampling = Sampling(temperature=0.8, seed=3, logprobs=3, stop_token_ids=[1], min_tokens=9)
    arrival = Arrival(0, [20, 21, 22, 23] * 5, sampling, 30)
    plain = make_gpu_shard(path, limits=LIMITS)
    (text,) = run(plain, scheduler(plain), [arrival])
    oracle = Oracle([arrival.prompt + text.tokens], lambda seq, place: place % 5 == 0)
    shard = make_gpu_shard(path, limits=LIMITS, drafts=drafts(oracle) if guessing else None)
    ahead, plans = Ahead(shard), scheduler(shard)
    plans.add(sequence(0, arrival))
    tokens: list[int] = []
    entries: list[Logprobs] = []
    while plans.unfinished:
        for gain in plans.update(ahead.execute(plans.schedule())):
            assert gain.token is not None
            assert gain.logprobs is not None
            tokens.append(gain.token)
            entries.append(gain.logprobs)
    return tokens, entries, any(result.further_logprobs for result in ahead.results)


def test_logprobs_are_those_without_guesses() -> None:
    tokens, entries, _ = logprobs_of(False)
    ours, our_entries, further = logprobs_of(True)
    assert further
    assert ours == tokens == [entry.token for entry in our_entries]
    for our, plain in zip(our_entries, entries, strict=True):
        assert (our.rank, our.top_tokens) == (plain.rank, plain.top_tokens)
        assert our.top_logprobs == pytest.approx(plain.top_logprobs, abs=1e-5)


def test_a_new_router_finds_no_guesses_of_the_old_one_s() -> None:
    shard = make_gpu_shard(directory("llama3"), limits=LIMITS, drafts=drafts(LookupDrafter(1, 5)))
    for _ in range(2):  # the same ids again
        assert_like_the_cpu("llama3", shard)
        shard.reset()


def test_costs_are_what_steps_take() -> None:
    found = DeviceDrafts(LookupDrafter(2, 5), DRAFTING)
    found.price({1: 4e-3, 16: 4.6e-3}, {})
    assert found.drafting.row_cost == pytest.approx(0.01)
    assert found.drafting.wait_cost == pytest.approx(0.35 / 4)
    assert found.drafting.sequence_cost == pytest.approx(0.04 / 4)
    assert found.drafting.round_cost == pytest.approx(0.045 / 4)
    found.price({1: 1e-3, 16: 0.9e-3}, {})  # more rows never pay for themselves
    assert found.drafting.row_cost > 0
    before = found.drafting
    found.price({1: 1e-3}, {})
    assert found.drafting == before
    # A draft model's step is for all who guess; what it takes for each of them is little more.
    found.price({1: 4e-3, 16: 4.6e-3}, {1: 0.7e-3, 16: 0.85e-3})
    assert found.drafting.round_cost == pytest.approx((0.045 + 0.7 + 0.05) / 4)
    assert found.drafting.draft_cost == pytest.approx(0.01 / 4)


def test_costs_of_ranks_are_found_once_they_have_met() -> None:
    def make(layout: Layout) -> StepwiseShard:
        drafter = LookupDrafter(2, 5) if layout.rank == layout.sampler else None
        shard = make_gpu_shard(
            directory("llama3"),
            limits=LIMITS,
            layout=layout,
            graphs=GraphSizes([], [], [1, 16]),
            drafts=DeviceDrafts(drafter, DRAFTING),
        )
        assert shard.info.drafting == DRAFTING
        return shard

    found = ShardRanks(2, make).info.drafting
    assert found is not None
    assert found.round_cost > 0


def test_a_prompt_s_last_token_stays_with_its_sequence() -> None:
    """A step that is like one of decodes, where one who guesses comes after one who prefills."""
    running = RunningSequences(4, 1, 8)
    starts = [SequenceStart(seq, [9] * 3, 3, 0, [[1 + seq]], Sampling()) for seq in range(2)]
    running.take(StepPlan(0, [0, 1], [2, 3], starts=starts))
    step = running.take(StepPlan(1, [0, 1], [1, 1]))
    assert step.is_decode
    assert step.given is not None
    found = with_drafts(step, Guesses([1], {1: [7]}), running)
    assert found.is_decode
    assert found.given is not None
    rows = [running.rows[seq] for seq in (1, 0, 1)]
    assert found.rows.tolist() == found.sample_rows.tolist() == rows
    assert found.lens.tolist() == [4, 3, 5]
    assert found.given.tolist() == [-1, 9, 7]


def test_at_most_so_many_guesses_run_in_a_step() -> None:
    assert drafts(LookupDrafter(1, 5), max_tokens=7).most(8) == 56
    assert drafts(LookupDrafter(1, 5), max_tokens=7).most(256) == 64
    # Too many are cut to the same length.
    guessing = drafts(Oracle([[9] * 30]), max_tokens=7)
    running = RunningSequences(16, 1, 8)
    sampler = DeviceSampler(HostDevice(), 32, 16)
    starts = [SequenceStart(seq, [9] * (1 + seq), 1, 0, [[]], Sampling()) for seq in range(16)]
    for start in starts:
        sampler.start(start, start.seq)
    prompts = StepPlan(0, [*range(16)], [1 + seq for seq in range(16)], starts=starts)
    running.take(guessing.take(prompts, running, sampler, None)[0])
    room = StepPlan(1, [*range(16)], [8 if seq else 3 for seq in range(16)])
    plan, found = guessing.take(room, running, sampler, None)
    assert plan.counts == [1] * 16
    assert found is not None
    assert found.counts == {seq: 4 if seq else 2 for seq in range(16)}
    assert [*found.tokens][-1] == 0
    assert [len(each) for each in found.rounds] == [16, 16, 15, 15]
    # Of too many sequences those that have most room have one each.
    rooms = {seq: 3 if 5 <= seq < 66 else 2 for seq in range(80)}
    cut = fitting({seq: [7, 8] for seq in rooms}, rooms)
    assert cut == {seq: [7] for seq in [0, 1, 2, *range(5, 66)]}

    sizes = GraphSizes.choose(Limits(64, 256, 2048), (), eager=False, drafts=64)
    assert sizes.chains == [1, 2, 4, 8, 16, 32, 64, 128]
    assert GraphSizes.choose(LIMITS, (4, 12, 99), eager=False, drafts=8).chains == [4, 12]
    assert not GraphSizes.choose(LIMITS, (), eager=False).chains


@pytest.mark.parametrize(
    ("how", "settings", "message"),
    [
        ({"method": "eagle", "model": "x"}, {}, "'eagle' is for CPUs so far"),
        ({"method": "eagle3", "model": "x"}, {}, "'eagle3' is for CPUs so far"),
        ({"method": "ngram"}, {"pipeline_parallel_size": 2}, "set --pipeline-parallel-size to 1"),
    ],
)
def test_what_gpus_can_not_do_is_refused(
    how: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    config = ShardConfig(
        str(directory("llama3")), speculative_config=parse_speculative_config(how), **settings
    )
    with pytest.raises(ValueError, match=message):
        GpuShard.load(config)
