"""Small tokenizers of every kind, built in memory."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tensorray.cluster.sentencepiece_tokenizer import PieceType, piece_bpe
from tensorray.cluster.token_bytes import byte_level_alphabet
from tensorray.cluster.tokenizer import Tokenizer

BYTE_LEVEL_WORDS = ["Hello", "the", " the", " world", "user", "assistant", "end", "im"]
BYTE_LEVEL_MARKERS = ["<|begin|>", "<|im_start|>", "<|im_end|>", "[INST]"]
SPM_PIECES = ["▁Hello", "▁the", "Hello", "▁world", "user", "model", "end_of"]


def merges_for(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges that build each word from its characters, left to right."""
    pieces: dict[str, None] = {}
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for cut in range(1, len(word)):
            merges[word[:cut], word[cut]] = None
            pieces[word[: cut + 1]] = None
    return list(pieces), list(merges)


def byte_level(chat_template: str | None = None) -> Tokenizer:
    """Byte-level BPE: four flagged markers, `<|tool|>` that is none, `<think>` that is a word."""
    alphabet = byte_level_alphabet()
    spelled = ["".join(alphabet[byte] for byte in word.encode()) for word in BYTE_LEVEL_WORDS]
    pieces, merges = merges_for(spelled)
    vocab = {token: i for i, token in enumerate([*alphabet.values(), *pieces])}
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(m, special=True) for m in BYTE_LEVEL_MARKERS])
    backend.add_tokens([AddedToken(token, special=False) for token in ("<|tool|>", "<think>", "é")])
    bos, eos = backend.token_to_id("<|begin|>"), backend.token_to_id("<|im_end|>")
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[eos],
        prefix_ids=[bos],
        special_tokens={"bos_token": "<|begin|>", "eos_token": "<|im_end|>"},
        chat_templates={} if chat_template is None else {"default": chat_template},
    )


def sentencepiece(*, add_space_prefix: bool = True, chat_template: str | None = None) -> Tokenizer:
    """SentencePiece BPE with bytes: control tokens, and runs of newlines as user-defined ones."""
    marked = {
        "<unk>": PieceType.UNKNOWN,
        "<s>": PieceType.CONTROL,
        "</s>": PieceType.CONTROL,
        "<start_of_turn>": PieceType.CONTROL,
        "<end_of_turn>": PieceType.CONTROL,
        "\n": PieceType.USER_DEFINED,
        "\n\n": PieceType.USER_DEFINED,
        **{f"<0x{byte:02X}>": PieceType.BYTE for byte in range(256)},
    }
    normal = [*merges_for(SPM_PIECES)[0], *map(chr, range(0x21, 0x7F)), "▁", "é", "世"]
    pieces = list(dict.fromkeys([*marked, *normal]))
    backend = piece_bpe(
        pieces,
        [-float(i) for i in range(len(pieces))],
        [marked.get(piece, PieceType.NORMAL) for piece in pieces],
        add_space_prefix=add_space_prefix,
    )
    return Tokenizer(
        backend,
        bos_id=1,
        eos_ids=[2],
        prefix_ids=[1],
        special_tokens={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        chat_templates={} if chat_template is None else {"default": chat_template},
    )


def unigram() -> Tokenizer:
    """A unigram model whose pieces include `</s>`, with a space put before the first text only."""
    backend = Backend(
        models.Unigram(
            [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("a", -2.0), ("b", -2.0)]
            + [(char, -4.0) for char in "</s>"],
            unk_id=0,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "</s>")])
    return Tokenizer(backend, eos_ids=[1], special_tokens={"unk_token": "<unk>"})
