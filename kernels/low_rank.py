"""Low-rank additions to a product, each for some of its rows: many LoRA adapters in one batch
(Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorray.kernels.linear import linear


@dataclass(frozen=True)
class Block:
    """b `[out, rank]` makes a range of the outputs from a range of A's rows."""

    outputs: slice
    ranks: slice
    b: Any


@dataclass(frozen=True)
class LowRank:
    """`B @ a`, in place of a matrix `[out, in]`: a `[rank, in]`, and B `[out, rank]` in blocks.

    Where matrices are fused into one, a has the rows of each one's A, and each has its own block;
    what no block covers is zero.
    """

    a: Any
    blocks: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        return int(self.a.nbytes) + sum(int(block.b.nbytes) for block in self.blocks)


def add_low_rank(y: Any, x: Any, rows: Any, low: LowRank) -> None:
    """Add `x @ a.T @ B.T` to y `[T, out]`, in place, for the given rows of x `[T, in]`.

    `rows` is a slice, which copies nothing, or indices. A row's result is as `linear` makes it: up
    to 96 rows on a CPU it does not depend on the others.
    """
    inner = linear(x[rows], low.a)
    for block in low.blocks:
        own = inner if len(low.blocks) == 1 else inner[:, block.ranks].copy()
        y[rows, block.outputs] += linear(own, block.b)
