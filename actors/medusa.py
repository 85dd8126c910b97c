"""Medusa heads: each guesses one token further from the model's last hidden state alone.

Cai et al., arXiv 2401.10774. Head i takes the normed hidden state that the newest token was chosen
from, adds to it a few times `silu(linear(x))`, and projects that onto the vocabulary: the token
i + 1 places after the newest one. The likeliest chain is what is guessed, without a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.drafter import Drafter, Guess
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.checkpoint.medusa import MedusaHead, load_medusa
from tensorray.builder.model import Model, ModelConfigError, Weights
from tensorray.kernels import activation


@dataclass(frozen=True)
class _Base:
    model: Model
    head: Weights
    ops: ArrayOps


class MedusaHeads(Drafter):
    """Guesses by a checkpoint's Medusa heads, on a CPU."""

    def __init__(
        self, heads: Sequence[MedusaHead], model: Model, head: Weights, *, cost: float
    ) -> None:
        """`head` are the weights of the model's own head, whose norm comes before these too."""
        self.cost = cost
        self.most = len(heads)
        self._heads = list(heads)
        self._base = _Base(model, head, ArrayOps(np, {}))
        self._hidden: dict[int, NDArray[np.float32]] = {}

    def end(self, seq: int) -> None:
        self._hidden.pop(seq, None)

    def resize(self, num_blocks: int) -> None:
        self._hidden.clear()

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        self._hidden[seq] = row.copy()

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        base = self._base
        hidden = np.stack([self._hidden[seq] for seq in seqs])
        normed = base.model.final_norm(base.ops, base.head, hidden)
        found: list[list[int]] = [[] for _ in seqs]
        for ahead, head in enumerate(self._heads):
            wanting = [i for i, room in enumerate(rooms) if room > ahead]
            if not wanting:
                break
            logits = head_logits(base.ops, head, normed[wanting])
            for i, row in zip(wanting, logits, strict=True):
                found[i].append(guess(seqs[i], ahead, row))
        return found


def head_logits(ops: ArrayOps, head: MedusaHead, x: Any) -> Any:
    """A head's logits `[R, vocab]` from normed hidden states `[R, hidden]`."""
    for weight, bias in head.blocks:
        x = activation.add(x, ops.silu(ops.linear(x, weight, bias)))
    return ops.linear(x, head.projection)


def open_medusa(path: Path, model: Model) -> list[MedusaHead]:
    """The heads in a directory, for a model. Raises CheckpointError or ModelConfigError saying what
    does not fit."""
    if type(model).final_norm is Model.final_norm:
        raise ModelConfigError(
            f"--speculative-config: {type(model).__name__} does not say what its final norm is "
            "(Model.final_norm), which Medusa heads come after"
        )
    return load_medusa(path, model.hidden_size, model.vocab_size)
