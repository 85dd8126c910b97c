"""Sizes that steps are padded to, so that few graphs serve all steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Powers of two, and `max_num_seqs` itself."""
    sizes = [1 << i for i in range(max_num_seqs.bit_length())]
    return sorted({*(size for size in sizes if size < max_num_seqs), max_num_seqs})


def mixed_sizes(smallest: int, max_tokens: int) -> list[int]:
    """Powers of two from `smallest` to 128, then four steps to each doubling.

    Few tokens cost what reading the weights costs, however few; many cost by the token, so padding
    is kept under a fifth of them.
    """
    sizes = {max_tokens}
    size = smallest
    while size < max_tokens:
        sizes.add(size)
        size = 2 * size if size < 128 else size + (1 << (size.bit_length() - 3))
    return sorted(sizes)


class Buckets:
    """Sizes in rising order; `fit` finds the one a step is padded to."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sorted(set(sizes))

    def fit(self, size: int) -> int | None:
        """The smallest that holds `size`; None if none does."""
        index = bisect_left(self.sizes, size)
        return self.sizes[index] if index < len(self.sizes) else None
