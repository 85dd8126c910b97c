"""Blocks of prompts on their way from another replica, which has computed them.

They are in nobody's plan meanwhile, and nobody may have them until the fetch has ended, whatever
becomes of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tensorray.cluster.blocks import BlockManager
from tensorray.cluster.request import Source
from tensorray.cluster.sequence import Sequence


@dataclass(frozen=True)
class Fetch:
    """Blocks to be filled from another replica's, pairwise."""

    sequence: Sequence
    source: Source
    theirs: list[int]
    ours: list[int]
    given: int  # columns that the sequence has then
    after: int  # the last plan that may still use `ours` for whoever had them before


class Fetches:
    """Those that have not ended, cancelled sequences' included."""

    def __init__(self) -> None:
        self._all: dict[int, Fetch] = {}  # by sequence
        self._to_begin: list[Fetch] = []

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Fetch]:
        return iter(self._all.values())

    def add(
        self, s: Sequence, source: Source, given: int, blocks: BlockManager, *, after: int
    ) -> None:
        """Fill the first `given` columns of a sequence just admitted, once plan `after` is done."""
        pairs = [
            (theirs, ours)
            for there, here in zip(source.blocks, blocks.unfilled(s, given), strict=True)
            for theirs, ours in zip(there, here, strict=True)
            if ours
        ]
        theirs, ours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        fetch = self._all[s.seq] = Fetch(s, source, theirs, ours, given, after)
        self._to_begin.append(fetch)

    @property
    def wants_begin(self) -> bool:
        """Whether `begin` has still to tell of any."""
        return bool(self._to_begin)

    def begin(self, oldest: int) -> list[Fetch]:
        """Those that may begin, each told once, where no plan before `oldest` is out any more."""
        ready = [each for each in self._to_begin if each.after < oldest]
        self._to_begin = [each for each in self._to_begin if each.after >= oldest]
        return ready

    def end(self, seq: int) -> Fetch | None:
        """A sequence's fetch has ended. None: it is not one of these."""
        return self._all.pop(seq, None)


def given_columns(s: Sequence, blocks: BlockManager) -> int:
    """The leading columns that another replica holds for the sequence."""
    if (source := s.source) is None:
        return 0
    columns = {len(each) for each in source.blocks}
    if len(source.blocks) != blocks.num_groups or len(columns) != 1:
        return 0
    (given,) = columns
    # One token must be left to compute.
    return given if given * blocks.block_size < len(s.tokens) else 0
