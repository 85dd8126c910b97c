"""Room for drafts: it changes when tokens come, never which; blocks and budget stay whole."""

from __future__ import annotations

import os
from contextlib import suppress
from random import Random
from typing import Any

import msgspec
import pytest
from helpers.scheduling import Rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_scheduler_properties import REQUESTS, WINDOWS

from tensorray.actors.protocol import Drafting, Logprobs, StepPlan, StepResult
from tensorray.cluster.draft_length import DraftLength
from tensorray.cluster.request import RequestRefused

#: Of each property. `make soak` asks for more.
EXAMPLES = int(os.environ.get("TENSORRAY_SOAK_SCHEDULES", "30"))
CHEAP = Drafting(max_tokens=4, row_cost=0.01, draft_cost=0.0)


@st.composite
def rigs(draw: st.DrawFn) -> Rig:
    max_num_seqs = draw(st.integers(1, 6))
    windows = draw(WINDOWS)
    block_size = draw(st.sampled_from([1, 2, 4]))
    room = draw(st.integers(20, 90))
    row_cost = draw(st.sampled_from([0.001, 0.1]))
    return Rig(
        windows,
        num_blocks=2 + len(windows) * room // block_size,
        block_size=block_size,
        max_model_len=draw(st.sampled_from([20, 45])),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.sampled_from([0, 3, 30])),
        depth=draw(st.integers(1, 3)),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        enable_prefix_caching=draw(st.booleans()),
        drafting=Drafting(
            draw(st.integers(1, 7)), row_cost, 0.0, wait_cost=draw(st.sampled_from([0.0, 0.1, 0.6]))
        ),
        luck=Random(draw(st.integers(0, 99))),
    )


class SpeculativeMachine(RuleBasedStateMachine):
    """Adds, cancels, plans, results, failures and losses of the shard, in any order."""

    rig: Rig

    @initialize(rig=rigs())
    def start(self, rig: Rig) -> None:
        self.rig = rig

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            with suppress(RequestRefused):
                self.rig.add(**request)

    @precondition(lambda self: self.rig.scheduler.unfinished)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        scheduler = self.rig.scheduler
        leaders = sorted({scheduler.leader(seq) for seq in scheduler._sequences})
        self.rig.cancel(data.draw(st.sampled_from(leaders)))

    @precondition(lambda self: self.rig.in_flight < self.rig.depth)
    @rule()
    def schedule(self) -> None:
        self.rig.schedule()

    @rule(steps=st.integers(1, 6))
    def run_on(self, steps: int) -> None:
        for _ in range(steps):
            self.rig.step()

    @precondition(lambda self: self.rig.in_flight < self.rig.depth and self.rig.shard.states)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.rig.shard.states)))
        if seq in self.rig.scheduler._sequences:
            self.rig.schedule(fail=[seq])

    @rule()
    def lose_shard(self) -> None:
        self.rig.lose_shard()

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "rig"):
            self.rig.check_books()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.run(limit=2_000)
            self.rig.check_books()
            self.rig.check_outputs()
            self.rig.check_released()
            assert self.rig.finished.keys() == self.rig.outputs.keys()


SpeculativeMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnyOrder = pytest.mark.filterwarnings("ignore")(SpeculativeMachine.TestCase)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(rig=rigs(), requests=st.lists(REQUESTS, min_size=5, max_size=20))
def test_every_accepted_request_ends_with_its_own_tokens(
    rig: Rig, requests: list[dict[str, Any]]
) -> None:
    for request in requests:
        with suppress(RequestRefused):
            rig.add(**request)
    most = sum(len(s.tokens) + s.request.max_tokens for s in rig.sequences.values())
    rig.run(limit=20 * most + 10)
    rig.check_outputs()
    rig.check_released()
    assert set(rig.finished.values()) <= {"stop", "length", "found"}


def test_right_drafts_save_steps_and_are_counted() -> None:
    class Lucky(Random):
        def random(self) -> float:
            return 0.0  # always right

        def randrange(self, stop: int) -> int:  # type: ignore[override]
            return stop - 1  # all that there is room for

    rig = Rig(drafting=CHEAP, luck=Lucky())
    seq = rig.add(range(9), max_tokens=31)
    rig.run()
    rig.check_outputs()
    s, stats = rig.sequences[seq], rig.scheduler.stats()
    assert rig.steps == 1 + 30 // 5
    assert s.drafted == s.accepted == stats.draft_tokens == stats.accepted_tokens == 24
    assert stats.drafts == 6


def test_without_a_drafting_shard_no_plan_has_room() -> None:
    rig = Rig(depth=2)
    rig.add(range(9), max_tokens=6)
    plans = [rig.schedule(), rig.schedule()]
    assert [plan.counts for plan in plans if plan] == [[9], [1]]


def test_a_sequence_with_room_is_in_one_plan_at_a_time_and_others_pipeline_on() -> None:
    rig = Rig(depth=2, drafting=CHEAP, luck=Random(0))
    seq = rig.add(range(9), max_tokens=12)
    hopeless = rig.add(range(9, 18), max_tokens=12)
    rig.sequences[hopeless].acceptance = 0.0
    assert rig.schedule() is not None
    ahead = rig.schedule()
    assert ahead is not None
    assert ahead.seqs == [hopeless]
    rig.update()
    plan = rig.schedule()
    assert plan is not None
    assert dict(zip(plan.seqs, plan.counts, strict=True)) == {seq: 5, hopeless: 1}
    rig.run()
    rig.check_outputs()


def test_room_costs_nobody_blocks_and_keeps_to_the_budget() -> None:
    rig = Rig(num_blocks=8, block_size=4, max_model_len=28, drafting=CHEAP, luck=Random(1))
    rig.add(range(12), max_tokens=13)
    rig.add(range(20, 24), max_tokens=1)
    rig.run()
    assert rig.scheduler.stats().preemptions == 0
    tight = Rig(max_num_seqs=3, max_num_batched_tokens=4, drafting=CHEAP, luck=Random(1))
    for first in range(3):
        tight.add([first], max_tokens=9)
    tight.run()  # the content shard holds plans to the budget
    tight.check_outputs()


def test_log_probabilities_go_with_their_tokens() -> None:
    rig = Rig(drafting=CHEAP, luck=Random(0))
    s = rig.sequence(range(5), max_tokens=9, logprobs=0)
    rig.scheduler.add(s)
    entries = [Logprobs(token, -1.0 * token, 1, [], []) for token in (7, 8, 9, 10)]

    def give(plan: StepPlan | None, tokens: list[int]) -> list[float]:
        assert plan is not None
        at = entries[tokens[0] - 7 :]
        result = StepResult(plan.step, [s.seq] * len(tokens), tokens, {s.seq: at[0]})
        if len(tokens) > 1:
            more = {s.seq: at[1 : len(tokens)]}
            result = StepResult(
                plan.step, result.seqs, tokens, result.logprobs, drafted={s.seq: 4},
                further_logprobs=more,
            )  # fmt: skip
        return [gain.logprobs.logprob for gain in rig.scheduler.update(result) if gain.logprobs]

    assert give(rig.scheduler.schedule(), [7]) == [-7.0]
    assert give(rig.scheduler.schedule(), [8, 9, 10]) == [-8.0, -9.0, -10.0]
    assert (s.drafted, s.accepted) == (4, 2)


def test_drafts_grow_with_success_end_with_failure_and_are_tried_again() -> None:
    s = Rig().sequence([1])
    rule = DraftLength(Drafting(max_tokens=8, row_cost=0.08, draft_cost=0.0))
    rule.plan(1)
    at_first = rule.length(s)
    for _ in range(10):
        rule.record(s, 4, 4)
    assert rule.length(s) == 8 >= at_first > 0
    for _ in range(30):
        rule.record(s, 1, 0)
    assert rule.length(s) == 0
    for _ in range(100):
        rule.rest(s)
    assert rule.length(s) > 0


def test_large_batches_and_dear_drafts_ask_for_fewer() -> None:
    s = Rig().sequence([1])

    def length(decodes: int, **changes: Any) -> int:
        rule = DraftLength(Drafting(**{"max_tokens": 8, "row_cost": 0.08, "draft_cost": 0.0}
                                    | changes))  # fmt: skip
        rule.plan(decodes)
        return rule.length(s)

    lengths = [length(decodes) for decodes in (1, 4, 16, 256)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[1]
    assert lengths[-1] == 0
    assert length(1, draft_cost=0.3) < length(1)
    assert length(4, max_batch=3) == 0 < length(3, max_batch=3)
    # A round is for all: what it costs is shared.
    cheap = {"row_cost": 0.01, "max_tokens": 20}
    assert length(1, round_cost=0.3, **cheap) < length(1, **cheap)
    assert length(4, round_cost=0.3, **cheap) == length(4, draft_cost=0.3 / 4, **cheap)


WAITING = Drafting(max_tokens=4, row_cost=0.01, draft_cost=0.0, wait_cost=0.2)


def test_plans_wait_for_results_while_drafts_gain_more_than_that_costs() -> None:
    sequences = [Rig().sequence([1]) for _ in range(16)]

    def waits(chances: list[float], **costs: float) -> bool:
        rule = DraftLength(msgspec.structs.replace(WAITING, **costs))
        decoding = sequences[: len(chances)]
        for s, chance in zip(decoding, chances, strict=True):
            s.acceptance = chance
        rule.plan(len(decoding))
        waiting = rule.waits(decoding)
        assert any(rule.length(s) for s in decoding) == waiting
        return waiting

    assert waits([0.9])
    assert waits([0.1]) is False
    assert waits([0.9, 0.0, 0.0])
    assert waits([0.9] + [0.0] * 15) is False  # fifteen would wait for one
    assert waits([0.9] * 16)
    assert waits([0.9] * 16, sequence_cost=0.3) is False
    assert waits([0.9], sequence_cost=0.3)
    assert waits([0.9], round_cost=1.0) is False
    assert waits([]) is False


@pytest.mark.parametrize("change", ["cancelled", "joined"])
def test_a_sequence_whose_drafts_are_on_their_way_waits_whatever_else_changes(change: str) -> None:
    drafting = msgspec.structs.replace(WAITING, max_batch=2)
    rig = Rig(depth=2, drafting=drafting, luck=Random(0))
    seqs = [rig.add(range(10 * i, 10 * i + 9), max_tokens=20) for i in range(2)]
    rig.schedule()
    rig.update()
    for seq, chance in zip(seqs, (0.1, 0.98), strict=True):
        rig.sequences[seq].acceptance = chance
    if change == "joined":
        rig.add(range(50, 59), max_tokens=20)  # a third decode, with which nobody has drafts
    plan = rig.schedule()
    assert plan is not None
    assert all(dict(zip(plan.seqs, plan.counts, strict=True))[seq] > 1 for seq in seqs)
    if change == "cancelled":
        rig.cancel(seqs[1])  # for the other one alone nobody would wait
    ahead = rig.schedule()
    assert ahead is None or not {*ahead.seqs} & {*seqs}
    rig.run()
    rig.check_outputs()


def test_nobody_waits_for_a_shard_that_finds_nothing_to_guess_for_long() -> None:
    rig = Rig(depth=2, drafting=WAITING, luck=Random(0))
    rig.shard._guess = lambda *_: []  # type: ignore[method-assign]
    rig.add([1, 2, 3], max_tokens=400)
    ahead = 0
    while rig.scheduler.unfinished:
        rig.step()
        ahead += rig.in_flight == 1
    rig.check_outputs()
    # A result is in, and another step is on its way: as without drafts, but for some tries.
    assert 200 < ahead < 400
