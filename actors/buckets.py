"""Sizes that steps are padded to, so that few graphs serve all steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def bucket_sizes(smallest: int, largest: int) -> list[int]:
    """Powers of two from `smallest` to 128, then four steps to each doubling; and `largest` itself.

    Few rows cost what reading the weights costs, however few; many cost by the row, so padding is
    kept under a fifth of them.
    """
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size = 2 * size if size < 128 else size + (1 << (size.bit_length() - 3))
    return [*sizes, largest]


class Buckets:
    """Sizes in rising order; `fit` finds the one a step is padded to."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sorted(set(sizes))

    def fit(self, size: int) -> int | None:
        """The smallest that holds `size`; None if none does."""
        index = bisect_left(self.sizes, size)
        return self.sizes[index] if index < len(self.sizes) else None
