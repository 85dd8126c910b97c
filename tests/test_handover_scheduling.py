"""Two schedulers, one of which prefills for the other, in any order of things: the right tokens,
no block lost, none written by a fetch that is somebody else's."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from helpers.content_shard import generate_alone
from helpers.scheduling import Rig
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tensorray.cluster.fetches import Fetch
from tensorray.cluster.request import RequestRefused, Resumed, Source
from tensorray.cluster.sequence import Sequence, Status

WINDOWS = st.sampled_from([(None,), (None, 6), (5,), (None, 8, 8, 17)])
TEXTS = [list(range(30)), [*range(12), *range(100, 118)]]
PROMPTS = st.builds(
    lambda text, length, own: text[:length] + own,
    st.sampled_from(TEXTS),
    st.integers(1, 30),
    st.lists(st.integers(200, 203), max_size=3),
)
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": PROMPTS,
        "max_tokens": st.integers(1, 12),
        "seed": st.integers(0, 2),
        "stop_token_ids": st.sampled_from([[], list(range(0, 50, 7))]),
        "priority": st.integers(0, 1),
    }
)
RIGS = st.fixed_dictionaries(
    {
        "room": st.integers(20, 90),
        "max_num_seqs": st.integers(1, 5),
        "spare": st.sampled_from([0, 1, 5, 30]),
        "depth": st.integers(1, 3),
        "policy": st.sampled_from(["fcfs", "priority"]),
        "enable_prefix_caching": st.booleans(),
    }
)


def make_rig(
    windows: tuple[int | None, ...],
    size: int,
    room: int,
    max_num_seqs: int,
    spare: int,
    **rest: Any,
) -> Rig:
    return Rig(
        windows,
        num_blocks=2 + len(windows) * room // size,
        block_size=size,
        max_model_len=45,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + spare,
        **rest,
    )


def spoil(rig: Rig, fetch: Fetch) -> None:
    """What a fetch writes that has not come to its end."""
    for ours in fetch.ours:
        for at in range(rig.shard.kv.block_size):
            rig.shard.slots[ours, at] = (-1, -1, rig.shard.next_step - 1, -1)


def bring(far: Rig, near: Rig, fetch: Fetch) -> None:
    """What a fetch writes in the end."""
    for theirs, ours in zip(fetch.theirs, fetch.ours, strict=True):
        for at in range(near.shard.kv.block_size):
            group, content, _, _ = far.shard.slots[theirs, at]
            near.shard.slots[ours, at] = (group, content, near.shard.next_step - 1, -1)


class HandoverMachine(RuleBasedStateMachine):
    far: Rig  # prefills
    near: Rig  # decodes

    @initialize(windows=WINDOWS, size=st.sampled_from([1, 2, 4]), far=RIGS, near=RIGS)
    def start(
        self, windows: tuple[int | None, ...], size: int, far: dict[str, Any], near: dict[str, Any]
    ) -> None:
        self.far, self.near = make_rig(windows, size, **far), make_rig(windows, size, **near)
        self.held: dict[int, list[list[int]]] = {}
        self.fetches: list[Fetch] = []

    @rule(request=REQUESTS, rig=st.sampled_from(["far", "near"]))
    def add(self, request: dict[str, Any], rig: str) -> None:
        with suppress(RequestRefused):
            getattr(self, rig).add(**request)

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=3))
    def prefill(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            with suppress(RequestRefused):
                self.far.add(**request, hand_over=True)

    @rule(steps=st.integers(1, 6), rig=st.sampled_from(["far", "near"]))
    def run_on(self, steps: int, rig: str) -> None:
        for _ in range(steps):
            self.step(getattr(self, rig))

    def step(self, rig: Rig) -> None:
        for gain in rig.step():
            if gain.lent is not None:
                assert gain.finish_reason is None
                self.held[gain.sequence.seq] = gain.lent

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.held)))
        begun = self.far.sequences[seq]
        asked = begun.request
        near = self.near.sequence(
            asked.prompt,
            asked.max_tokens,
            seed=begun.sampling.seed,
            stop_token_ids=begun.sampling.stop_token_ids,
            source=Source([], seq, self.held[seq]),
        )
        resumed = Resumed(0, begun.output_tokens)
        near = self.near.sequences[near.seq] = Sequence(
            near.seq, near.request, near.sampling, resumed
        )
        try:
            self.near.scheduler.add(near, always=True)
        except RequestRefused:
            del self.near.sequences[near.seq]
        else:
            self.near.outputs[near.seq] = begun.output_tokens

    @precondition(lambda self: self.near.scheduler.wants_fetches)
    @rule()
    def begin(self) -> None:
        for fetch in self.near.scheduler.fetches():
            assert fetch.after < self.near.shard.next_step - self.near.in_flight
            spoil(self.near, fetch)
            self.fetches.append(fetch)

    @precondition(lambda self: self.fetches)
    @rule(data=st.data(), lucky=st.booleans())
    def end(self, data: st.DataObject, lucky: bool) -> None:
        fetch = data.draw(st.sampled_from(self.fetches))
        self.fetches.remove(fetch)
        self.end_one(fetch, lucky)

    def end_one(self, fetch: Fetch, lucky: bool) -> None:
        seq = fetch.source.seq
        spoil(self.near, fetch)
        came = lucky and seq in self.held and fetch.source.blocks == self.held[seq]
        if came:
            bring(self.far, self.near, fetch)
        self.near.scheduler.fetched(fetch.sequence.seq, came)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[seq]
        self.far.cancel(seq)

    @precondition(lambda self: self.near.scheduler.unfinished)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.near.cancel(data.draw(st.sampled_from(sorted(self.near.scheduler._sequences))))

    @rule()
    def lose_near(self) -> None:
        self.fetches = []
        self.near.lose_shard()

    @rule()
    def lose_far(self) -> None:
        for seq in self.held:
            self.far.finished[seq] = "abort"
        self.held = {}
        self.far.lose_shard()

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "far"):
            self.far.check_books()
            self.near.check_books()
            held = {seq for seq, s in self.far.sequences.items() if s.status is Status.HELD}
            assert held - self.far.finished.keys() == self.held.keys()

    def teardown(self) -> None:
        if not hasattr(self, "far"):
            return
        for _ in range(5000):
            for seq in list(self.held):
                del self.held[seq]
                self.far.cancel(seq)
            for rig in (self.far, self.near):
                self.step(rig)
            self.fetches += self.near.scheduler.fetches()
            for fetch in self.fetches:
                self.end_one(fetch, False)
            self.fetches = []
            if not any(r.scheduler.unfinished or r.in_flight for r in (self.far, self.near)):
                break
        for rig in (self.far, self.near):
            rig.check_books()
            rig.check_released()
            assert rig.finished.keys() == rig.outputs.keys()
        for seq, reason in self.near.finished.items():
            s = self.near.sequences[seq]
            most = min(s.request.max_tokens, 45 - s.prompt_len)
            alone = generate_alone(s.request.prompt, s.sampling, most)
            assert self.near.outputs[seq] == alone[: len(self.near.outputs[seq])]
            if reason in ("stop", "length"):
                assert self.near.outputs[seq] == alone


HandoverMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrder = pytest.mark.filterwarnings("ignore")(HandoverMachine.TestCase)


def rig(**options: Any) -> Rig:
    return Rig(num_blocks=13, block_size=4, max_num_seqs=4, **options)


def test_blocks_are_not_filled_while_a_plan_may_use_them() -> None:
    """A sequence ends; the step after, which has run it once too often, is still on its way."""
    near = rig(depth=2, enable_prefix_caching=False)
    near.add(list(range(40)), stop_token_ids=list(range(50)))
    while not near.finished:
        near.step()
    assert near.in_flight == 1
    source = Source([], 0, [[1, 2, 3, 4, 5, 6, 7, 8]])
    near.add(list(range(34)), source=source)
    near.add([1, 2], max_tokens=9)
    near.schedule()
    assert near.scheduler.wants_fetches
    assert near.scheduler.fetches() == []
    near.update()
    (fetch,) = near.scheduler.fetches()
    assert fetch.theirs == source.blocks[0]
    assert not near.scheduler.wants_fetches


def test_who_has_the_same_prompt_waits_for_the_fetch() -> None:
    near = rig()
    prompt = list(range(20))
    near.add(prompt, source=Source([], 0, [[7, 8, 9, 10]]))
    near.schedule()
    (fetch,) = near.scheduler.fetches()
    other = near.add(prompt)
    for _ in range(5):
        assert near.schedule() is None
    near.scheduler.fetched(fetch.sequence.seq, False)
    near.run()
    assert near.sequences[other].cached_tokens == 16


def test_blocks_that_came_and_were_given_up_are_not_fetched_again() -> None:
    far, near = rig(), rig(policy="priority", enable_prefix_caching=False)
    prompt = list(range(22))
    held = far.add(prompt, hand_over=True)
    (gain,) = far.step()
    assert gain.lent is not None
    first = near.add(prompt, priority=1, source=Source([], held, gain.lent))
    near.schedule()
    (fetch,) = near.scheduler.fetches()
    bring(far, near, fetch)
    near.scheduler.fetched(first, True)
    near.step()
    assert len(near.outputs[first]) == 1
    near.add(range(50, 86), priority=0)
    near.run()
    assert near.scheduler.stats().preemptions == 1
    assert not near.scheduler.wants_fetches
    assert near.outputs[first] == generate_alone(prompt, near.sequences[first].sampling, 8)


def test_a_fetch_that_shards_fail_of_is_not_begun_again() -> None:
    near = rig()
    prompt = list(range(22))
    seq = near.add(prompt, source=Source([], 0, [[7, 8, 9, 10, 11]]))
    near.schedule()
    assert len(near.scheduler.fetches()) == 1
    near.lose_shard()
    near.run()
    assert near.outputs[seq] == generate_alone(prompt, near.sequences[seq].sampling, 8)


def test_a_window_that_has_moved_on_has_nothing_to_lend() -> None:
    """In chunks of one token the window leaves the last full page before the prompt's end."""
    far = Rig((3,), num_blocks=20, block_size=4, max_num_seqs=1, max_num_batched_tokens=1)
    lent = {}
    for length in (16, 17, 18, 19):
        seq = far.add(list(range(100 * length, 101 * length)), hand_over=True)
        while far.sequences[seq].status is not Status.HELD:
            for gain in far.step():
                lent[length] = gain.lent
        far.cancel(seq)
    assert [len(blocks[0]) for blocks in lent.values() if blocks] == [4, 4, 4, 0]
