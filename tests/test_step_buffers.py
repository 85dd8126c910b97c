"""A step's upload: what the device makes of it is what the CPU shard packs, and padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from helpers.host_device import HostDevice
from helpers.running import make_shard
from helpers.tiny_models import directory
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorray.actors import step_buffers
from tensorray.actors.buckets import Buckets, bucket_sizes
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan
from tensorray.actors.step_buffers import RunningSequences, StepBuffers

MODEL = directory("gemma3")  # local and global layers: several groups of KV blocks
MAX_SEQS, MAX_TOKENS, BLOCK_SIZE = 6, 48, 4
SAMPLING = Sampling(temperature=0.0)


class Rig:
    """The CPU shard's books and the device's, side by side."""

    def __init__(self) -> None:
        self.cpu = make_shard(MODEL, max_num_seqs=MAX_SEQS, block_size=BLOCK_SIZE)
        self.groups = len(self.cpu.info.kv.windows)
        self.device = HostDevice()
        width = self.cpu._table.tables[0].shape[1]
        self.running = RunningSequences(MAX_SEQS, self.groups, width)
        self.buffers = StepBuffers(
            self.device,
            max_seqs=MAX_SEQS,
            max_tokens=MAX_TOKENS,
            groups=self.groups,
            width=width,
            block_size=BLOCK_SIZE,
            ring=3,
        )
        self.tokens: dict[int, list[int]] = {}  # running sequences' known tokens
        self.computed: dict[int, int] = {}
        self.blocks: dict[int, int] = {}
        self.next_block = 1
        self.step = 0

    def new_blocks(self, seq: int, tokens: int) -> list[list[int]]:
        more = -(-tokens // BLOCK_SIZE) - self.blocks[seq]
        self.blocks[seq] += more
        found = []
        for _ in range(self.groups):
            found.append(list(range(self.next_block, self.next_block + more)))
            self.next_block += more
        return found

    def plan(self, ends: list[int], prompts: list[list[int]], counts: dict[int, int]) -> StepPlan:
        """Ends, then starts with their first counts of tokens, then the others' counts."""
        for seq in ends:
            del self.tokens[seq], self.computed[seq], self.blocks[seq]
        starts, run, new = [], {}, {}
        for seq, count in counts.items():
            if seq in self.tokens:
                left = len(self.tokens[seq]) - self.computed[seq]
                run[seq] = min(count, left)
                if any(found := self.new_blocks(seq, self.computed[seq] + run[seq])):
                    new[seq] = found
        for prompt in prompts:
            seq = max([-1, *self.tokens]) + 1 + 10 * len(ends)
            self.tokens[seq], self.computed[seq], self.blocks[seq] = list(prompt), 0, 0
            run[seq] = min(7, len(prompt))
            blocks = self.new_blocks(seq, run[seq])
            starts.append(SequenceStart(seq, prompt, len(prompt), 0, blocks, SAMPLING))
        self.step += 1
        return StepPlan(
            self.step, [*run], [*run.values()], starts=starts, new_blocks=new, ends=ends
        )

    def compare(self, plan: StepPlan, tokens: int, seqs: int) -> None:
        """Both take the plan in; the device's arrays, padded, against the CPU's."""
        table = self.cpu._table
        for seq in plan.ends:
            table.end(seq)
        for start in plan.starts:
            table.start(start)
        for seq, blocks in plan.new_blocks.items():
            table.append_blocks(seq, blocks)
        rows = np.array([table.rows[seq] for seq in plan.seqs], np.int32)
        counts = np.array(plan.counts, np.int32)
        expected, sampling, *_ = self.cpu._pack(plan.seqs, rows, counts, {})
        table.computed[rows] += counts

        step = self.running.take(plan)
        self.buffers.upload(step, self.running.take_updates())
        self.buffers.unpack(tokens, seqs)
        total, own = step.tokens, step.sequences
        batch = self.buffers.batch(tokens, seqs, max_query=None, rows=len(step.sampled))
        np.testing.assert_array_equal(batch.tokens[:total], expected.tokens)
        np.testing.assert_array_equal(batch.positions[:total], expected.positions)
        np.testing.assert_array_equal(batch.query_starts[: own + 1], expected.query_starts)
        np.testing.assert_array_equal(batch.seq_lens[:own], expected.seq_lens)
        for ours, theirs in zip(batch.slots, expected.slots, strict=True):
            np.testing.assert_array_equal(ours[:total], theirs)
            assert (ours[total:] == -1).all()
        for ours, theirs in zip(batch.block_tables, expected.block_tables, strict=True):
            for s, length in enumerate(expected.seq_lens):
                used = -(-int(length) // BLOCK_SIZE)
                np.testing.assert_array_equal(ours[s, :used], theirs[s, :used])
        assert not batch.tokens[total:].any()
        assert not batch.positions[total:].any()
        assert not batch.seq_lens[own:].any()
        assert (batch.query_starts[own:] == total).all()
        assert batch.singles[0] == next((i for i, n in enumerate(plan.counts) if n != 1), own)
        assert step.sampled == [plan.seqs[index] for index in sampling]
        np.testing.assert_array_equal(batch.logit_rows, expected.query_starts[1:][sampling] - 1)

        # What the sampler would leave: a token a sequence that sampled.
        chosen = np.arange(len(sampling), dtype=np.int32) + 20 + self.step
        table.last_token[rows[sampling]] = chosen
        self.buffers.last_tokens[self.buffers.sample_rows[: len(sampling)]] = chosen
        for seq, count in zip(plan.seqs, plan.counts, strict=True):
            self.computed[seq] += count
        for seq, token in zip(step.sampled, chosen, strict=True):
            table.prefill.pop(seq, None)
            self.tokens[seq].append(int(token))


STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), max_size=1),  # which running sequence ends
        st.lists(st.lists(st.integers(3, 80), min_size=1, max_size=20), max_size=2),  # new prompts
        st.integers(1, 6),  # tokens each running sequence gets at most
        st.permutations(range(MAX_SEQS)),
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=40)
@given(steps=STEPS, padding=st.integers(0, 5))
def test_the_device_unpacks_what_the_cpu_shard_packs(steps, padding):
    rig = Rig()
    for ends, prompts, count, order in steps:
        running = [*rig.tokens]
        ended = [running[index] for index in ends if index < len(running)]
        prompts = prompts[: MAX_SEQS - len(running) + len(ended)]
        going = [running[i] for i in order if i < len(running) and running[i] not in ended]
        if not (going or prompts) or any(len(rig.tokens[seq]) >= 60 for seq in going):
            continue  # nothing to run, or no room for it
        plan = rig.plan(ended, prompts, dict.fromkeys(going, count))
        if plan.seqs:
            rig.compare(plan, min(sum(plan.counts) + padding, MAX_TOKENS), MAX_SEQS)


def test_a_decode_uploads_its_changes_only():
    rig = Rig()
    rig.compare(rig.plan([], [[5] * 7, [6] * 7], {}), 16, MAX_SEQS)
    rig.device.uploaded.clear()
    rig.compare(rig.plan([], [], {0: 1, 1: 1}), 2, 2)  # position 7: the block is there
    rig.compare(rig.plan([], [], {0: 1, 1: 1}), 2, 2)  # position 8: a new block a group
    without, with_blocks = rig.device.uploaded
    assert with_blocks == without + 4 * 2 * 2 * rig.groups
    assert without == 4 * rig.buffers._layout.rest


def test_a_long_cached_prefix_goes_ahead_in_pieces(monkeypatch):
    monkeypatch.setattr(step_buffers, "_MAX_UPDATES", 5)
    rig = Rig()
    prompt = [7] * 40
    rig.tokens[0], rig.computed[0], rig.blocks[0] = prompt, 36, 0
    blocks = rig.new_blocks(0, 40)
    start = SequenceStart(0, prompt, 40, 36, blocks, SAMPLING)
    rig.compare(StepPlan(1, [0], [4], starts=[start]), 4, MAX_SEQS)
    assert len(rig.device.uploaded) == -(-10 * rig.groups // 5)


def test_a_step_of_padding_touches_nothing():
    rig = Rig()
    rig.compare(rig.plan([], [[5] * 7, [6] * 7], {}), 16, MAX_SEQS)
    tables = rig.buffers.tables.copy()
    rig.buffers.upload(None, [])
    rig.buffers.unpack(8, MAX_SEQS)
    batch = rig.buffers.batch(8, MAX_SEQS, max_query=None)
    assert not batch.tokens.any()
    assert not batch.seq_lens.any()
    assert not batch.query_starts.any()
    assert all((slots == -1).all() for slots in batch.slots)
    np.testing.assert_array_equal(rig.buffers.tables, tables)


def test_a_sequence_that_comes_back_has_its_new_row():
    rig = Rig()
    rig.compare(rig.plan([], [[5] * 4, [6] * 4, [7] * 4], {}), 16, MAX_SEQS)
    seqs = [0, 1, 2]
    rig.compare(rig.plan([], [], dict.fromkeys(seqs, 1)), 4, 4)
    # Preempted and started again at once, in the others' places: the list of sequences is equal.
    starts = []
    for seq in (0, 1):
        rig.blocks[seq], rig.computed[seq] = 0, len(rig.tokens[seq]) - 1
        blocks = rig.new_blocks(seq, len(rig.tokens[seq]))
        starts.append(
            SequenceStart(seq, list(rig.tokens[seq]), 4, rig.computed[seq], blocks, SAMPLING)
        )
    new = {2: found} if any(found := rig.new_blocks(2, rig.computed[2] + 1)) else {}
    rig.compare(StepPlan(9, seqs, [1, 1, 1], starts=starts, ends=[0, 1], new_blocks=new), 4, 4)


def test_a_plan_that_contradicts_the_books_is_refused():
    rig = Rig()
    with pytest.raises(KeyError):
        rig.running.take(StepPlan(1, [3], [1]))
    with pytest.raises(KeyError):
        rig.running.take(StepPlan(1, [], [], ends=[3]))


def test_sizes():
    assert bucket_sizes(1, 1) == [1]
    assert bucket_sizes(1, 48) == [1, 2, 4, 8, 16, 32, 48]
    assert bucket_sizes(16, 100) == [16, 32, 64, 100]
    assert bucket_sizes(64, 256) == [64, 128, 160, 192, 224, 256]
    sizes = bucket_sizes(16, 2048)
    assert sizes[-3:] == [1536, 1792, 2048]
    assert all(b <= 1.25 * a for a, b in pairwise(sizes) if a >= 128)


@pytest.mark.parametrize(("size", "fit"), [(1, 2), (2, 2), (3, 8), (8, 8), (9, None)])
def test_a_step_takes_the_smallest_size_that_holds_it(size, fit):
    assert Buckets([8, 2]).fit(size) == fit
