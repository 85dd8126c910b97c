"""Who gets how much of what a plan has left for prefills.

Half of it goes to the oldest, which so always gets on; the other half to those with the least left,
so that a short prompt passes long ones.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from tensorray.cluster.sequence import Sequence


def shares(budget: int, by_rank: Ordered[Sequence]) -> dict[Sequence, int]:
    """Tokens for each of the sequences, which come in the order of their rank."""
    chunk = dict.fromkeys(by_rank, 0)
    for_oldest = (budget + 1) // 2
    for s in by_rank:
        chunk[s] = min(for_oldest, s.target - s.computed)
        for_oldest -= chunk[s]
        budget -= chunk[s]
    for s in sorted(by_rank, key=lambda s: (s.level, s.target - s.computed)):
        extra = min(budget, s.target - s.computed - chunk[s])
        chunk[s] += extra
        budget -= extra
    return chunk
