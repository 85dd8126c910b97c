"""Text to token ids and back, for any tokenizer the `tokenizers` library can run.

What this adds to the library is a rule about *control tokens*, the markers a model was trained to
obey (`<bos>`, `<|im_start|>`, `<end_of_turn>`): text that merely spells one is not one. Text from
a user is encoded with `parse_special=False`, a template's own markup with `parse_special=True`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tensorray.cluster.token_bytes import TokenBytes, UnsupportedDecoder

# Some checkpoints (DeepSeek's) leave turn markers unflagged among ordinary added tokens.
_LOOKS_LIKE_CONTROL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


class TokenizerError(ValueError):
    """A tokenizer is missing, damaged or of a kind that is not supported; says which file."""


class InvalidText(ValueError):
    """The text is not valid Unicode (it has an unpaired surrogate), so it has no tokens."""


@dataclass(frozen=True)
class ControlToken:
    """A control token's place in a text: characters `start` to `end`."""

    start: int
    end: int
    id: int


class Tokenizer:
    """A `tokenizers` tokenizer with the model's conventions about special tokens.

    `bos_id` and `eos_ids` are the ids that begin and end a text; `prefix_ids` and `suffix_ids`
    are what `encode` adds around one. `special_tokens` holds the markers by the names templates
    use ("bos_token"), `chat_templates` templates by name ("default").

    Encoding may be called from several threads.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.prefix_ids = list(prefix_ids)
        self.suffix_ids = list(suffix_ids)
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})

        added = backend.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        control = {
            id: token
            for id, token in added.items()
            if token.special or _LOOKS_LIKE_CONTROL.fullmatch(token.content)
        }
        backend.add_special_tokens(
            [
                AddedToken(token.content, special=True, normalized=False)
                for token in control.values()
                if not token.special
            ]
        )
        self._control = control
        self._finder = _ControlFinder({token.content: id for id, token in control.items()})
        # Any text may hold what the vocabulary does not know, so the unknown token is no forgery.
        unknown = backend.token_to_id(self.special_tokens.get("unk_token", "<unk>"))
        self._forgeable = frozenset(control) - {unknown}
        backend.encode_special_tokens = True  # control tokens are put in by encode_around alone
        self._later_backend = _for_later_text(backend)
        try:
            self._bytes = TokenBytes(backend)
        except UnsupportedDecoder as error:
            raise TokenizerError(str(error)) from error

    # --- what there is --------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """How many tokens there are (a model may pad its vocabulary beyond)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def control_strings(self) -> Iterable[str]:
        """The control tokens as text spells them."""
        return (token.content for token in self._control.values())

    @property
    def control_ids(self) -> Iterable[int]:
        """The control tokens: what text only holds where a template or a request puts it."""
        return self._control.keys()

    def is_special(self, token: int) -> bool:
        """Whether `skip_special_tokens` leaves the token out of decoded text."""
        return token in self._special

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special

    def id_to_token(self, token: int) -> str | None:
        """The vocabulary's own spelling of a token (`▁the`, `Ġthe`), None for an unused id."""
        return self._backend.id_to_token(token)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    @property
    def token_bytes(self) -> TokenBytes:
        """Token id -> the bytes it adds to a text, which may be part of a UTF-8 character."""
        return self._bytes

    def token_text(self, token: int) -> str:
        """A token alone as text; bytes that are no whole character show as U+FFFD."""
        return self._bytes[token].decode("utf-8", "replace")

    # --- text to tokens -------------------------------------------------------------------

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        parse_special: bool = False,
        continues: bool = False,
    ) -> list[int]:
        """Token ids of a text.

        With `add_special_tokens` the model's own prefix and suffix (often one BOS) go around it.
        With `parse_special` control tokens spelled in the text become those tokens; without,
        they are text like any other. Added tokens that are not control tokens (HTML tags and runs
        of newlines in Gemma, `<think>` in Qwen3) are ordinary vocabulary and always found. A text
        that `continues` another gets no space that the tokenizer puts before a text's start, and
        holds no control tokens.

        Raises InvalidText for a text with an unpaired surrogate.
        """
        controls = self.find_control_tokens(text) if parse_special else []
        ids = self._encode_later(text) if continues else self.encode_around(text, controls)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def find_control_tokens(self, text: str) -> list[ControlToken]:
        """Where a text spells control tokens: leftmost first, the longest at each place."""
        return list(self._finder.find(text))

    def encode_around(self, text: str, control_tokens: Sequence[ControlToken]) -> list[int]:
        """Token ids of a text in which exactly the given spellings are control tokens.

        The text between two of them is encoded as a whole, so tokens cross every other border
        just as they do in `encode`. `control_tokens` are in the order of the text.
        """
        ids: list[int] = []
        start = 0
        for token in control_tokens:
            flags = self._control[token.id]
            before = text[start : token.start]
            ids += self._encode_literally(
                before.rstrip() if flags.lstrip else before, at_start=start == 0
            )
            ids.append(token.id)
            start = token.end
            if flags.rstrip:
                start = len(text) - len(text[start:].lstrip())
        return ids + self._encode_literally(text[start:], at_start=start == 0)

    def _encode_later(self, text: str) -> list[int]:
        ids = self._encode_literally(text, at_start=False)
        if self._spell(ids) == text.encode():
            return ids
        # Some tokenizers put a space before any text. Behind a text that it does not merge with
        # there is none.
        for before in "\n,0a":
            start = self._encode_literally(before, at_start=False)
            both = self._encode_literally(before + text, at_start=False)
            rest = both[len(start) :]
            if both[: len(start)] == start and self._spell(rest) == text.encode():
                return rest
        return ids

    def _spell(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._bytes[id] for id in ids])

    def _encode_literally(self, text: str, *, at_start: bool = True) -> list[int]:
        ids = self._run(text, at_start=at_start)
        if self._forgeable.isdisjoint(ids):
            return ids
        # Some vocabularies can build a control token out of ordinary pieces (a unigram model holds
        # `</s>` as a piece). Cut every such spelling in two.
        ids = []
        start = 0
        for token in self.find_control_tokens(text):
            ids += self._run(text[start : token.start + 1], at_start=at_start and start == 0)
            start = token.start + 1
        return ids + self._run(text[start:], at_start=at_start and start == 0)

    def _run(self, text: str, *, at_start: bool) -> list[int]:
        backend = self._backend if at_start else self._later_backend
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise InvalidText("the text is not valid Unicode: an unpaired surrogate") from error

    # --- tokens to text -------------------------------------------------------------------

    def decode(self, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens, as the start of a text; bytes that are no character show as U+FFFD.

        See `Detokenizer` for text that comes bit by bit.
        """
        ids = [id for id in tokens if not (skip_special_tokens and id in self._special)]
        return self._bytes.of_text(ids).decode("utf-8", "replace")


class _ControlFinder:
    """Finds control tokens' spellings in text, by first character and then by length."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._lengths: dict[str, list[int]] = {}
        for spelling in ids:
            lengths = self._lengths.setdefault(spelling[0], [])
            if len(spelling) not in lengths:
                lengths.append(len(spelling))
        for lengths in self._lengths.values():
            lengths.sort(reverse=True)
        firsts = "".join(map(re.escape, self._lengths))
        self._candidate = re.compile(f"[{firsts}]") if firsts else None

    def find(self, text: str) -> Iterator[ControlToken]:
        if self._candidate is None:
            return
        end = 0
        for match in self._candidate.finditer(text):
            start = match.start()
            if start < end:
                continue
            for length in self._lengths[match[0]]:
                spelling = text[start : start + length]
                id = self._ids.get(spelling)
                if id is not None:
                    end = start + len(spelling)  # shorter where the text ends
                    yield ControlToken(start, end, id)
                    break


def _for_later_text(backend: Backend) -> Backend:
    """The backend for text that goes on, where it differs: no space is put in front."""
    scheme = b'"prepend_scheme":"first"'
    if backend.pre_tokenizer is None or scheme not in backend.pre_tokenizer.__getstate__():
        return backend
    pre_tokenizer = pre_tokenizers.Sequence([])
    pre_tokenizer.__setstate__(
        backend.pre_tokenizer.__getstate__().replace(scheme, b'"prepend_scheme":"never"')
    )
    later = Backend.from_str(backend.to_str())
    later.pre_tokenizer = pre_tokenizer
    later.encode_special_tokens = True
    return later
