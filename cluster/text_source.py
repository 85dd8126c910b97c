"""Text that comes in pieces, and readers that are written as if all of it were there.

A reader is a generator: it yields where it needs more text than there is, and decides by
characters alone, never by where a piece ends. So what it finds does not depend on the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from tensorray.cluster.json_scanner import JsonScanner
from tensorray.cluster.reply import Part, Reasoning, Text, joined

T = TypeVar("T")
Reading = Generator[None, None, T]


class Source:
    """What a reader reads from, and where it puts the parts it finds.

    `at` is the place in `text` that comes next. Space beside what is not text (a call, reasoning)
    belongs to neither, so space at the end of text waits for what follows.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._found: list[Part] = []
        self._space = ""  # at the end of the text so far
        self._kind: type[Text] | type[Reasoning] = Text
        self._at_edge = False  # nothing but space since the last part that was no text
        self._dropped = 0

    @property
    def position(self) -> int:
        """How many characters have been read."""
        return self._dropped + self.at

    def take(self) -> list[Part]:
        """The parts found since the last call."""
        found, self._found = self._found, []
        return joined(found)

    # --- out ---

    def write(self, text: str, kind: type[Text] | type[Reasoning] = Text) -> None:
        self._kind = kind
        text = self._space + text
        if self._at_edge:
            text = text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._at_edge = False
            self._found.append(kind(kept))

    def add(self, part: Part) -> None:
        """A part that is no text."""
        self._found.append(part)
        self.edge()

    def edge(self) -> None:
        """What comes next is of another kind: space on both sides goes."""
        self._space = ""
        self._at_edge = True

    def finish(self) -> None:
        """The text has ended."""
        if self._space and not self._at_edge:
            self._found.append(self._kind(self._space))
        self._space = ""

    # --- in ---

    def drop(self) -> None:
        """Forget what was read: no place in it is gone back to."""
        self._dropped += self.at
        self.text = self.text[self.at :]
        self.at = 0

    def rest(self) -> Reading[None]:
        """Pass all that comes on as text."""
        while True:
            self.write(self.text[self.at :])
            self.at = len(self.text)
            self.drop()
            if self.ended:
                return
            yield

    def peek(self) -> Reading[str]:
        """The next character; empty at the end."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def space(self) -> Reading[None]:
        """Skip space."""
        while (yield from self.peek()).isspace():
            self.at += 1

    def literal(self, expected: str) -> Reading[bool]:
        """Skip these characters; if others come, stay."""
        while True:
            here = self.text[self.at : self.at + len(expected)]
            if here == expected:
                self.at += len(expected)
                return True
            if self.ended or not expected.startswith(here):
                return False
            yield

    def run_of(self, belongs: Callable[[str], bool], most: int) -> Reading[str]:
        """Skip, and return, the characters that belong, `most` of them at most."""
        start = self.at
        while self.at - start < most:
            character = yield from self.peek()
            if not character or not belongs(character):
                break
            self.at += 1
        return self.text[start : self.at]

    def write_until(self, marker: str, kind: type[Text] | type[Reasoning] = Text) -> Reading[bool]:
        """Pass text on up to a marker, which comes next then; False: there is none."""
        while True:
            found = self.text.find(marker, self.at)
            end = found if found >= 0 else len(self.text)
            if found < 0 and not self.ended:
                end -= _begun(self.text[self.at :], marker)
            self.write(self.text[self.at : end], kind)
            self.at = end
            self.drop()
            if found >= 0:
                return True
            if self.ended:
                return False
            yield

    def json_value(self) -> Reading[str | None]:
        """Skip a JSON value, and return its text; None if what comes is none."""
        start = self.at
        scanner = JsonScanner()
        while True:
            self.at = scanner.scan(self.text, self.at)
            if self.ended and not scanner.done:
                scanner.finish()
            if scanner.done:
                return self.text[start : self.at]
            if scanner.failed:
                return None
            yield


def _begun(text: str, marker: str) -> int:
    """How many characters at the end of the text begin the marker."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
