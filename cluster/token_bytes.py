"""What bytes each token stands for: a tokenizer's decoder, read as a table.

Text can be put together token by token only if a token's contribution does not depend on its
neighbours. For the decoders language models use it does not, once one counts in bytes: byte-level
BPE spells bytes with printable characters (GPT-2), SentencePiece spells a space as U+2581 and
rare bytes as `<0x0A>`. The one exception is the start of a text, where SentencePiece drops the
space it has put there itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class UnsupportedDecoder(ValueError):
    """The tokenizer's decoder is not one whose tokens are independent byte strings."""


class TokenBytes(dict[int, bytes]):
    """Token id -> the bytes it adds to the text; filled as tokens are met.

    Ids without a token (a vocabulary padded to a round number) add nothing.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._backend = backend
        self._rules = _Rules(backend)
        # Added tokens are text already, whatever alphabet the others are spelled in.
        self._added = {
            id: token.content for id, token in backend.get_added_tokens_decoder().items()
        }

    def __missing__(self, token: int) -> bytes:
        value = self[token] = self._bytes(token, self._rules.to_bytes)
        return value

    def first(self, token: int) -> bytes:
        """The bytes of a token that begins a text."""
        return self._bytes(token, self._rules.first_to_bytes)

    @property
    def leading_spaces(self) -> int:
        """How many spaces the decoder takes off the start of a whole text."""
        return self._rules.leading_spaces

    def of_text(self, tokens: Sequence[int]) -> bytes:
        """The bytes of a whole text."""
        data = self.first(tokens[0]) if tokens else b""
        data += b"".join([self[token] for token in tokens[1:]])
        spaces = min(len(data) - len(data.lstrip(b" ")), self.leading_spaces)
        return data[spaces:]

    def _bytes(self, token: int, to_bytes: Callable[[str], bytes]) -> bytes:
        if self._rules.byte_level and token in self._added:
            return self._added[token].encode()
        text = self._backend.id_to_token(token)
        return b"" if text is None else to_bytes(text)


class _Rules:
    """The decoder's steps, sorted into per-token ones and what happens at the start of a text."""

    def __init__(self, backend: Backend) -> None:
        self.byte_level = False
        self._byte_fallback = False
        self._replace: list[tuple[str, str]] = []
        self._dropped_first: str | None = None
        self.leading_spaces = 0
        fused = False
        for step in _steps(backend):
            kind = step["type"]
            if kind == "ByteLevel":
                self.byte_level = True
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Fuse":
                fused = True
            elif kind == "Replace" and "String" in step["pattern"]:
                self._replace.append((step["pattern"]["String"], step["content"]))
            elif kind == "Metaspace":
                self._replace.append((step["replacement"], " "))
                if step.get("prepend_scheme", "always") != "never":
                    self._dropped_first = step["replacement"]
            elif kind == "Strip" and fused and step["content"] == " " and step["stop"] == 0:
                self.leading_spaces = step["start"]
            else:
                raise UnsupportedDecoder(
                    f"the tokenizer's decoder has a step {json.dumps(step)}, which can't be "
                    "applied token by token; byte-level and SentencePiece decoders can"
                )

    def to_bytes(self, token: str) -> bytes:
        if self.byte_level:
            return _from_byte_level(token)
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()

    def first_to_bytes(self, token: str) -> bytes:
        if self._dropped_first is not None:
            token = token.replace(self._dropped_first, "")
        return self.to_bytes(token)


def _steps(backend: Backend) -> Iterator[dict[str, Any]]:
    if backend.decoder is None:
        raise UnsupportedDecoder("the tokenizer has no decoder, so tokens can't be turned to text")
    todo = [json.loads(backend.decoder.__getstate__())]
    while todo:
        step = todo.pop(0)
        if step["type"] == "Sequence":
            todo[:0] = step["decoders"]
        else:
            yield step


def byte_level_alphabet() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }


_BYTE_OF = {char: byte for byte, char in byte_level_alphabet().items()}


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # a token with a character outside the alphabet shows itself
        return token.encode()
