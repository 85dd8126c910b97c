"""The scheduler's rules, one by one."""

from __future__ import annotations

import itertools

import pytest
from helpers.content_shard import generate_alone
from helpers.scheduling import Rig

from tensorray.actors.protocol import KVGroups, Logprobs, Sampling, StepPlan, StepResult
from tensorray.cluster.request import BeamSearch, GenerationRequest, QueueFull, RequestRefused
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.sequence import Sequence, Status


def counts(plan: StepPlan | None) -> dict[int, int]:
    """Tokens per sequence."""
    assert plan is not None
    return dict(zip(plan.seqs, plan.counts, strict=True))


def tokens(first: int, count: int) -> list[int]:
    """A prompt that shares no page with those starting elsewhere."""
    return list(range(first * 10_000, first * 10_000 + count))


# --- the course of a sequence ---------------------------------------------------------------


def test_a_prompt_runs_in_chunks_and_then_a_token_a_step() -> None:
    rig = Rig(max_num_seqs=4, max_num_batched_tokens=10)
    prompt = tokens(1, 24)
    seq = rig.add(prompt, max_tokens=3)
    plan = rig.schedule()
    assert plan is not None
    (start,) = plan.starts
    assert (start.seq, start.tokens, start.prompt_len, start.computed) == (seq, prompt, 24, 0)
    assert len(start.blocks[0]) == 6
    seen = [counts(plan)]
    assert rig.update() == []
    for _ in range(4):
        seen.append(counts(rig.schedule()))
        rig.update()
    assert seen == [{seq: 10}, {seq: 10}, {seq: 4}, {seq: 1}, {seq: 1}]
    assert rig.finished == {seq: "length"}
    assert rig.outputs[seq] == generate_alone(prompt, Sampling(), 3)
    assert rig.schedule() is None


def test_blocks_are_announced_when_a_decode_enters_them() -> None:
    rig = Rig([None, 6])
    seq = rig.add(tokens(1, 7), max_tokens=8)
    added = []
    while rig.scheduler.unfinished:
        plan = rig.schedule()
        assert plan is not None
        added.append([len(blocks) for blocks in plan.new_blocks.get(seq, [])])
        rig.update()
    # The tokens at 7 and at 8..11 and at 12, 13; the 8 sampled ones but the last are computed.
    assert added == [[], [], [1, 1], [], [], [], [1, 1], []]


def test_decodes_go_first_and_prefills_share_what_is_left() -> None:
    rig = Rig(max_num_seqs=4, max_num_batched_tokens=12)
    decoding = [rig.add(tokens(i, 3), max_tokens=50) for i in range(2)]
    rig.step()
    long = rig.add(tokens(5, 100))
    longer = rig.add(tokens(6, 200))
    plan = counts(rig.schedule())
    assert [plan[seq] for seq in decoding] == [1, 1]
    # Half of the ten for the older; the other half for the one with less left: the same one.
    assert plan == {decoding[0]: 1, decoding[1]: 1, long: 10}
    assert longer not in plan
    stats = rig.scheduler.stats()
    assert (stats.decode_tokens, stats.prefill_tokens) == (2, 10)
    assert (stats.running, stats.waiting) == (4, 0)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_short_request_passes_long_ones_that_generate(depth: int) -> None:
    rig = Rig(max_num_seqs=16, max_num_batched_tokens=64, depth=depth)
    long = [rig.add(tokens(i, 40), max_tokens=60) for i in range(15)]
    while len(rig.first_token_step) < 15:
        rig.step()
    arrival = rig.steps
    short = rig.add(tokens(20, 30), max_tokens=5)
    rig.run()
    assert rig.first_token_step[short] - arrival <= 3
    assert rig.end_step[short] < min(rig.end_step[seq] for seq in long)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_short_request_passes_long_ones_that_prefill(depth: int) -> None:
    rig = Rig(num_blocks=5000, max_num_batched_tokens=64, depth=depth)
    long = [rig.add(tokens(i, 500), max_tokens=5) for i in range(15)]
    for _ in range(4):
        rig.step()
    arrival = rig.steps
    short = rig.add(tokens(20, 30), max_tokens=5)
    rig.run()
    assert rig.first_token_step[short] - arrival <= 3
    assert rig.end_step[short] < min(rig.end_step[seq] for seq in long)
    # And the long ones finish their prompts one after the other rather than all at the end.
    first_tokens = [rig.first_token_step[seq] for seq in long]
    assert first_tokens == sorted(first_tokens)


def test_short_prompts_do_not_starve_a_long_one() -> None:
    rig = Rig(max_num_seqs=8, max_num_batched_tokens=32)
    long = rig.add(tokens(99, 320), max_tokens=2)
    for i in range(200):
        rig.add(tokens(i, 32), max_tokens=1)
    rig.run()
    # At least half of each step's tokens were its own.
    assert rig.first_token_step[long] <= 20


# --- ends ------------------------------------------------------------------------------------


def alone(**options: object) -> tuple[Rig, int, list[int]]:
    """A rig with one sequence, and what it would generate in ten tokens."""
    rig = Rig()
    prompt = tokens(1, 5)
    seq = rig.add(prompt, **options)  # type: ignore[arg-type]
    return rig, seq, generate_alone(prompt, Sampling(), 10)


def test_a_stop_token_ends_and_is_reported() -> None:
    _, _, generated = alone()
    stop = generated[3]
    rig, seq, _ = alone(max_tokens=10, stop_token_ids=[stop])
    while not rig.finished:
        (gain,) = rig.step()
    assert (gain.finish_reason, gain.stop_token, gain.token) == ("stop", stop, stop)
    assert rig.outputs[seq] == generated[: generated.index(stop) + 1]


def test_a_stop_token_counts_from_min_tokens_on() -> None:
    scheduler = Rig().scheduler
    sampling = Sampling(stop_token_ids=[7], min_tokens=2)
    scheduler.add(Sequence(0, GenerationRequest("r", [1, 2], sampling, 10), sampling))
    reasons = []
    for step in range(3):
        assert scheduler.schedule() is not None
        (gain,) = scheduler.update(StepResult(step, [0], [7]))
        reasons.append(gain.finish_reason)
    assert reasons == [None, None, "stop"]


def test_a_stop_token_at_the_last_place_is_a_stop() -> None:
    _, _, generated = alone()
    rig, seq, _ = alone(max_tokens=1, stop_token_ids=generated[:1])
    rig.run()
    assert rig.finished == {seq: "stop"}


def test_the_context_length_ends_a_sequence() -> None:
    rig = Rig(max_model_len=12)
    seq = rig.add(tokens(1, 9), max_tokens=100)
    rig.run()
    assert rig.finished == {seq: "length"}
    assert len(rig.outputs[seq]) == 3


def test_ends_reach_the_shard_with_the_next_plan() -> None:
    rig = Rig()
    first = rig.add(tokens(1, 5), max_tokens=1)
    rig.step()
    assert rig.schedule() is None
    assert first in rig.shard.states
    rig.add(tokens(2, 5), max_tokens=1)
    plan = rig.schedule()
    assert plan is not None
    assert plan.ends == [first]
    assert first not in rig.shard.states


def test_a_failed_sequence_ends_with_the_reason_and_leaves_nothing_cached() -> None:
    rig = Rig()
    prompt = tokens(1, 20)
    seq = rig.add(prompt)
    rig.schedule(fail=[seq])
    (gain,) = rig.update()
    assert (gain.finish_reason, gain.error, gain.token) == ("error", "broken on purpose", None)
    stats = rig.scheduler.stats()
    assert (stats.running, stats.cached_blocks, stats.free_blocks) == (0, 0, stats.total_blocks)
    again = rig.add(prompt)
    rig.run()
    assert rig.sequences[again].cached_tokens == 0
    rig.check_outputs()


# --- cancelling ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelling_frees_all_blocks_at_once(steps: int) -> None:
    rig = Rig([None, 8], max_num_batched_tokens=64, max_num_seqs=4)
    seq = rig.add(tokens(1, 100), max_tokens=50)
    for _ in range(steps):
        rig.step()
    assert rig.scheduler.cancel(seq)
    stats = rig.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks
    assert (stats.running, stats.waiting) == (0, 0)
    assert not rig.scheduler.cancel(seq)
    other = rig.add(tokens(2, 5))
    plan = rig.schedule()
    assert plan is not None
    assert plan.ends == ([seq] if steps else [])
    rig.finished[seq] = "abort"
    rig.run()
    assert rig.finished[other] == "length"


def test_results_on_the_way_for_a_cancelled_sequence_are_dropped() -> None:
    rig = Rig(depth=2)
    stay, leave = rig.add(tokens(1, 5)), rig.add(tokens(2, 5))
    rig.step()
    rig.schedule()
    rig.cancel(leave)
    while rig.in_flight:
        assert [gain.sequence.seq for gain in rig.update()] == [stay]
    rig.run()
    rig.check_outputs()


# --- plans ahead of results ------------------------------------------------------------------


def test_decodes_are_planned_before_their_token_is_known() -> None:
    rig = Rig(depth=3)
    seq = rig.add(tokens(1, 5), max_tokens=5)
    assert [counts(rig.schedule()) for _ in range(3)] == [{seq: 5}, {seq: 1}, {seq: 1}]
    assert rig.sequences[seq].output_len == 0


def test_nothing_is_planned_past_the_last_token() -> None:
    rig = Rig(depth=9)
    seq = rig.add(tokens(1, 5), max_tokens=3)
    plans = [counts(rig.schedule()) for _ in range(3)]
    assert plans == [{seq: 5}, {seq: 1}, {seq: 1}]
    assert rig.schedule() is None
    assert rig.scheduler.unfinished == 1
    assert rig.scheduler.in_flight == 3
    while rig.in_flight:
        rig.update()
    assert rig.finished == {seq: "length"}


def test_a_step_planned_past_a_stop_is_dropped() -> None:
    _, _, generated = alone()
    rig, seq, _ = alone(max_tokens=10, stop_token_ids=generated[1:2])
    stop = generated.index(generated[1])
    for _ in range(stop + 2):
        rig.schedule()
    for _ in range(stop + 1):
        rig.update()
    assert rig.finished == {seq: "stop"}
    assert rig.update() == []
    rig.check_released()


def test_results_must_come_in_order() -> None:
    rig = Rig()
    rig.add(tokens(1, 5))
    assert rig.scheduler.schedule() is not None
    assert rig.scheduler.schedule() is not None
    with pytest.raises(ValueError, match="step 1 out of order, expected 0"):
        rig.scheduler.update(StepResult(1, [0], [5]))
    rig.scheduler.update(StepResult(0, [0], [5]))
    rig.scheduler.update(StepResult(1, [0], [5]))
    with pytest.raises(ValueError, match="expected none"):
        rig.scheduler.update(StepResult(2, [0], [5]))


# --- preemption ------------------------------------------------------------------------------


def crowded(depth: int = 1, **options: object) -> tuple[Rig, list[int]]:
    """Three sequences that fit at first and not to their ends."""
    rig = Rig(num_blocks=1 + 16, depth=depth, **options)  # type: ignore[arg-type]
    return rig, [rig.add(tokens(i, 8), max_tokens=24) for i in range(3)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_last_admitted_yields_and_goes_on_where_it_was(depth: int) -> None:
    rig, (first, second, third) = crowded(depth)
    rank = []
    while not rig.finished:
        before = rig.scheduler.stats().preemptions
        rig.step()
        if rig.scheduler.stats().preemptions > before:
            rank += [s.seq for s in rig.sequences.values() if s.status.value == "waiting"]
    assert rank[0] == third
    assert first not in rank
    restarts = []
    while rig.scheduler.unfinished:
        plan = rig.schedule() if rig.in_flight < depth else None
        restarts += plan.starts if plan else []
        if rig.in_flight:
            rig.update()
    assert {start.seq for start in restarts} <= {second, third}
    start = next(start for start in restarts if start.seq == third)
    assert start.prompt_len == 8
    assert len(start.tokens) > 8  # its generated tokens came along
    rig.check_outputs()
    assert rig.end_step[first] <= rig.end_step[second] <= rig.end_step[third]


def test_the_preempted_go_before_new_ones() -> None:
    rig, (first, _, third) = crowded(max_num_seqs=3)
    new = rig.add(tokens(9, 1), max_tokens=1)
    while not rig.scheduler.stats().preemptions:
        rig.step()
    assert rig.sequences[third].status is Status.WAITING
    rig.run()
    assert rig.first_token_step[new] > rig.end_step[first]
    rig.check_outputs()


def test_the_preempted_find_their_tokens_in_the_cache() -> None:
    rig = Rig()
    seq = rig.add(tokens(1, 13), max_tokens=12)
    for _ in range(8):
        rig.step()
    rig.scheduler._preempt(rig.sequences[seq])
    plan = rig.schedule()
    assert plan is not None
    (start,) = plan.starts
    assert (len(start.tokens), start.computed) == (21, 20)
    assert rig.sequences[seq].cached_tokens == 0  # of its prompt nothing was found at first
    rig.run()
    rig.check_outputs()


def test_tokens_on_the_way_at_a_preemption_are_not_counted_twice() -> None:
    """Step by step: a result of the sequence's life before must not reach the one after."""
    rig = Rig(num_blocks=1 + 4, depth=4, max_num_seqs=2, max_num_batched_tokens=32)
    first = rig.add(tokens(1, 7), max_tokens=9)
    second = rig.add(tokens(2, 3), max_tokens=3)
    for _ in range(3):
        rig.schedule()
    # The first needs its third block, then its fourth, which was the second's; plans 0 to 2 had
    # the second in them.
    rig.scheduler._preempt(rig.sequences[second])
    plan = rig.schedule()
    assert plan is not None
    assert plan.ends == [second]
    for _ in range(3):
        assert {gain.sequence.seq for gain in rig.update()} == {first}
    rig.run()
    rig.check_outputs()


def test_a_chunk_of_the_life_before_confirms_nothing() -> None:
    rig = Rig(depth=2, max_num_seqs=2, max_num_batched_tokens=16)
    seq = rig.add(tokens(1, 40))
    rig.schedule()
    rig.scheduler._preempt(rig.sequences[seq])
    rig.schedule()
    rig.update()
    assert rig.sequences[seq].registered == 0  # its new blocks wait for the second result
    rig.update()
    assert rig.sequences[seq].registered == 4
    rig.run()
    rig.check_outputs()


def test_one_whose_last_token_is_on_the_way_is_not_preempted() -> None:
    rig = Rig(num_blocks=1 + 5, depth=2, max_num_seqs=2, max_num_batched_tokens=32)
    first = rig.add(tokens(1, 7), max_tokens=9)
    ending = rig.add(tokens(2, 3), max_tokens=6)
    for _ in range(5):
        rig.step()
    # All blocks are in use, and the first needs a fourth one; the other's last step is out.
    assert rig.sequences[first].computed == 12
    assert rig.scheduler.stats().free_blocks == 0
    assert rig.schedule() is None
    assert rig.scheduler.stats().preemptions == 0
    rig.update()
    assert rig.finished == {ending: "length"}
    assert counts(rig.schedule()) == {first: 1}


def test_the_last_in_rank_stands_still_rather_than_start_over() -> None:
    rig = Rig(num_blocks=1 + 5, max_num_seqs=2, max_num_batched_tokens=32)
    first = rig.add(tokens(1, 5), max_tokens=8)
    second = rig.add(tokens(2, 4), max_tokens=8)
    ran = []
    while rig.scheduler.unfinished:
        ran.append(set(counts(rig.schedule())))
        rig.update()
    # The second needs a third block when the first, which has three, is to run thrice more.
    assert ran == [{first, second}] * 5 + [{first}] * 3 + [{second}] * 3
    assert rig.scheduler.stats().preemptions == 0
    rig.check_outputs()


def test_the_last_block_goes_to_the_first_in_rank() -> None:
    rig = Rig(num_blocks=1 + 5, max_num_seqs=2, max_num_batched_tokens=32)
    first, second = (rig.add(tokens(i, 8), max_tokens=5) for i in range(2))
    assert counts(rig.schedule()) == {first: 8, second: 8}
    rig.update()
    rig.scheduler._decoding.reverse()  # as if the second's prompt had been through earlier
    assert counts(rig.schedule()) == {first: 1}
    assert rig.scheduler.stats().preemptions == 0


def test_newcomers_leave_room_for_those_who_run() -> None:
    rig = Rig(num_blocks=1 + 20, max_num_seqs=8, max_num_batched_tokens=64)
    for i in range(8):
        rig.add(tokens(i, 8), max_tokens=5)
    rig.run()
    assert rig.scheduler.stats().preemptions == 0


def test_prompt_logprobs_are_given_once() -> None:
    scheduler = Rig(max_num_seqs=2, max_num_batched_tokens=4).scheduler
    sampling = Sampling(prompt_logprobs=0)
    request = GenerationRequest("r", list(range(6)), sampling, 10, reuse_prefix=False)
    s = Sequence(0, request, sampling)
    scheduler.add(s)
    rows = [Logprobs(token, 0.0, 1, [], []) for token in range(1, 6)]

    assert scheduler.schedule() is not None
    (gain,) = scheduler.update(StepResult(0, [], [], prompt_logprobs={0: rows[:4]}))
    assert (gain.token, gain.prompt_logprobs) == (None, rows[:4])
    scheduler._preempt(s)
    assert scheduler.schedule() is not None
    assert scheduler.update(StepResult(1, [], [], prompt_logprobs={0: rows[:4]})) == []
    assert scheduler.schedule() is not None
    (gain,) = scheduler.update(StepResult(2, [0], [9], prompt_logprobs={0: rows[4:]}))
    assert (gain.token, gain.prompt_logprobs) == (9, rows[4:])


def test_logprobs_come_with_their_token() -> None:
    scheduler = Rig().scheduler
    for seq in range(2):
        scheduler.add(Sequence(seq, GenerationRequest("r", [seq + 1], Sampling(), 5), Sampling()))
    assert scheduler.schedule() is not None
    one = Logprobs(8, -0.5, 1, [8], [-0.5])
    gains = scheduler.update(StepResult(0, [0, 1], [8, 9], logprobs={0: one}))
    assert [(gain.token, gain.logprobs) for gain in gains] == [(8, one), (9, None)]


# --- windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_a_long_chunk_gives_its_pages_back_with_its_first_decodes(depth: int) -> None:
    rig = Rig([None, 8], max_num_batched_tokens=256, depth=depth)
    seq = rig.add(tokens(1, 198), max_tokens=30)
    while not rig.outputs[seq]:
        rig.step()
    rig.step()
    rig.step()
    full, windowed = rig.sequences[seq].tables
    assert len(full.pages) - full.trimmed >= 50
    assert len(windowed.pages) - windowed.trimmed <= 3
    rig.run()
    rig.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_a_prefill_takes_smaller_chunks_rather_than_others_blocks(depth: int, length: int) -> None:
    rig = Rig([None, 8], num_blocks=1 + 50, depth=depth)
    first = rig.add(tokens(1, length), max_tokens=20)
    rig.step()
    long = rig.add(tokens(2, 120), max_tokens=2)
    rig.run()
    assert rig.scheduler.stats().preemptions == 0
    assert rig.first_token_step[long] > 2
    rig.check_outputs()
    assert rig.finished == {first: "length", long: "length"}


# --- prefix reuse ----------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [[None], [None, 8, 8], [8]])
def test_a_second_turn_computes_only_what_is_new(windows: list[int | None]) -> None:
    rig = Rig(windows)
    first = rig.add(tokens(1, 21), max_tokens=8)
    rig.run()
    history = tokens(1, 21) + rig.outputs[first]
    before = rig.shard.computed_tokens
    second = rig.add([*history, 1, 2, 3], max_tokens=2)
    rig.run()
    # All 28 computed tokens of the first turn lie in full blocks.
    assert rig.sequences[second].cached_tokens == 28
    assert rig.shard.computed_tokens - before == 32 - 28 + 1
    stats = rig.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (21 + 32, 28)
    rig.check_outputs()


@pytest.mark.parametrize("depth", [1, 2])
def test_siblings_compute_their_prompt_once(depth: int) -> None:
    rig = Rig(max_num_batched_tokens=64, depth=depth)
    siblings = [rig.add(tokens(1, 200), max_tokens=4, seed=i) for i in range(8)]
    short = rig.add(tokens(2, 20), max_tokens=4)
    rig.run()
    # The first computes the prompt, each of the others its last, partial block; and 3 outputs.
    assert rig.shard.computed_tokens == 200 + 7 * 4 + 20 + 9 * 3
    assert rig.first_token_step[short] <= 3  # it does not wait behind those who wait
    assert max(rig.first_token_step[seq] for seq in siblings) <= 200 // 44 + 2 + depth
    rig.check_outputs()


def test_those_who_wait_for_a_prefix_keep_their_places() -> None:
    rig = Rig(max_num_seqs=3, max_num_batched_tokens=16)
    rig.add(tokens(1, 60))
    siblings = [rig.add(tokens(1, 60)) for _ in range(2)]
    passing = [rig.add(tokens(2 + i, 5), max_tokens=60) for i in range(2)]
    behind = rig.add(tokens(4, 5))
    rig.run()
    seqs = [*passing, *siblings, behind]
    assert sorted(seqs, key=rig.first_token_step.__getitem__) == seqs


def test_nobody_waits_for_a_prefill_that_stands_still() -> None:
    rig = Rig(num_blocks=20_000, max_model_len=5000, max_num_batched_tokens=64, max_num_seqs=8)
    rig.add(tokens(1, 600))
    rig.add(tokens(2, 300))
    held_up = rig.add(tokens(3, 400))  # neither the oldest nor the shortest: it gets nothing
    sibling = rig.add(tokens(3, 20))
    rig.run()
    assert rig.first_token_step[sibling] <= 4
    assert rig.first_token_step[sibling] < rig.first_token_step[held_up]
    rig.check_outputs()


# --- who is admitted ---------------------------------------------------------------------------


def test_at_most_max_num_seqs_run_in_order_of_arrival() -> None:
    rig = Rig(max_num_seqs=3)
    seqs = [rig.add(tokens(i, 5), max_tokens=4 + i) for i in range(7)]
    rig.step()
    assert (rig.scheduler.stats().running, rig.scheduler.stats().waiting) == (3, 4)
    rig.run()
    order = sorted(seqs, key=rig.first_token_step.__getitem__)
    assert order == seqs


def test_one_users_thousand_do_not_hold_up_anothers_one() -> None:
    rig = Rig(max_num_seqs=4)
    ann = [rig.add(tokens(i, 5), max_tokens=10, user="ann") for i in range(1000)]
    for _ in range(30):
        rig.step()
    arrival = rig.steps
    bob = rig.add(tokens(2000, 5), max_tokens=10, user="bob")
    rig.run()
    assert rig.first_token_step[bob] - arrival <= 11  # the next free slot is his
    assert sum(rig.end_step[seq] < rig.end_step[bob] for seq in ann) < 30


def test_users_get_equal_service_not_equal_turns() -> None:
    """Bob's requests are four times as long, so he gets a quarter of the turns."""
    rig = Rig(max_num_seqs=1, max_model_len=4000, num_blocks=2000)
    for i in range(100):
        rig.add(tokens(i, 10), max_tokens=10, user="ann")
        rig.add(tokens(200 + i, 40), max_tokens=40, user="bob")
    served = {"ann": 0, "bob": 0}
    turns = {"ann": 0, "bob": 0}
    while turns["ann"] < 80:
        for gain in rig.step():
            if gain.finish_reason:
                s = gain.sequence
                served[s.request.user] += s.prompt_len + 2 * s.output_len
                turns[s.request.user] += 1
    assert abs(served["ann"] - served["bob"]) <= 40 + 2 * 40
    assert 15 <= turns["bob"] <= 25


def test_what_still_runs_counts_for_its_user() -> None:
    rig = Rig(max_num_seqs=2)
    rig.add(tokens(1, 5), max_tokens=500, user="ann")
    rig.step()
    for i in range(30):
        for user in ("ann", "bob"):
            rig.add(tokens(2 + 2 * i + (user == "bob"), 5), max_tokens=5, user=user)
    order: list[str] = []
    while len(order) < 24:
        order += [gain.sequence.request.user for gain in rig.step() if gain.finish_reason]
    # Each takes 15 and lasts 5 steps, in which ann's long one takes 10: one of hers to five of his.
    assert order.count("ann") <= 6


def test_idleness_saves_up_nothing() -> None:
    rig = Rig(max_num_seqs=1)
    for i in range(50):
        rig.add(tokens(i, 10), max_tokens=5, user="ann")
    for _ in range(150):
        rig.step()
    for i in range(20):
        rig.add(tokens(100 + i, 10), max_tokens=5, user="bob")
    order = []
    while len(order) < 20:
        order += [gain.sequence.request.user for gain in rig.step() if gain.finish_reason]
    # Bob catches up with nothing: they alternate from his arrival on.
    assert 9 <= order.count("bob") <= 11


def test_many_users_leave_no_trace() -> None:
    rig = Rig()
    for i in range(3000):
        rig.add([i + 1], max_tokens=1, user=f"user {i}")
        if i % 50 == 49:
            rig.run()
    assert len(rig.scheduler._waiting._accounts) <= 2 * 512 + 100


def test_lower_priority_values_go_first() -> None:
    rig = Rig(max_num_seqs=1, policy="priority")
    seqs = [rig.add(tokens(i, 5), priority=p) for i, p in enumerate([5, 3, 5, -1, 3])]
    rig.run()
    order = sorted(seqs, key=rig.first_token_step.__getitem__)
    assert order == [3, 1, 4, 0, 2]


def test_fcfs_ignores_priorities() -> None:
    rig = Rig(max_num_seqs=1)
    seqs = [rig.add(tokens(i, 5), priority=-i) for i in range(4)]
    rig.run()
    assert sorted(seqs, key=rig.first_token_step.__getitem__) == seqs


@pytest.mark.parametrize("depth", [1, 2])
def test_a_higher_priority_takes_a_running_ones_slot(depth: int) -> None:
    rig = Rig(max_num_seqs=2, policy="priority", depth=depth)
    low = [rig.add(tokens(i, 5), max_tokens=30, priority=i) for i in (1, 2)]
    for _ in range(5):
        rig.step()
    arrival = rig.steps
    high = rig.add(tokens(9, 5), max_tokens=4, priority=0)
    same = rig.add(tokens(8, 5), max_tokens=4, priority=2)
    rig.run()
    assert rig.first_token_step[high] - arrival <= depth
    assert rig.scheduler.stats().preemptions == 1
    assert rig.end_step[high] < rig.end_step[low[0]] < rig.end_step[low[1]]
    assert rig.end_step[same] > rig.end_step[low[0]]
    rig.check_outputs()


def test_a_higher_priority_takes_running_ones_blocks() -> None:
    rig = Rig(num_blocks=1 + 20, policy="priority")
    low = [rig.add(tokens(i, 20), max_tokens=9, priority=1) for i in range(3)]
    rig.step()
    high = rig.add(tokens(9, 40), max_tokens=4, priority=0)
    rig.step()
    assert high in rig.first_token_step
    assert rig.scheduler.stats().preemptions == 2
    rig.run()
    rig.check_outputs()
    assert rig.end_step[low[0]] < rig.end_step[low[1]] < rig.end_step[low[2]]


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "the prompt is empty"),
        (tokens(0, 60), 5, "has 60 tokens; with max_model_len 60 it can have 59 at most"),
        ([1, -1], 5, "token ids outside"),
        (tokens(0, 30), 20, r"30 prompt tokens and up to 20 generated ones need 13 KV blocks and "
         r"the cache has 12, room for 49 tokens in all; .*max_tokens.*num_kv_blocks"),
    ],
)  # fmt: skip
def test_what_can_never_run_is_refused(prompt: list[int], max_tokens: int, message: str) -> None:
    rig = Rig(num_blocks=1 + 12, max_model_len=60)
    with pytest.raises(RequestRefused, match=message):
        rig.add(prompt, max_tokens)
    assert rig.scheduler.unfinished == 0


def test_the_longest_that_fits_runs_alone() -> None:
    rig = Rig([None, 6, 6], num_blocks=1 + 4 * 3 - 2, max_model_len=60)
    with pytest.raises(RequestRefused):
        rig.add(tokens(1, 10), 8)
    seq = rig.add(tokens(2, 10), 7)
    rig.run()
    assert rig.finished[seq] == "length"
    rig.check_outputs()


def test_a_full_queue_refuses_and_takes_again_later() -> None:
    rig = Rig(max_num_seqs=2, max_waiting=3)
    for i in range(5):
        rig.add(tokens(i, 5), max_tokens=2)
    with pytest.raises(QueueFull, match="5 sequences wait already"):
        rig.add(tokens(9, 5))
    rig.step()
    with pytest.raises(QueueFull, match="3 sequences wait already"):
        rig.add(tokens(9, 5))
    while not rig.finished:
        rig.step()
    rig.add(tokens(9, 5))
    rig.run()


def test_all_of_a_requests_sequences_are_taken_or_none() -> None:
    rig = Rig(max_num_seqs=2, max_waiting=2)
    rig.add(tokens(1, 5))
    with pytest.raises(QueueFull):
        rig.scheduler.add(*[rig.sequence(tokens(2, 5)) for _ in range(4)])
    with pytest.raises(RequestRefused):
        rig.scheduler.add(rig.sequence(tokens(2, 5)), rig.sequence([]))
    assert rig.scheduler.unfinished == 1
    with pytest.raises(ValueError, match="sequence id 0 is in use"):
        rig.scheduler.add(rig.sequences[0])


def test_every_running_sequence_must_be_able_to_advance() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        Scheduler(
            KVGroups([None], 100, 4), max_model_len=50, max_num_seqs=8, max_num_batched_tokens=7
        )


# --- pipelines ------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_micro_batches_share_out_the_decodes(stages: int) -> None:
    """As many plans at once as there are stages, each with its share, no sequence in two."""
    rig = Rig(micro_batches=stages, depth=stages)
    seqs = [rig.add(tokens(i, 5), max_tokens=40) for i in range(6)]
    for _ in range(3 * stages):
        rig.step()
    for _ in range(20):
        while rig.in_flight < stages:
            assert rig.schedule() is not None
        plans = [{s.seq for s in rig.sequences.values() if s.computed == len(s.tokens)}]
        assert plans[0] == set(seqs)  # the last token of each is on its way
        out = [result.seqs for result in rig._on_the_way]
        assert sorted(seq for each in out for seq in each) == seqs
        assert max(map(len, out)) - min(map(len, out)) <= 1 + 6 % stages
        rig.update()
    rig.run()
    rig.check_outputs()
    rig.check_released()


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("seqs", [1, 2, 5, 6, 16])
def test_micro_batches_ahead_go_on_before_tokens_are_known(seqs: int, stages: int) -> None:
    """One plan more than stages is on the way, and none of them waits for the one before."""
    rig = Rig(micro_batches=stages, ahead=True, depth=stages + 1)
    for i in range(seqs):
        rig.add(tokens(i, 5), max_tokens=40)
    for _ in range(2 * stages):
        rig.step()
    for _ in range(20):
        while rig.in_flight < stages + 1:
            assert rig.schedule() is not None
        out = [set(result.seqs) for result in rig._on_the_way]
        assert all(len(each) <= -(-seqs // stages) for each in out)
        if seqs >= stages:
            assert all(not one & after for one, after in itertools.pairwise(out))
            assert set().union(*out[:stages]) == set(range(seqs))
        rig.update()
    rig.run()
    rig.check_outputs()
    rig.check_released()


def test_prompts_go_into_micro_batches_ahead_of_decodes_that_would_wait() -> None:
    rig = Rig(micro_batches=2, ahead=True, depth=3, max_num_seqs=9, max_num_batched_tokens=9)
    for i in range(9):
        rig.add(tokens(i, 6), max_tokens=30)
    while not all(rig.outputs.values()):  # until the last prompt is done
        while rig.in_flight < 3 and rig.schedule() is not None:
            pass
        out = [set(result.seqs) for result in rig._on_the_way]
        assert all(not one & after for one, after in itertools.pairwise(out))
        rig.update()
    rig.run()
    rig.check_outputs()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("seqs", [2, 3, 4, 7])
def test_micro_batches_go_on_when_blocks_run_short(seqs: int, stages: int, ahead: bool) -> None:
    """Those whose turn it is may all stand still for want of a block: then others get the turn."""
    for num_blocks in range(14, 25):
        rig = Rig(
            num_blocks=num_blocks,
            micro_batches=stages,
            ahead=ahead,
            depth=stages + ahead,
            max_model_len=60,
        )
        for i in range(seqs):
            rig.add(tokens(i, 9), max_tokens=28)
        rig.run()
        rig.check_outputs()
        rig.check_released()


def test_micro_batches_leave_nobody_behind_at_any_depth() -> None:
    rig = Rig(micro_batches=3, depth=1)
    for i in range(7):
        rig.add(tokens(i, 5), max_tokens=12)
    rig.run(limit=7 * 14)
    rig.check_outputs()


# --- a lost shard ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "micro_batches", "ahead"), [(1, 1, False), (2, 1, False), (3, 3, False), (3, 2, True)]
)
def test_everything_goes_on_when_the_shard_is_lost_at_any_time(
    depth: int, micro_batches: int, ahead: bool
) -> None:
    for lost_at in range(12):
        options = {"depth": depth, "micro_batches": micro_batches, "ahead": ahead}
        options["num_blocks"] = 40
        rig = Rig([None, 6], max_num_seqs=4, max_num_batched_tokens=16, **options)
        for i in range(8):
            rig.add(tokens(i % 5, 5 + i), max_tokens=4 + i, temperature=1.0)
        for step in range(lost_at):
            rig.step()
            if step % 5 == 4:
                rig.lose_shard()
        rig.schedule()
        rig.lose_shard()
        rig.check_books()
        rig.run()
        assert set(rig.finished.values()) == {"length"}
        rig.check_outputs()
        rig.check_released()


def test_what_never_fits_a_smaller_cache_is_given_up() -> None:
    rig = Rig(num_blocks=40)
    long = rig.add(tokens(1, 100), max_tokens=20)
    short = rig.add(tokens(2, 10), max_tokens=20)
    for _ in range(3):
        rig.step()
    rig.lose_shard(num_blocks=20)
    assert rig.finished == {long: "error"}
    rig.run()
    assert rig.finished[short] == "length"
    rig.check_outputs()
    rig.check_released()


# --- beams ---


def test_a_step_of_beams_carries_their_tokens_and_no_more() -> None:
    rig = Rig(num_blocks=200, max_num_batched_tokens=512)
    seq = rig.add(range(300), max_tokens=10, beams=BeamSearch(width=4))
    rig.step()
    copied = 0
    while rig.scheduler.unfinished:
        plan = rig.schedule()
        assert plan is not None
        assert sum(plan.counts) == len(plan.starts) == 4
        assert [len(start.tokens) for start in plan.starts] == [1] * 4
        copied += len(plan.copies)
        rig.check_books()
        rig.update()
    assert copied > 0
    assert rig.finished == {seq: "found"}
    rig.check_outputs()
    rig.check_released()


def test_beams_wait_for_their_results_and_nobody_waits_for_them() -> None:
    rig = Rig(depth=2)
    other = rig.add(range(5), max_tokens=12)
    rig.add(range(20, 25), max_tokens=6, beams=BeamSearch(width=3))
    plans = []
    while rig.scheduler.unfinished:
        while rig.in_flight < 2 and (plan := rig.schedule()) is not None:
            plans.append(plan)
        rig.update()
    searched = [plan.step for plan in plans if len(plan.seqs) > 1]
    assert all(b - a >= 2 for a, b in itertools.pairwise(searched))
    assert [plan.step for plan in plans if other in plan.seqs] == list(range(12))
    rig.check_outputs()


def test_a_search_takes_its_slots_from_its_admission_on() -> None:
    rig = Rig(max_num_seqs=4)
    rig.add(range(5), max_tokens=6)
    rig.add(range(10, 15), max_tokens=6, beams=BeamSearch(width=4))
    rig.add(range(20, 25), max_tokens=3)
    rig.step()
    assert rig.scheduler.stats().waiting == 2  # the search waits for four, and nobody passes it
    rig.run()
    rig.check_outputs()
    with pytest.raises(RequestRefused, match=r"beam_width \(5\)"):
        rig.add(range(5), beams=BeamSearch(width=5))


def test_a_search_keeps_its_adapter_while_it_waits_for_results() -> None:
    rig = Rig(depth=2, max_adapters=1)
    rig.add(range(5), max_tokens=6, beams=BeamSearch(width=2), adapter=1)
    rig.add(range(10, 15), max_tokens=6, adapter=2)
    rig.add(range(20, 25), max_tokens=20)
    held: dict[int, int] = {}
    seen = set()
    while rig.scheduler.unfinished:
        while rig.in_flight < 2 and (plan := rig.schedule()) is not None:
            for seq in plan.ends:
                del held[seq]
            held |= {start.seq: start.adapter for start in plan.starts}
            running = {*held.values()} - {0}
            assert len(running) <= 1
            seen |= running
        rig.update()
    assert seen == {1, 2}
    rig.check_outputs()


def test_beams_that_can_never_fit_are_refused_and_those_that_just_fit_run() -> None:
    rules = BeamSearch(width=4)
    for blocks in range(3, 40):
        rig = Rig((None, 6), num_blocks=blocks, max_num_seqs=4)
        rig.add(range(3), max_tokens=2)
        try:
            rig.add(range(50, 59), max_tokens=9, beams=rules)
        except RequestRefused:
            continue
        break
    assert 20 < blocks < 39
    rig.run()
    rig.check_outputs()
    rig.check_released()
