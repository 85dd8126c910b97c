"""A shard's part in speculative decoding: what it guesses, and that all its ranks run the same.

The rank that samples guesses, at the start of a step, and tells the others, since two machines'
arithmetic need not agree to the bit. It also tells how many of the guesses were right, in place of
one token a sequence. Both travel in arrays whose size everybody knows, with -1 where there is
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.drafter import Drafter, Guess, Seen
from tensorray.actors.protocol import Drafting, SequenceStart
from tensorray.actors.ranks import Ranks
from tensorray.kernels.batch import Batch

if TYPE_CHECKING:
    from tensorray.actors.shard import SequenceTable

_NONE = -1


class Speculation:
    """Drafts of the sequences that run. `drafter` is None on a rank that is told of them."""

    def __init__(self, drafting: Drafting, drafter: Drafter | None) -> None:
        self.drafting = drafting
        self._drafter = drafter
        self._followed: set[int] = set()  # sequences that the drafter knows

    @property
    def watches(self) -> tuple[int, ...]:
        """The layers whose inputs `watch` wants (the number of layers: the last one's output)."""
        return () if self._drafter is None else self._drafter.watches

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
            # A beam's tokens are chosen elsewhere.
            if not (start.sampling.beam or start.pooling):
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
    ) -> dict[int, list[int]]:
        """On the rank that samples: `drawn[i]` chose `tokens[i]`. What each sequence gained.

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
        return gained

    def watch(
        self,
        seqs: Sequence[int],
        batch: Batch,
        guessed: Mapping[int, Sequence[int]],
        gained: Mapping[int, Sequence[int]],
        table: SequenceTable,
        states: Mapping[int, NDArray[Any]],
    ) -> None:
        """Show the drafter a step of `seqs`, after which the sequences that sampled have
        `gained` something, of what they `guessed`. `states` are `watches`'."""
        assert self._drafter is not None
        starts, first = batch.query_starts[:-1], batch.positions[batch.query_starts[:-1]]
        counts = np.diff(batch.query_starts)
        shown, following = [], []
        for index, seq in enumerate(seqs):
            if seq not in self._followed:
                continue
            if chosen := gained.get(seq):
                counts[index] -= 1 + len(guessed.get(seq, ())) - len(chosen)
                following.append(chosen[-1])
            elif seq in table.prefill:  # its prompt goes on
                tokens = table.prefill[seq].start.tokens
                following.append(tokens[first[index] + counts[index]])
            else:  # nothing could be chosen
                continue
            shown.append(index)
        if not shown:
            return
        rows = ranges(starts[shown], counts[shown])
        after = batch.tokens[np.minimum(rows + 1, len(batch.tokens) - 1)]
        after[np.cumsum(counts[shown]) - 1] = following
        self._drafter.watch(
            Seen(
                [seqs[index] for index in shown],
                counts[shown],
                first[shown],
                after,
                [each[shown] for each in batch.block_tables],
                {layer: state[rows] for layer, state in states.items()},
            )
        )


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


def ranges(first: NDArray[np.int32], counts: NDArray[np.int32]) -> NDArray[np.int32]:
    """`first[i]` and the `counts[i] - 1` numbers after it, for each i, end to end."""
    ends = np.cumsum(counts, dtype=np.int32)
    return np.arange(ends[-1], dtype=np.int32) + np.repeat(first - ends + counts, counts)


def rows_up_to(ends: NDArray[np.int32], drafts: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """The packed rows of each sequence's drafts, and the one before them: `ends` are the last."""
    lengths = np.array([len(draft) for draft in drafts], np.int32)
    return ranges(ends - lengths, lengths + 1)
