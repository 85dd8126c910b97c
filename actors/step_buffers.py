"""What a step tells the device: packed by the host, uploaded in one piece, unpacked there.

`RunningSequences` is the host's side: which row of the device's tables each sequence has, how far
it is computed, and what of its block tables the device has yet to hear. `StepBuffers` holds the
arrays on the device, always the same ones, since captured graphs know their addresses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.device import Device, Mark
from tensorray.actors.pooling import PooledChunk
from tensorray.actors.protocol import SequenceStart, StepPlan
from tensorray.kernels.batch import Batch
from tensorray.kernels.step import (
    SINGLES,
    TOKENS,
    TOKENS_AT,
    UPDATES,
    UPDATES_AT,
    StepLayout,
    unpack_step,
    update_tables,
)

Ints = NDArray[np.int32]

# Table updates that travel with a step; what exceeds them (the start of a sequence whose long
# prefix is cached) goes ahead of it.
_MAX_UPDATES = 8192


@dataclass(slots=True)
class Prefill:
    """A sequence whose known tokens are not all computed yet."""

    tokens: Ints  # those that were not computed at its start
    start: SequenceStart


@dataclass(frozen=True, slots=True)
class Scored:
    """A prefill chunk whose rows are scored for prompt logprobs."""

    packed: int  # its first packed token
    begin: int  # that token's position
    count: int
    start: SequenceStart


@dataclass(slots=True)
class Step:
    """One step, as the host sees it.

    A draft runs as a sequence of one token, in the row of the sequence that it is for, after all
    others (device_drafts.py).
    """

    tokens: int  # packed
    sequences: int
    rows: Ints  # [S], each sequence's row
    counts: Ints  # [S], tokens each of them runs
    lens: Ints  # [S], tokens cached once it has run
    given: Ints | None  # [T], -1 for a sequence's newest token; None: that is what all run
    sampled: list[int]  # the sequences that sample, in order
    logit_rows: Ints  # [R], their last packed rows, and then those of drafts
    sample_rows: Ints  # [R], their table rows
    scored: list[Scored]
    pooled: list[PooledChunk]
    drafts: int = 0  # the last ones of its sequences

    @property
    def is_decode(self) -> bool:
        """Whether every sequence runs one token and samples."""
        return len(self.logit_rows) == self.sequences == self.tokens


class RunningSequences:
    """The running sequences' state, a row each; rows are reused."""

    def __init__(self, max_num_seqs: int, groups: int, width: int) -> None:
        self.rows: dict[int, int] = {}
        self.computed = np.zeros(max_num_seqs, np.int32)  # tokens whose KV is in the cache
        self.prefill: dict[int, Prefill] = {}
        self._updates: list[int] = []  # flat table index, block id, …
        self._used = [[0] * max_num_seqs for _ in range(groups)]  # entries of each table
        self._firsts = [
            [(group * max_num_seqs + row) * width for row in range(max_num_seqs)]
            for group in range(groups)
        ]
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._last_seqs: list[int] | None = None
        self._last_rows = np.zeros(0, np.int32)

    def take(self, plan: StepPlan) -> Step:
        """Take in a plan's changes, and work out its step.

        Raises KeyError or IndexError on a plan that contradicts the books.
        """
        if plan.ends or plan.starts:
            self._last_seqs = None  # a sequence may come back in another row
        for seq in plan.ends:
            self._free.append(self.rows.pop(seq))
            self.prefill.pop(seq, None)
        for start in plan.starts:
            row = self.rows[start.seq] = self._free.pop()
            self.computed[row] = start.computed
            for used in self._used:
                used[row] = 0
            rest = np.array(start.tokens[start.computed :], np.int32)
            self.prefill[start.seq] = Prefill(rest, start)
            self._append_blocks(row, start.blocks)
        for seq, blocks in plan.new_blocks.items():
            self._append_blocks(self.rows[seq], blocks)
        return self._step(plan.seqs, plan.counts)

    def take_updates(self) -> list[int]:
        """What changed in the tables since it was taken last: flat index, block id, …"""
        updates, self._updates = self._updates, []
        return updates

    def _append_blocks(self, row: int, blocks: Sequence[Sequence[int]]) -> None:
        for used, firsts, ids in zip(self._used, self._firsts, blocks, strict=True):
            if ids:
                at = firsts[row] + used[row]
                used[row] += len(ids)
                if len(ids) == 1:
                    self._updates += (at, ids[0])
                else:
                    places = range(at, at + len(ids))
                    self._updates += chain.from_iterable(zip(places, ids, strict=True))

    def _step(self, seqs: list[int], counts: list[int]) -> Step:
        rows = self._rows_of(seqs)
        total = sum(counts)
        decodes = total == len(seqs) and not self.prefill
        runs = np.ones(len(seqs), np.int32) if decodes else np.array(counts, np.int32)
        lens = self.computed[rows] + runs
        if decodes:
            step = Step(total, total, rows, runs, lens, None, seqs, _arange(total), rows, [], [])
        else:
            step = self._mixed(seqs, rows, runs, lens)
        self.computed[rows] = lens
        return step

    def _mixed(self, seqs: list[int], rows: Ints, counts: Ints, lens: Ints) -> Step:
        """A step of prefill chunks, with or without decodes beside them."""
        ends = np.cumsum(counts)
        total = int(ends[-1])
        given = np.full(total, -1, np.int32)
        first = self.computed[rows]
        samples = np.ones(len(seqs), bool)
        scored = []
        pooled = []
        for index, seq in enumerate(seqs):
            prefill = self.prefill.get(seq)
            if prefill is None:
                continue
            count, begin = int(counts[index]), int(first[index])
            packed = int(ends[index]) - count
            done = begin - prefill.start.computed
            given[packed : packed + count] = prefill.tokens[done : done + count]
            whole = done + count == len(prefill.tokens)
            samples[index] = whole and not prefill.start.pooling
            if prefill.start.sampling.prompt_logprobs is not None:
                scored.append(Scored(packed, begin, count, prefill.start))
            if prefill.start.pooling:
                pooled.append(PooledChunk(packed, begin, count, prefill.start))
            if whole:
                del self.prefill[seq]
        sampling = np.flatnonzero(samples)
        return Step(
            tokens=total,
            sequences=len(seqs),
            rows=rows,
            counts=counts,
            lens=lens,
            given=given,
            sampled=[seqs[index] for index in sampling],
            logit_rows=(ends[sampling] - 1).astype(np.int32),
            sample_rows=rows[sampling],
            scored=scored,
            pooled=pooled,
        )

    def _rows_of(self, seqs: list[int]) -> Ints:
        # Decodes mostly come as they came in the step before.
        if seqs != self._last_seqs:
            self._last_rows = np.array([self.rows[seq] for seq in seqs], np.int32)
            self._last_seqs = seqs
        return self._last_rows


class StepBuffers:
    """The arrays of a step on the device, for up to `max_tokens` tokens and `max_seqs` sequences,
    and `max_drafts` besides.

    `ring` steps may be on their way to the device at once.
    """

    def __init__(
        self,
        device: Device,
        *,
        max_seqs: int,
        max_tokens: int,
        groups: int,
        width: int,
        block_size: int,
        ring: int,
        max_drafts: int = 0,
    ) -> None:
        xp = device.xp
        self._device = device
        self._layout = layout = StepLayout(max_seqs + max_drafts)
        self._block_size = block_size
        size = layout.rest + 2 * _MAX_UPDATES + max_tokens
        self._packed = xp.zeros(size, np.int32)
        self._staging = [device.pinned(4 * size).view(np.int32) for _ in range(ring)]
        self._marks: deque[Mark] = deque()
        self._next = 0
        self._given_at = 0  # in the upload, where the step's tokens are
        self.tables = xp.zeros((groups, max_seqs, width), np.int32)
        self.last_tokens = xp.zeros(max_seqs, np.int32)
        #: int32 [max_tokens], a step's tokens as they are packed.
        self.tokens = xp.zeros(max_tokens, np.int32)
        self._positions = xp.zeros(max_tokens, np.int32)
        self._slots = xp.full((groups, max_tokens), -1, np.int64)
        self._step_tables = xp.zeros((groups, layout.max_seqs, width), np.int32)

    @property
    def sample_rows(self) -> Any:
        """int32 on the device: the table rows of the sequences that sample in this step, and then
        of its drafts."""
        first = self._layout.sample_rows
        return self._packed[first : first + self._layout.max_seqs]

    @property
    def logit_rows(self) -> Any:
        """int32 on the device: the packed rows that `sample_rows` choose by."""
        first = self._layout.logit_rows
        return self._packed[first : first + self._layout.max_seqs]

    def set_last_tokens(self, rows: Ints, tokens: Ints) -> None:
        """Have rows go on from tokens that were sampled elsewhere."""
        xp = self._device.xp
        self.last_tokens[xp.asarray(rows)] = xp.asarray(tokens)

    def upload(self, step: Step | None, updates: list[int]) -> None:
        """Queue a step's upload, and what changes in the tables (`take_updates`); None: a step
        without sequences, all padding."""
        most = 2 * _MAX_UPDATES
        while len(updates) > most:
            self._send(None, updates[:most])
            self.update_tables()
            updates = updates[most:]
        self._send(step, updates)

    def update_tables(self) -> None:
        """Queue the upload's changes of the tables, for who reads them before `unpack`."""
        update_tables(self._packed, self.tables)

    def given(self, first: int, count: int) -> Any:
        """The uploaded tokens of the step from packed one `first` on, int32 [count] on the device,
        to write to before `unpack`. For steps whose tokens are given."""
        at = self._given_at + first
        return self._packed[at : at + count]

    def beside(self, group: int, ring: int) -> StepBuffers:
        """Buffers for steps of another model: of the same sequences, as large, by one group's
        block tables, whose changes are these ones' to make."""
        made = StepBuffers(
            self._device,
            max_seqs=len(self.last_tokens),
            max_tokens=len(self.tokens),
            groups=1,
            width=self.tables.shape[2],
            block_size=self._block_size,
            ring=ring,
        )
        made.tables = self.tables[group : group + 1]
        return made

    def unpack(self, tokens: int, seqs: int) -> None:
        """Queue the kernels that make of the upload what `batch` hands out."""
        self.update_tables()
        unpack_step(
            self._packed,
            self._layout,
            self.tables,
            self.last_tokens,
            self.tokens[:tokens],
            self._positions[:tokens],
            self._slots[:, :tokens],
            self._step_tables[:, :seqs],
            self._block_size,
        )

    def batch(
        self,
        tokens: int,
        seqs: int,
        *,
        max_query: int | None,
        rows: int = 0,
        chained: bool = False,
    ) -> Batch:
        """The step's metadata, for kernels: padded to so many tokens, sequences, logit rows."""
        layout, packed = self._layout, self._packed
        return Batch(
            tokens=self.tokens[:tokens],
            positions=self._positions[:tokens],
            query_starts=packed[layout.starts : layout.starts + seqs + 1],
            seq_lens=packed[layout.lens : layout.lens + seqs],
            block_tables=[table[:seqs] for table in self._step_tables],
            slots=[slots[:tokens] for slots in self._slots],
            logit_rows=packed[layout.logit_rows : layout.logit_rows + rows],
            max_query=max_query,
            singles=packed[SINGLES : SINGLES + 1] if max_query is None else None,
            chained=chained,
        )

    def _send(self, step: Step | None, updates: list[int]) -> None:
        if len(self._marks) == len(self._staging):
            self._marks.popleft().wait()
        packed, layout = self._staging[self._next], self._layout
        self._next = (self._next + 1) % len(self._staging)
        end = layout.rest + len(updates)
        packed[layout.rest : end] = updates
        packed[TOKENS], packed[UPDATES] = 0, len(updates) // 2
        packed[UPDATES_AT], packed[TOKENS_AT], packed[SINGLES] = layout.rest, -1, 0
        n = r = 0
        if step is not None:
            n, r = step.sequences, len(step.logit_rows)
            packed[TOKENS], packed[SINGLES] = step.tokens, _singles(step)
            packed[layout.rows : layout.rows + n] = step.rows
            packed[layout.starts] = 0
            np.cumsum(step.counts, out=packed[layout.starts + 1 : layout.starts + 1 + n])
            packed[layout.lens : layout.lens + n] = step.lens
            packed[layout.logit_rows : layout.logit_rows + r] = step.logit_rows
            packed[layout.sample_rows : layout.sample_rows + r] = step.sample_rows
            if step.given is not None:
                packed[TOKENS_AT] = self._given_at = end
                packed[end : end + step.tokens] = step.given
                end += step.tokens
        # Padding: sequences without tokens, logits of row 0 that nobody reads.
        packed[layout.rows + n : layout.starts] = 0
        packed[layout.starts + 1 + n : layout.lens] = packed[TOKENS]
        packed[layout.lens + n : layout.logit_rows] = 0
        packed[layout.logit_rows + r : layout.sample_rows] = 0
        if step is None:
            packed[layout.starts] = 0
        self._device.upload(packed[:end], self._packed)
        self._marks.append(self._device.mark())


def _singles(step: Step) -> int:
    """How many of its sequences come first that run one token each."""
    if step.tokens == step.sequences:
        return step.sequences
    return int((step.counts != 1).argmax())


_IDENTITY = np.zeros(0, np.int32)


def _arange(count: int) -> Ints:
    global _IDENTITY
    if len(_IDENTITY) < count:
        _IDENTITY = np.arange(max(count, 256), dtype=np.int32)
    return _IDENTITY[:count]
