"""A drafter that knows what comes, and is wrong where it is told to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from tensorray.actors.drafter import Drafter, Guess
from tensorray.actors.protocol import SequenceStart


class Oracle(Drafter):
    """`texts` are whole ones, prompts included: no prompt begins another. `errs(sequence, place)`
    says whether the guess for a place is to be wrong. A sequence that leaves its text has none."""

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        errs: Callable[[int, int], bool] = lambda seq, place: False,
    ) -> None:
        self._texts = texts
        self._errs = errs
        self._coming: dict[int, tuple[Sequence[int], int]] = {}  # a text, and how far it has come

    def start(self, start: SequenceStart) -> None:
        known = len(start.tokens)
        texts = (text for text in self._texts if list(text[:known]) == start.tokens)
        self._coming[start.seq] = next(texts, ()), known

    def end(self, seq: int) -> None:
        self._coming.pop(seq, None)

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        text, known = self._coming[seq]
        new = known + len(tokens)
        right = list(text[known:new]) == list(tokens)
        self._coming[seq] = text if right else (), new

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        found = []
        for seq, room in zip(seqs, rooms, strict=True):
            text, known = self._coming[seq]
            coming = enumerate(text[known : known + room], known)
            found.append([token + self._errs(seq, place) for place, token in coming])
        return found
