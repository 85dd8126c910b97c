"""A drafter that knows what comes, and is wrong where it is told to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from tensorray.actors.drafter import Drafter, Guess
from tensorray.actors.protocol import SequenceStart


class Oracle(Drafter):
    """`texts` are whole ones, prompts included, by how they begin: no prompt begins another.
    `errs(sequence, place)` says whether the guess for a place is to be wrong."""

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        errs: Callable[[int, int], bool] = lambda seq, place: False,
    ) -> None:
        self._texts = texts
        self._errs = errs
        self._known: dict[int, list[int]] = {}

    def start(self, start: SequenceStart) -> None:
        self._known[start.seq] = list(start.tokens)

    def end(self, seq: int) -> None:
        del self._known[seq]

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        self._known[seq] += tokens

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        found = []
        for seq, room in zip(seqs, rooms, strict=True):
            known = self._known[seq]
            at = len(known)
            texts = [text for text in self._texts if list(text[:at]) == known]
            coming = list(texts[0][at : at + room]) if texts else []
            found.append(
                [token + self._errs(seq, at + ahead) for ahead, token in enumerate(coming)]
            )
        return found
