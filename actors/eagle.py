"""EAGLE, EAGLE-3: a layer goes on from the large model's hidden states (builder/models/eagle.py).

What the draft runs at position p is the hidden state of the token there with the embedding of the
token *after* it; what comes out stands for the hidden state at p + 1, and so tells the token at
p + 2. Each step's tokens run through the draft as soon as that step has chosen what follows them,
prompts too, so that its keys and values are there whenever guesses are asked for. Guesses go on
from the draft's own output, one after another, without a tree; what these leave in its cache lies
behind what is known, and the next step's tokens are written over it.

Hidden states are seen once, when the large model computes them. Where blocks come from elsewhere
(another replica, a beam, an embedding), the draft's own stay what they were before, and at the end
of a prefix that is reused, its last position may belong to another continuation. As in every
draft's cache that costs guesses, never tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.draft_cache import DraftCache
from tensorray.actors.drafter import Drafter, Guess, Seen
from tensorray.actors.eagle_parts import EagleParts
from tensorray.actors.protocol import KVGroups
from tensorray.builder.models.eagle import Eagle3


class _Reached(NamedTuple):
    """How far the draft has come with a sequence."""

    positions: int  # that it has run
    state: NDArray[np.float32]  # what came out at the last, [hidden]


class EagleDraft(Drafter):
    """Guesses by an EAGLE draft, on a CPU."""

    def __init__(
        self, parts: EagleParts, groups: KVGroups, *, cost: float, max_model_len: int
    ) -> None:
        """`groups` is the shape of the large model's cache, `cost` a draft's in its steps."""
        self.cost = cost
        self.watches = parts.draft.reads
        self._parts = parts
        self._longest = min(max_model_len, parts.draft.max_positions)
        self._cache = DraftCache(parts.draft, groups, self._longest)
        self._reached: dict[int, _Reached] = {}  # by sequence

    def resize(self, num_blocks: int) -> None:
        self._reached.clear()
        self._cache.resize(num_blocks)

    def end(self, seq: int) -> None:
        self._reached.pop(seq, None)

    def watch(self, seen: Seen) -> None:
        parts, ops = self._parts, self._cache.ops
        ends = seen.first + seen.counts
        if ends.max() > self._longest:
            seen = self._within(seen, ends <= self._longest)
            if not seen.seqs:
                return
            ends = seen.first + seen.counts
        states = [seen.states[layer] for layer in self.watches]
        if not isinstance(parts.draft, Eagle3):
            states = [parts.target.final_norm(ops, parts.target_head, states[0])]
        hidden = parts.draft.fuse(ops, parts.layer, states)
        table = seen.tables[self._cache.group]
        out = self._run(seen.following, hidden, seen.counts, seen.first, table)
        for seq, end, row in zip(seen.seqs, ends, np.cumsum(seen.counts) - 1, strict=True):
            self._reached[seq] = _Reached(int(end), out[row].copy())

    def _within(self, seen: Seen, kept: NDArray[np.bool_]) -> Seen:
        """Without sequences that are longer than the draft can follow; they have no guesses."""
        for seq, keep in zip(seen.seqs, kept, strict=True):
            if not keep:
                self.end(seq)
        rows = np.repeat(kept, seen.counts)
        return Seen(
            [seq for seq, keep in zip(seen.seqs, kept, strict=True) if keep],
            seen.counts[kept],
            seen.first[kept],
            seen.following[rows],
            [table[kept] for table in seen.tables],
            {layer: state[rows] for layer, state in seen.states.items()},
        )

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        table = tables[self._cache.group]
        found: list[list[int]] = [[] for _ in seqs]
        running = [i for i, seq in enumerate(seqs) if seq in self._reached]
        if not running:
            return found
        hidden = np.stack([self._reached[seqs[i]].state for i in running])
        while True:
            for i, row in zip(running, self._logits(hidden), strict=True):
                found[i].append(guess(seqs[i], len(found[i]), row))
            places = [self._reached[seqs[i]].positions + len(found[i]) - 1 for i in running]
            on = [
                j
                for j, i in enumerate(running)
                if len(found[i]) < rooms[i] and places[j] < self._longest
            ]
            if not on:
                return found
            running = [running[j] for j in on]
            hidden = self._run(
                np.array([found[i][-1] for i in running], np.int32),
                hidden[on],
                np.ones(len(on), np.int32),
                np.array([places[j] for j in on], np.int32),
                table[running],
            )

    def _run(
        self,
        following: NDArray[np.int32],
        hidden: NDArray[np.float32],
        counts: NDArray[np.int32],
        first: NDArray[np.int32],
        table: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """The layer, over hidden states `[T, hidden]` and the tokens that follow them."""
        parts, ops = self._parts, self._cache.ops
        ops.batch = self._cache.batch(following, counts, first, table)
        embeds = parts.embedder.token_rows(ops, parts.embed, following)
        x = np.concatenate([embeds, hidden], axis=-1)
        out: NDArray[np.float32] = parts.draft.layer(ops, parts.layer, x, 0)
        return out

    def _logits(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 `[S, vocab]`, of `[S, hidden]`; EAGLE-3's draft never guesses most tokens."""
        parts, ops = self._parts, self._cache.ops
        logits: NDArray[np.float32]
        if parts.tokens is None:
            logits = parts.target.project(ops, parts.target_head, hidden)
            return logits
        logits = np.full((len(hidden), parts.target.vocab_size), -np.inf, np.float32)
        logits[:, parts.tokens] = parts.draft.head(ops, parts.head, hidden)
        return logits
