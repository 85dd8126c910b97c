"""The tokenizer a GGUF file carries in its metadata (ggml's GGUF specification).

`tokenizer.ggml.model` names the algorithm: "llama" is SentencePiece BPE by piece scores, "gpt2"
is byte-level BPE by a list of merges. For the latter the file does not carry the pre-tokenizer (the
regular expressions that cut text into words), only its name, so a table of them is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tensorray.cluster.sentencepiece_tokenizer import PieceType, add_marked_tokens, piece_bpe
from tensorray.cluster.tokenizer import Tokenizer, TokenizerError

# Tokens that end a turn or a text. Few files name all of theirs in the metadata.
_END_TOKENS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
)
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the specification
    "mask_token": "mask_token_id",
}

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_WORD_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_HEAD = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_LLAMA3 = _WORD_HEAD + r"|\p{N}{1,3}" + _WORD_TAIL
_QWEN2 = _WORD_HEAD + r"|\p{N}" + _WORD_TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SYMBOLS_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    + _SYMBOLS_SPACES
)
_ENDING = rf"(?i:{_CONTRACTIONS})?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}" + _SYMBOLS_SPACES
)
# Letters escaped here are ones that Unicode normalization would change in this file.
_DEEPSEEK_LETTERS = (
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
    r"ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ"
    r"\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN_AND_HANGUL = "[一-龥ࠀ-一가-퟿]+"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words before BPE: each expression in turn cuts what is left.

    `ignore_merges`: a word that is a token is that token, whatever the merges say.
    `add_bos`: whether BOS begins a text, when the file does not say.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: Callable[[], normalizers.Normalizer] | None = None


_llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_qwen2 = PreTokenizer((_QWEN2,), normalizer=normalizers.NFC)
_gpt2 = PreTokenizer((_GPT2,))
_digits_gpt2 = PreTokenizer((r"\p{N}", _GPT2))
_gpt4o = PreTokenizer((_GPT4O,))
_llama3_plain = PreTokenizer((_LLAMA3,))

#: `tokenizer.ggml.pre` -> the pre-tokenizer that each family's own tokenizer uses.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "falcon3": _llama3,
    "pixtral": _llama3,
    "lfm2": _llama3,
    "dbrx": _llama3_plain,
    "smaug-bpe": _llama3_plain,
    "glm4": _llama3_plain,
    "chatglm-bpe": _llama3_plain,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "megrez": _qwen2,
    "stablelm2": PreTokenizer((_QWEN2,)),
    "hunyuan": PreTokenizer((_QWEN2,)),
    "gpt-2": _gpt2,
    "phi-2": _gpt2,
    "mpt": _gpt2,
    "olmo": _gpt2,
    "jais": _gpt2,
    "exaone4": _gpt2,
    "smollm": _digits_gpt2,
    "starcoder": _digits_gpt2,
    "refact": _digits_gpt2,
    "command-r": _digits_gpt2,
    "codeshell": _digits_gpt2,
    "exaone": _digits_gpt2,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": _gpt4o,
    "llama4": _gpt4o,
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            _HAN_AND_HANGUL,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, r"\p{N}")
    ),
    "deepseek-v3": PreTokenizer(
        (
            r"\p{N}{1,3}",
            r"[一-龥\x{3040}-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
            r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}


def from_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer described by a GGUF file's metadata.

    Raises TokenizerError for a model or pre-tokenizer that is not known, or missing keys.
    """
    file = _Vocabulary(metadata)
    if file.model == "llama":
        backend = piece_bpe(
            file.tokens,
            file.scores(),
            file.types,
            add_space_prefix=bool(file.get("add_space_prefix", True)),
        )
        add_bos = True
    elif file.model == "gpt2":
        pre = file.pre_tokenizer()
        backend = _byte_level_bpe(file, pre)
        add_bos = pre.add_bos
    else:
        raise TokenizerError(
            f"tokenizer.ggml.model is {file.model!r}; supported are 'llama' and 'gpt2'"
        )
    return Tokenizer(
        backend,
        bos_id=file.id("bos_token_id"),
        eos_ids=file.eos_ids(),
        prefix_ids=file.ids_if(file.get("add_bos_token", add_bos), "bos_token_id"),
        suffix_ids=file.ids_if(file.get("add_eos_token", False), "eos_token_id"),
        special_tokens=file.special_tokens(),
        chat_templates=file.chat_templates(),
    )


class _Vocabulary:
    """Reads the `tokenizer.*` keys, checking them."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.model = str(self._required("model"))
        self.tokens: Sequence[str] = list(self._required("tokens"))
        types = self.get("token_type")
        self.types: Sequence[int] = (
            [PieceType.NORMAL] * len(self.tokens) if types is None else [int(t) for t in types]
        )
        if len(self.types) != len(self.tokens):
            raise TokenizerError(
                f"tokenizer.ggml.token_type has {len(self.types)} entries for "
                f"{len(self.tokens)} tokens"
            )
        if unknown := set(self.types) - set(PieceType):
            raise TokenizerError(f"tokenizer.ggml.token_type {min(unknown)} is not known")

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def _required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise TokenizerError(f"the GGUF file has no tokenizer.ggml.{key}")
        return value

    def scores(self) -> Sequence[float]:
        scores = [float(score) for score in self._required("scores")]
        if len(scores) != len(self.tokens):
            raise TokenizerError(
                f"tokenizer.ggml.scores has {len(scores)} entries for {len(self.tokens)} tokens"
            )
        return scores

    def merges(self) -> list[tuple[str, str]]:
        # A piece may begin with a space but holds none after (bytes are spelled printably).
        pairs = []
        for merge in self._required("merges"):
            cut = merge.find(" ", 1)
            if cut < 0:
                raise TokenizerError(f"tokenizer.ggml.merges has an entry {merge!r} of one piece")
            pairs.append((merge[:cut], merge[cut + 1 :]))
        return pairs

    def pre_tokenizer(self) -> PreTokenizer:
        name = str(self.get("pre", "default"))
        try:
            return PRE_TOKENIZERS[name]
        except KeyError:
            raise TokenizerError(
                f"tokenizer.ggml.pre is {name!r}, which is not known, so text can't be cut as the "
                f"model was trained; known are {', '.join(PRE_TOKENIZERS)}. Pass --tokenizer with "
                "the model's original tokenizer"
            ) from None

    def id(self, key: str) -> int | None:
        value = self.get(key)
        return int(value) if value is not None and 0 <= int(value) < len(self.tokens) else None

    def ids_if(self, wanted: Any, key: str) -> list[int]:
        id = self.id(key)
        return [id] if wanted and id is not None else []

    def eos_ids(self) -> list[int]:
        named = [self.id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        guessed = [self.tokens.index(token) for token in _END_TOKENS if token in self.tokens]
        guessed = [id for id in guessed if self.types[id] == PieceType.CONTROL]
        return list(dict.fromkeys(id for id in [*named, *guessed] if id is not None))

    def special_tokens(self) -> dict[str, str]:
        ids = {name: self.id(key) for name, key in _SPECIAL_KEYS.items()}
        return {name: self.tokens[id] for name, id in ids.items() if id is not None}

    def chat_templates(self) -> dict[str, str]:
        start = "tokenizer.chat_template"
        return {
            key[len(start) + 1 :] or "default": str(template)
            for key, template in self._metadata.items()
            if key == start or key.startswith(start + ".")
        }


def _byte_level_bpe(file: _Vocabulary, pre: PreTokenizer) -> Backend:
    vocab = {token: id for id, token in reversed(list(enumerate(file.tokens)))}
    merges = file.merges()
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizer.ggml.merges does not fit the tokens: {error}") from error
    backend = Backend(model)
    if pre.normalizer is not None:
        backend.normalizer = pre.normalizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(each), "isolated") for each in pre.expressions),
            pre_tokenizers.ByteLevel(
                add_prefix_space=bool(file.get("add_space_prefix", False)), use_regex=False
            ),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    add_marked_tokens(backend, file.tokens, file.types)
    return backend
