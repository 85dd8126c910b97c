"""Pooling: one vector for a whole sequence, from its rows of the last hidden states.

A pooled sequence only prefills. Its rows are those after the model's final norm, what transformers
calls `last_hidden_state`. It may come in chunks, and one that is preempted comes again from its
first token, or from where its pooling needs no row before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.protocol import SequenceStart
from tensorray.builder.model import Model

NOT_FINITE = "the model's hidden states hold NaN or infinity"
NO_STATES = "this model's definition has no final_norm, so there are no hidden states to pool"


@dataclass(frozen=True, slots=True)
class PooledChunk:
    """A chunk of a pooled sequence's prefill."""

    packed: int  # its first packed row
    begin: int  # that row's position
    count: int
    start: SequenceStart

    @property
    def completes(self) -> bool:
        return self.begin + self.count == len(self.start.tokens)

    @property
    def rows(self) -> range:
        """The packed rows that its pooling needs; none, where other chunks hold them."""
        ends = range(self.packed, self.packed + self.count)
        match self.start.pooling:
            case "last":
                return ends[-1:] if self.completes else ends[:0]
            case "cls":
                return ends[:1] if self.begin == 0 else ends[:0]
            case _:
                return ends


def has_states(model: Model) -> bool:
    """Whether a definition says what its last hidden states are."""
    return type(model).final_norm is not Model.final_norm


class Pooler:
    """What the pooled sequences of a shard have come to so far."""

    def __init__(self) -> None:
        self._sums: dict[int, NDArray[np.float64]] = {}

    def end(self, seq: int) -> None:
        """Forgets a sequence; one that is not known is fine."""
        self._sums.pop(seq, None)

    def pool(
        self, model: Model, chunks: Iterable[tuple[PooledChunk, NDArray[np.floating]]]
    ) -> tuple[dict[int, bytes], dict[int, str]]:
        """Take in a step's chunks with their states: the vectors of the sequences that it
        completes, and those that have none, with the reason."""
        found: dict[int, bytes] = {}
        failed: dict[int, str] = {}
        for chunk, states in chunks:
            seq = chunk.start.seq
            try:
                if not has_states(model):
                    raise ValueError(NO_STATES)
                vector = self.add(chunk, states)
            except ValueError as error:
                failed[seq] = str(error)
            else:
                if vector is not None:
                    found[seq] = vector
        return found, failed

    def add(self, chunk: PooledChunk, states: NDArray[np.floating]) -> bytes | None:
        """Take in the states of a chunk's `rows`, [rows, hidden]; the sequence's vector, float32
        [hidden] as little-endian bytes, once the chunk completes it.

        Raises ValueError for states that are not finite.
        """
        seq = chunk.start.seq
        if len(states):
            if chunk.begin == 0:  # maybe not for the first time
                self._sums.pop(seq, None)
            total = states.sum(axis=0, dtype=np.float64)
            self._sums[seq] = self._sums.get(seq, 0.0) + total
        if not chunk.completes:
            return None
        vector = self._sums.pop(seq)
        if chunk.start.pooling == "mean":
            vector = vector / len(chunk.start.tokens)
        if not np.isfinite(vector).all():
            raise ValueError(NOT_FINITE)
        return vector.astype("<f4").tobytes()
