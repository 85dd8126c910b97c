"""A draft model: a small one writes what the large one checks (Chen et al., arXiv 2302.01318).

It keeps a KV cache of its own under the block ids of the large one's, so a block that is shared,
handed on or given back is so for both. A sequence's tokens are run when it is first asked for
guesses, and from then on those that came since it was asked last.

What it keeps need not be right: blocks may hold what another sequence left there. That costs
guesses, never tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.drafter import Drafter, Guess
from tensorray.actors.protocol import KVGroups, SequenceStart
from tensorray.builder.array_ops import ArrayOps, LayerKV
from tensorray.builder.model import Model, ShardWeights
from tensorray.kernels.batch import Batch


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
        self._block_size = groups.block_size
        # The group that keeps blocks longest serves all layers.
        windows = groups.windows
        self._group = max(range(len(windows)), key=lambda g: (windows[g] is None, windows[g] or 0))
        self._window = windows[self._group]
        self._longest = min(max_model_len, model.max_positions)
        self._ops = ArrayOps(np, {}, max_positions=self._longest + 1)
        self._drafts: dict[int, _Draft] = {}

    @staticmethod
    def block_bytes(model: Model, block_size: int) -> int:
        """Bytes of one block of its cache."""
        specs = [model.kv_spec(layer) for layer in range(model.num_layers)]
        return sum(2 * 4 * spec.kv_heads * spec.head_dim * block_size for spec in specs)

    def resize(self, num_blocks: int) -> None:
        self._drafts.clear()
        self._ops.kv = {}  # what there was goes before the new comes
        views = {}
        for layer in range(self._model.num_layers):
            spec = self._model.kv_spec(layer)
            shape = (num_blocks, spec.kv_heads, self._block_size, spec.head_dim)
            pages = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
            window = min((w for w in (spec.window, self._window) if w is not None), default=None)
            views[layer] = LayerKV(*pages, 0, window)
        self._ops.kv = views

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
        table = tables[self._group]
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
        if self._window is not None:  # blocks from before it may be others' by now
            draft.computed = max(draft.computed, known - self._window)
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
        size = self._block_size
        counts = np.array([len(chunk) for chunk in chunks], np.int32)
        first = np.array([draft.computed for draft in drafts], np.int32)
        starts = np.zeros(len(drafts) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        owner = np.repeat(np.arange(len(drafts), dtype=np.int32), counts)
        positions = np.arange(starts[-1], dtype=np.int32) - starts[owner] + first[owner]
        blocks, offsets = np.divmod(positions, size)
        used = -(-int((first + counts).max()) // size)
        ops, model, weights = self._ops, self._model, self._weights
        ops.batch = Batch(
            tokens=np.array([token for chunk in chunks for token in chunk], np.int32),
            positions=positions,
            query_starts=starts,
            seq_lens=first + counts,
            block_tables=[np.ascontiguousarray(table[:, :used])],
            slots=[table[owner, blocks].astype(np.int64) * size + offsets],
            logit_rows=starts[1:] - 1,
        )
        x = model.embed(ops, weights.embed, ops.batch.tokens)
        for layer, layer_weights in weights.layers.items():
            x = model.layer(ops, layer_weights, x, layer)
        logits: NDArray[np.float32] = model.head(ops, weights.head, ops.select_rows(x))
        return logits
