"""Whatever happens in whatever order: the right tokens, no block lost, everything ends."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from helpers.scheduling import Rig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tensorray.cluster.request import BeamSearch, RequestRefused

WINDOWS = st.sampled_from(
    [(None,), (None, 6), (None, 1, 9), (5,), (None, 8, 8, 17), (3, None), (None, None)]
)
# Prompts share prefixes often: the start of one of two texts, then perhaps something of their own.
TEXTS = [list(range(30)), [*range(12), *range(100, 118)]]
PROMPTS = st.builds(
    lambda text, length, own: text[:length] + own,
    st.sampled_from(TEXTS),
    st.integers(1, 30),
    st.lists(st.integers(200, 203), max_size=3),
)
BEAMS = st.builds(
    lambda size, groups, **rules: BeamSearch(width=size * groups, groups=groups, **rules),
    st.integers(1, 2),
    st.integers(1, 2),
    length_penalty=st.sampled_from([1.0, 0.0, 2.0, -1.0]),
    early_stopping=st.sampled_from([False, True, "never"]),
    diversity=st.sampled_from([0.0, 0.5]),
)
REQUESTS = st.fixed_dictionaries(
    {
        "beams": st.none() | st.none() | BEAMS,
        "prompt": PROMPTS,
        "max_tokens": st.integers(1, 16),
        "seed": st.integers(0, 2),
        "stop_token_ids": st.sampled_from([[], [], list(range(0, 50, 7))]),
        "min_tokens": st.sampled_from([0, 0, 1, 3]),
        "priority": st.integers(0, 2),
        "user": st.sampled_from(["", "ann", "bob"]),
        "cache_salt": st.sampled_from(["", "", "pepper"]),
        "reuse_prefix": st.sampled_from([True, True, True, False]),
    }
)


@st.composite
def rigs(draw: st.DrawFn) -> Rig:
    max_num_seqs = draw(st.integers(1, 6))
    windows = draw(WINDOWS)
    block_size = draw(st.sampled_from([1, 2, 4]))
    # In tokens, from less than a long sequence to several of them.
    room = draw(st.integers(20, 90))
    return Rig(
        windows,
        num_blocks=2 + len(windows) * room // block_size,
        block_size=block_size,
        max_model_len=draw(st.sampled_from([20, 45])),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.sampled_from([0, 1, 5, 30])),
        depth=draw(st.integers(1, 3)),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, cancels, plans, results and failures in any order, up to `depth` plans ahead."""

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

    @precondition(lambda self: self.rig.in_flight)
    @rule()
    def update(self) -> None:
        self.rig.update()

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


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = pytest.mark.filterwarnings("ignore")(SchedulerMachine.TestCase)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(rig=rigs(), requests=st.lists(REQUESTS, min_size=5, max_size=25))
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


@settings(max_examples=40, deadline=None)
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=8), chunk=st.integers(8, 40))
def test_computed_tokens_add_up(prompts: list[list[int]], chunk: int) -> None:
    """Without preemption each sequence computes its tokens once, less what it found cached."""
    rig = Rig(max_num_seqs=8, max_num_batched_tokens=chunk)
    for prompt in prompts:
        rig.add(prompt, max_tokens=5)
    rig.run()
    stats = rig.scheduler.stats()
    assert stats.preemptions == 0
    assert stats.prefix_queries == sum(map(len, prompts))
    assert stats.prefix_hits == sum(s.cached_tokens for s in rig.sequences.values())
    # The last generated token is never computed.
    expected = sum(len(prompt) + 4 for prompt in prompts) - stats.prefix_hits
    assert rig.shard.computed_tokens == expected
