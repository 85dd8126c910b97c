"""Where a JSON value ends, in text that comes in pieces (RFC 8259)."""

from __future__ import annotations

import re

_MAX_DEPTH = 256

_SPACE = re.compile(r"[ \t\n\r]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_WORD = re.compile(r"[-+.0-9a-zA-Z]+")
_VALID_WORD = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_HEX = frozenset("0123456789abcdefABCDEF")


class JsonScanner:
    """Follows one value from its first character, without building it.

    `done` once the value is whole, `failed` at the first character that no value could have there.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []  # the closers of the containers around
        self._expect = "value"
        self._word = ""  # of a number, true, false or null so far
        self._digits = 0  # of a \u escape that are still to come
        self._is_key = False

    def scan(self, text: str, at: int = 0) -> int:
        """Go on from `text[at]`; returns where the value, what is known of it, or the text ends."""
        while at < len(text) and not self.done and not self.failed:
            at = self._step(text, at)
        return at

    def finish(self) -> None:
        """No more text comes: a number may be whole, anything else that goes on has failed."""
        if self._expect == "word" and not self._open:
            self._end_word()
        if not self.done:
            self.failed = True

    def _step(self, text: str, at: int) -> int:
        character = text[at]
        match self._expect:
            case "string":
                if plain := _PLAIN.match(text, at):
                    return plain.end()
                if character == "\\":
                    self._expect = "escape"
                elif character == '"':
                    self._end_string()
                else:
                    self.failed = True
                    return at
                return at + 1
            case "escape":
                if self._digits:
                    self._digits -= 1
                    self.failed = character not in _HEX
                elif character == "u":
                    self._digits = 4
                else:
                    self.failed = character not in '"\\/bfnrt'
                if not self._digits:
                    self._expect = "string"
                return at if self.failed else at + 1
            case "word":
                if word := _WORD.match(text, at):
                    self._word += word[0]
                    return word.end()
                self._end_word()
                return at
        if space := _SPACE.match(text, at):
            return space.end()
        return self._structure(character, at)

    def _structure(self, character: str, at: int) -> int:
        """A character that is neither space nor inside a string or word."""
        expect = self._expect
        if expect == "colon":
            self.failed = character != ":"
            self._expect = "value"
        elif expect == "comma":
            if character == self._open[-1]:
                self._close()
            else:
                self.failed = character != ","
                self._expect = "key" if self._open[-1] == "}" else "value"
        elif self._open and character == self._open[-1] and expect.startswith("first"):
            self._close()
        elif character == '"':
            self._is_key = expect.endswith("key")
            self._expect = "string"
        elif expect.endswith("key"):
            self.failed = True
        elif character in "{[":
            self.failed = len(self._open) == _MAX_DEPTH
            self._open.append("}" if character == "{" else "]")
            self._expect = "first key" if character == "{" else "first value"
        elif _WORD.match(character):
            self._word = ""
            self._expect = "word"
            return at
        else:
            self.failed = True
        return at if self.failed else at + 1

    def _end_string(self) -> None:
        if self._is_key:
            self._is_key = False
            self._expect = "colon"
        else:
            self._end_value()

    def _end_word(self) -> None:
        if _VALID_WORD.fullmatch(self._word):
            self._end_value()
        else:
            self.failed = True

    def _close(self) -> None:
        self._open.pop()
        self._end_value()

    def _end_value(self) -> None:
        self.done = not self._open
        self._expect = "comma"
