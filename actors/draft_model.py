"""A draft model: a small one writes what the large one checks (Chen et al., arXiv 2302.01318).

It keeps a KV cache of its own (draft_cache.py). A sequence's tokens are run when it is first asked
for guesses, and from then on those that came since it was asked last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.draft_cache import DraftCache
from tensorray.actors.drafter import Drafter, Guess
from tensorray.actors.protocol import KVGroups, SequenceStart
from tensorray.builder.model import Model, ShardWeights


@dataclass
class _Draft:
    tokens: list[int]  # of the sequence
    computed: int = 0  # leading ones whose KV is in the cache


class DraftModel(Drafter):
    """Guesses by a model of the same vocabulary, on a CPU."""

    def __init__(
        self,
        model: Model,
        weights: ShardWeights,
        groups: KVGroups,
        *,
        cost: float,
        max_model_len: int,
        step_tokens: int,
    ) -> None:
        """`groups` is the shape of the large model's cache, `cost` a draft's in its steps. The
        model runs `step_tokens` tokens at once at most: a longer prompt is taken in over several
        steps, before the first guesses."""
        self.cost = cost
        self._model = model
        self._weights = weights
        self._step_tokens = step_tokens
        self._longest = min(max_model_len, model.max_positions)
        self._cache = DraftCache(model, groups, self._longest)
        self._drafts: dict[int, _Draft] = {}

    def resize(self, num_blocks: int) -> None:
        self._drafts.clear()
        self._cache.resize(num_blocks)

    def start(self, start: SequenceStart) -> None:
        # A reused prefix has been run for the sequence that computed it, if that had guesses.
        self._drafts[start.seq] = _Draft(list(start.tokens), start.computed)

    def end(self, seq: int) -> None:
        self._drafts.pop(seq, None)

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        draft = self._drafts[seq]
        draft.tokens += tokens
        # Guesses that were right have been run, all but the newest token.
        draft.computed = min(draft.computed, len(draft.tokens) - 1)

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        table = tables[self._cache.group]
        found: list[list[int]] = [[] for _ in seqs]
        drafts = [self._drafts[seq] for seq in seqs]
        chunks = [self._due(draft) for draft in drafts]
        running = self._within_budget(chunks)
        ahead = 0
        while running:
            rows = self._run([drafts[i] for i in running], [chunks[i] for i in running],
                             table[running])  # fmt: skip
            still = []
            for i, row in zip(running, rows, strict=True):
                draft = drafts[i]
                draft.computed += len(chunks[i])
                if ahead == 0 and draft.computed < len(draft.tokens):
                    continue  # its prompt is not all run yet
                token = guess(seqs[i], ahead, row)
                found[i].append(token)
                if len(found[i]) < rooms[i] and draft.computed < self._longest:
                    chunks[i] = [token]
                    still.append(i)
            running = still
            ahead += 1
        return found

    def _due(self, draft: _Draft) -> list[int]:
        """What is to run before the first guess, as much of it as runs at once."""
        known = len(draft.tokens)
        if known >= self._longest:
            return []
        window = self._cache.window
        if window is not None:  # blocks from before it may be others' by now
            draft.computed = max(draft.computed, known - window)
        return draft.tokens[draft.computed : draft.computed + self._step_tokens]

    def _within_budget(self, chunks: list[list[int]]) -> list[int]:
        """Which of the sequences run; the others have to wait for the next step."""
        left, running = self._step_tokens, []
        for i, chunk in enumerate(chunks):
            if chunk and len(chunk) <= left:
                left -= len(chunk)
                running.append(i)
        return running

    def _run(
        self, drafts: Sequence[_Draft], chunks: Sequence[Sequence[int]], table: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Logits after each sequence's chunk: `[len(drafts), vocab]`."""
        ops, model, weights = self._cache.ops, self._model, self._weights
        ops.batch = self._cache.batch(
            np.array([token for chunk in chunks for token in chunk], np.int32),
            [len(chunk) for chunk in chunks],
            np.array([draft.computed for draft in drafts], np.int32),
            table,
        )
        x = model.embed(ops, weights.embed, ops.batch.tokens)
        for layer, layer_weights in weights.layers.items():
            x = model.layer(ops, layer_weights, x, layer)
        logits: NDArray[np.float32] = model.head(ops, weights.head, ops.select_rows(x))
        return logits
