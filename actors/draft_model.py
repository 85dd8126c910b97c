"""A draft model: a small one writes what the large one checks (Chen et al., arXiv 2302.01318).

It keeps a KV cache (draft_cache.py) and books (draft_books.py) of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.draft_books import DraftBooks
from tensorray.actors.draft_cache import DraftCache
from tensorray.actors.drafter import Drafter, Guess
from tensorray.actors.protocol import KVGroups, SequenceStart
from tensorray.builder.checkpoint.base import Checkpoint
from tensorray.builder.checkpoint.eagle import eagle_method
from tensorray.builder.model import Model, ModelConfigError, ShardWeights
from tensorray.builder.registry import resolve


def define_draft_model(checkpoint: Checkpoint, vocab_size: int) -> Model:
    """The definition of a draft model for a model of so many tokens. Raises ModelConfigError if it
    has others, or is none by itself."""
    if method := eagle_method(checkpoint):
        raise ModelConfigError(
            f"--speculative-config: {checkpoint.path} is no draft model by itself, but an EAGLE "
            f'draft: add "method": "{method}"'
        )
    model = resolve(checkpoint.config)(checkpoint.config)
    if model.vocab_size != vocab_size:
        raise ModelConfigError(
            f"--speculative-config: the draft model {checkpoint.path} has {model.vocab_size} "
            f"tokens and the model {vocab_size}; they have to share a vocabulary"
        )
    return model


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
        longest = min(max_model_len, model.max_positions)
        self._cache = DraftCache(model, groups, longest)
        self._books = DraftBooks(longest, self._cache.window, step_tokens)

    def resize(self, num_blocks: int) -> None:
        self._books.clear()
        self._cache.resize(num_blocks)

    def start(self, start: SequenceStart) -> None:
        self._books.start(start)

    def end(self, seq: int) -> None:
        self._books.end(seq)

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        self._books.gained(seq, tokens)

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        table, books = tables[self._cache.group], self._books
        places = {seq: place for place, seq in enumerate(seqs)}
        found: dict[int, list[int]] = {seq: [] for seq in seqs}
        chunks = books.due(seqs)
        ahead = 0
        while chunks:
            rows = self._run(chunks, table[[places[seq] for seq in chunks]])
            next_chunks = {}
            for (seq, chunk), row in zip(chunks.items(), rows, strict=True):
                draft, guesses = books[seq], found[seq]
                draft.computed += len(chunk)
                if ahead == 0 and not draft.caught_up:
                    continue
                guesses.append(guess(seq, ahead, row))
                if len(guesses) < rooms[places[seq]] and draft.computed < books.longest:
                    next_chunks[seq] = guesses[-1:]
            chunks = next_chunks
            ahead += 1
        return [found[seq] for seq in seqs]

    def _run(
        self, chunks: Mapping[int, Sequence[int]], table: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Logits after each sequence's chunk: `[len(chunks), vocab]`."""
        ops, model, weights = self._cache.ops, self._model, self._weights
        ops.batch = self._cache.batch(
            np.array([token for chunk in chunks.values() for token in chunk], np.int32),
            [len(chunk) for chunk in chunks.values()],
            np.array([self._books[seq].computed for seq in chunks], np.int32),
            table,
        )
        x = model.embed(ops, weights.embed, ops.batch.tokens)
        for layer, layer_weights in weights.layers.items():
            x = model.layer(ops, layer_weights, x, layer)
        logits: NDArray[np.float32] = model.head(ops, weights.head, ops.select_rows(x))
        return logits
