"""Text from tokens as they come: whole characters only, and nothing of a stop string.

    tokens --Detokenizer--> text --StopStrings--> text a user may see

`OutputText` joins the two and knows which token ended the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tensorray.cluster.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
_MAX_UTF8_BYTES = 4


class Detokenizer:
    """Turns tokens into text, a push at a time, in constant time per token.

    However the tokens are split into pushes, the pushes' texts and `finish` together are the same
    text. A character whose bytes are spread over several tokens comes with the last of them;
    bytes that can't become a character show as U+FFFD as soon as that is certain.

    Special tokens are left out under `skip_special_tokens`, but for those in `shown`.

    `context` are tokens that came before (a prompt's): their text is not repeated, but bytes at
    their end that are no whole character yet are taken up. Without any, the text starts here, and
    a space that the tokenizer puts in front of every text is left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
        context: Sequence[int] | None = None,
    ) -> None:
        self._bytes = tokenizer.token_bytes
        hidden = tokenizer.special_ids - shown if shown else tokenizer.special_ids
        self._skipped = hidden if skip_special_tokens else frozenset[int]()
        self._decoder = _Utf8Decoder("replace")
        self._at_start = context is None
        self._leading_spaces = self._bytes.leading_spaces if context is None else 0
        if context:
            self.push(context[-_MAX_UTF8_BYTES:])

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        if self._skipped:
            skipped = self._skipped
            tokens = [token for token in tokens if token not in skipped]
        table = self._bytes
        if self._at_start and tokens:
            self._at_start = False
            data = table.first(tokens[0]) + b"".join([table[token] for token in tokens[1:]])
        else:
            data = b"".join([table[token] for token in tokens])
        if self._leading_spaces and data:
            data = self._without_leading_spaces(data)
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for a character cut short, or nothing."""
        return self._decoder.decode(b"", True)

    def _without_leading_spaces(self, data: bytes) -> bytes:
        kept = data.lstrip(b" ")
        stripped = min(len(data) - len(kept), self._leading_spaces)
        self._leading_spaces = self._leading_spaces - stripped if not kept else 0
        return data[stripped:]

    def _state(self) -> tuple[bytes, int]:
        return self._decoder.getstate()

    def _restore(self, state: tuple[bytes, int]) -> None:
        self._decoder.setstate(state)


class StopStrings:
    """Ends a text at the first of several strings, however the text is split into pushes.

    First is the one whose last character comes first (of several that end there, the longest).
    Text that may turn out to begin a stop string is held back until that is decided; with
    `include` the stop string is part of the text, so nothing needs to be held back.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = list(stops)
        self._include = include
        self._pending = ""  # the longest end of the text that begins a stop string
        self._found: str | None = None

    def found(self) -> str | None:
        """The stop string that ended the text."""
        return self._found

    def push(self, text: str) -> str:
        """The text that is certain now; once a stop string is found, none is."""
        if self._found is not None:
            return ""
        seen = self._pending + text
        shown = len(self._pending) if self._include else 0
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := seen.find(stop)) >= 0
        ]
        if ends:
            end, start, self._found = min(ends)
            self._pending = ""
            return seen[shown : end if self._include else start]
        begun = self._begun(seen)
        self._pending = seen[begun:]
        return seen[shown:] if self._include else seen[:begun]

    def finish(self) -> str:
        """The text held back, when no more comes."""
        held = "" if self._include else self._pending
        self._pending = ""
        return held

    def _begun(self, text: str) -> int:
        """Where the longest end of `text` that begins a stop string starts."""
        first = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(text[start:]):
                    first = start
                    break
                start = text.find(stop[0], start + 1, first)
        return first

    def _state(self) -> str:
        return self._pending

    def _restore(self, state: str) -> None:
        self._pending, self._found = state, None


class OutputText:
    """One sequence's text for the user: detokenized, ended at a stop string.

    After a `push`, `taken` says how many of its tokens belong to the text: all, or up to the one
    that completed the stop string named by `stopped`. Stop strings are looked for in the text of
    what follows the first `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=skip_special_tokens, shown=shown, context=prompt
        )
        self._stops = StopStrings(stop, include=include_stop) if stop else None
        self._exempt = min_tokens if stop else 0  # tokens still to come before stops count
        self.taken = 0

    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.found() if self._stops is not None else None

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens; empty once stopped."""
        stops = self._stops
        if stops is None:
            self.taken = len(tokens)
            return self._detokenizer.push(tokens)
        if stops.found() is not None:
            self.taken = 0
            return ""
        free = ""
        exempt = min(self._exempt, len(tokens))
        if exempt:
            free = self._detokenizer.push(tokens[:exempt])
            self._exempt -= exempt
            tokens = tokens[exempt:]
        state = self._detokenizer._state(), stops._state()
        text = stops.push(self._detokenizer.push(tokens))
        self.taken = exempt + len(tokens)
        if stops.found() is not None and len(tokens) > 1:
            # Which token was it? Take them again, one by one.
            self._detokenizer._restore(state[0])
            stops._restore(state[1])
            text, count = "", 0
            while stops.found() is None:
                text += stops.push(self._detokenizer.push(tokens[count : count + 1]))
                count += 1
            self.taken = exempt + count
        return free + text

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        if self._stops is None:
            return self._detokenizer.finish()
        if self._stops.found() is not None:
            return ""
        last = self._detokenizer.finish()
        return self._stops.push(last) + self._stops.finish()
