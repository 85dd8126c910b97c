"""Prompt lookup: guess that what followed the last few tokens before follows them again.

The longest suffix of the sequence, of `shortest` to `longest` tokens, that occurs earlier in it is
looked for; its latest occurrence says what comes next. (LLMA, arXiv 2304.04487; A. Saxena, "Prompt
lookup decoding", 2023.) A copy may run into the tokens it makes, as in LZ77, so a loop is guessed
as far as there is room. A text the user predicts is looked through as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.drafter import Drafter, Guess
from tensorray.actors.protocol import SequenceStart

_BORDER = -1  # no token: nothing matches across it, and no copy goes beyond


class LookupDrafter(Drafter):
    """Prompt lookup over each sequence's own tokens."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._texts: dict[int, _Text] = {}

    def start(self, start: SequenceStart) -> None:
        self._texts[start.seq] = _Text([*start.prediction, _BORDER, *start.tokens])

    def end(self, seq: int) -> None:
        self._texts.pop(seq, None)

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        self._texts[seq].extend(tokens)

    def resize(self, num_blocks: int) -> None:
        self._texts.clear()

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        texts = (self._texts[seq].tokens for seq in seqs)
        return [
            look_up(text, self._shortest, self._longest, room)
            for text, room in zip(texts, rooms, strict=True)
        ]


def look_up(tokens: NDArray[np.int32], shortest: int, longest: int, room: int) -> list[int]:
    """Up to `room` tokens that followed the text's ending before; none if it is new.

    tokens int32 [n], below 0 where two texts meet.
    """
    newest = len(tokens) - 1
    places = np.flatnonzero(tokens[:newest] == tokens[newest])
    length = 1
    while len(places) and length < longest and tokens[newest - length] >= 0:
        longer = places[places >= length]
        longer = longer[tokens[longer - length] == tokens[newest - length]]
        if not len(longer):
            break
        places = longer
        length += 1
    if not len(places) or length < shortest:
        return []
    at = int(places[-1]) + 1
    copied: list[int] = tokens[at : at + room].tolist()
    for place in range(len(copied), room):  # on into the copy itself
        copied.append(copied[place - (newest + 1 - at)])
    return copied[: copied.index(_BORDER)] if _BORDER in copied else copied


class _Text:
    """Tokens in an array with room to grow."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._length = len(tokens)
        self._array = np.array(tokens, np.int32)

    @property
    def tokens(self) -> NDArray[np.int32]:
        return self._array[: self._length]

    def extend(self, tokens: Sequence[int]) -> None:
        end = self._length + len(tokens)
        if end > len(self._array):
            self._array = np.concatenate([self._array, np.zeros(end, np.int32)])
        self._array[self._length : end] = tokens
        self._length = end
