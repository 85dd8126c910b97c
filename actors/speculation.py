"""A shard's part in speculative decoding: what it guesses, and that all its ranks run the same.

The rank that samples guesses, at the start of a step, and tells the others, since two machines'
arithmetic need not agree to the bit. It also tells how many of the guesses were right, in place of
one token a sequence. Both travel in arrays whose size everybody knows, with -1 where there is
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.drafter import Drafter, Guess
from tensorray.actors.protocol import Drafting, SequenceStart
from tensorray.actors.ranks import Ranks

if TYPE_CHECKING:
    from tensorray.actors.shard import SequenceTable

_NONE = -1


class Speculation:
    """Drafts of the sequences that run. `drafter` is None on a rank that is told of them."""

    def __init__(self, drafting: Drafting, drafter: Drafter | None) -> None:
        self.drafting = drafting
        self._drafter = drafter
        self._followed: set[int] = set()  # sequences that the drafter knows

    def reset(self, num_blocks: int) -> None:
        self._followed.clear()
        if self._drafter is not None:
            self._drafter.resize(num_blocks)

    def take(self, ends: Iterable[int], starts: Iterable[SequenceStart]) -> None:
        if self._drafter is None:
            return
        for seq in ends:
            self._followed.discard(seq)
            self._drafter.end(seq)
        for start in starts:
            if not start.sampling.beam:  # whose tokens are chosen elsewhere
                self._followed.add(start.seq)
                self._drafter.start(start)

    def draft(
        self,
        seqs: Sequence[int],
        counts: NDArray[np.int32],
        table: SequenceTable,
        ranks: Ranks | None,
        guess: Guess,
    ) -> dict[int, list[int]]:
        """Guesses where the plan has room for them; `counts` become the tokens that run."""
        roomy = [
            index
            for index in np.flatnonzero(counts > 1).tolist()
            if seqs[index] not in table.prefill
        ]
        if not roomy:
            return {}
        rooms = (counts[roomy] - 1).tolist()
        ours = [seqs[index] for index in roomy]
        if self._drafter is None:
            assert ranks is not None
            guesses = unpad(ranks.hear(sum(rooms)), rooms)
        else:
            rows = [table.rows[seq] for seq in ours]
            guesses = self._drafter.draft(ours, rooms, [each[rows] for each in table.tables], guess)
            if ranks is not None:
                ranks.tell(pad(guesses, rooms))
        counts[roomy] = [1 + len(tokens) for tokens in guesses]
        return {seq: tokens for seq, tokens in zip(ours, guesses, strict=True) if tokens}

    def take_tokens(
        self,
        seqs: Sequence[int],
        drawn: Sequence[int],
        tokens: Sequence[int],
        widths: Sequence[int] | None,
        hidden: NDArray[Any],
        ends: NDArray[np.int32],
    ) -> None:
        """On the rank that samples: `drawn[i]` chose `tokens[i]`.

        `seqs` are all that sampled; of `widths[i]` rows (None: one) of the residual stream `hidden`
        that `seqs[i]` had, `ends[i]` is the last.
        """
        assert self._drafter is not None
        gained: dict[int, list[int]] = {}
        for seq, token in zip(drawn, tokens, strict=True):
            if token >= 0 and seq in self._followed:
                gained.setdefault(seq, []).append(token)
        for index, seq in enumerate(seqs):
            if chosen := gained.get(seq):
                unused = 0 if widths is None else widths[index] - len(chosen)
                self._drafter.gained(seq, chosen, hidden[ends[index] - unused])


def pad(lists: Sequence[Sequence[int]], widths: Sequence[int]) -> NDArray[np.int32]:
    """Lists end to end, each padded to its width: int32 [sum(widths)]."""
    padded = np.full(sum(widths), _NONE, np.int32)
    first = 0
    for tokens, width in zip(lists, widths, strict=True):
        padded[first : first + len(tokens)] = tokens
        first += width
    return padded


def unpad(padded: NDArray[np.int32], widths: Sequence[int]) -> list[list[int]]:
    """The lists that `pad` was given."""
    pieces = np.split(padded, np.cumsum(widths)[:-1])
    return [piece[piece != _NONE].tolist() for piece in pieces]


def rows_up_to(ends: NDArray[np.int32], drafts: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """The packed rows of each sequence's drafts, and the one before them: `ends` are the last."""
    return np.concatenate(
        [
            np.arange(end - len(draft), end + 1, dtype=np.int32)
            for end, draft in zip(ends, drafts, strict=True)
        ]
    )
