"""What a draft model has run of each sequence, and what it is to run before it guesses.

A sequence's tokens are run when it is first asked for guesses, and from then on those that came
since it was asked last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensorray.actors.protocol import SequenceStart


@dataclass
class Draft:
    """A sequence, as the draft model knows it."""

    tokens: list[int]
    computed: int = 0  # leading tokens whose keys and values are in its cache, guesses included

    @property
    def caught_up(self) -> bool:
        """Whether all its tokens have been run."""
        return self.computed >= len(self.tokens)


class DraftBooks:
    """The sequences that run, by number."""

    def __init__(self, longest: int, window: int | None, step_tokens: int) -> None:
        """Positions below `longest` can be run, `step_tokens` tokens at once. `window` is how many
        tokens back a sequence's blocks are its own (None: all of them)."""
        self.longest = longest
        self._window = window
        self._step_tokens = step_tokens
        self._drafts: dict[int, Draft] = {}

    def __getitem__(self, seq: int) -> Draft:
        return self._drafts[seq]

    def start(self, start: SequenceStart) -> None:
        # A reused prefix has been run for the sequence that computed it, if that had guesses.
        self._drafts[start.seq] = Draft(list(start.tokens), start.computed)

    def end(self, seq: int) -> None:
        self._drafts.pop(seq, None)

    def clear(self) -> None:
        self._drafts.clear()

    def gained(self, seq: int, tokens: Sequence[int]) -> None:
        draft = self._drafts[seq]
        draft.tokens += tokens
        # Guesses that were right have been run, all but the newest token.
        draft.computed = min(draft.computed, len(draft.tokens) - 1)

    def due(self, seqs: Iterable[int]) -> dict[int, list[int]]:
        """What of these sequences is to run before their first guesses, as much as runs at once.
        Those that there is no room for have to wait for the next step."""
        left, found = self._step_tokens, {}
        for seq in seqs:
            chunk = self._chunk(self._drafts[seq])
            if chunk and len(chunk) <= left:
                left -= len(chunk)
                found[seq] = chunk
        return found

    def _chunk(self, draft: Draft) -> list[int]:
        known = len(draft.tokens)
        if known >= self.longest:
            return []
        if self._window is not None:  # blocks from before it may be others' by now
            draft.computed = max(draft.computed, known - self._window)
        return draft.tokens[draft.computed : draft.computed + self._step_tokens]
