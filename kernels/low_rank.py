"""Low-rank additions to a product, each for some of its rows: many LoRA adapters in one batch
(Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorray.kernels.linear import linear


@dataclass(frozen=True)
class LowRank:
    """`b @ a`, in place of a matrix `[out, in]`: a `[rank, in]`, b `[out, rank]`."""

    a: Any
    b: Any

    @property
    def nbytes(self) -> int:
        return int(self.a.nbytes + self.b.nbytes)


def add_low_rank(y: Any, x: Any, rows: Any, low: LowRank) -> None:
    """Add `x @ a.T @ b.T` to y `[T, out]`, in place, for the given rows of x `[T, in]`.

    `rows` is a slice, which copies nothing, or indices. A row's result is as `linear` makes it: up
    to 96 rows on a CPU it does not depend on the others.
    """
    y[rows] += linear(linear(x[rows], low.a), low.b)
