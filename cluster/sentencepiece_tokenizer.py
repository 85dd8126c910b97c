"""SentencePiece vocabularies (Kudo & Richardson, arXiv 1808.06226) as `tokenizers` pipelines.

A SentencePiece model is a list of pieces with scores and types, whether it comes from a
tokenizer.model or inside a GGUF file. Spaces are spelled U+2581.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from tensorray.cluster.tokenizer import TokenizerError

SPACE = "▁"


class PieceType(IntEnum):
    """SentencePiece's numbers, which GGUF uses too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def piece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_space_prefix: bool,
) -> Backend:
    """BPE that joins the pair whose piece scores highest, bytes for what no piece spells."""
    vocab = {piece: id for id, piece in reversed(list(enumerate(pieces)))}
    unknown = next((p for p, t in zip(pieces, types, strict=True) if t == PieceType.UNKNOWN), None)
    if unknown is None and "<unk>" in vocab:
        unknown = "<unk>"
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=normal_merges(pieces, scores, types),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=PieceType.BYTE in types,
        )
    )
    set_space_spelling(backend, add_space_prefix=add_space_prefix)
    add_marked_tokens(backend, pieces, types)
    return backend


def set_space_spelling(backend: Backend, *, add_space_prefix: bool) -> None:
    """Spell spaces U+2581, with one in front of a text if wanted; and undo both in decoding."""
    spell = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spell]) if add_space_prefix else spell
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)


def add_marked_tokens(backend: Backend, tokens: Sequence[str], types: Iterable[int]) -> None:
    """Register the tokens that text is searched for before anything else cuts it.

    Control and unknown tokens are special; user-defined ones (runs of newlines, HTML tags) are
    ordinary vocabulary.
    """
    marked = {PieceType.UNKNOWN: True, PieceType.CONTROL: True, PieceType.USER_DEFINED: False}
    found: dict[bool, list[AddedToken]] = {True: [], False: []}
    for token, type in zip(tokens, types, strict=True):
        special = marked.get(PieceType(type)) if token else None
        if special is not None:
            found[special].append(AddedToken(token, special=special, normalized=False))
    backend.add_special_tokens(found[True])
    backend.add_tokens(found[False])


def normal_merges(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges, best first: every way to make a normal piece out of two.

    Control, user-defined and byte pieces are never made from text. Among the ways to make one
    piece the longest left part comes first, as in the published conversions of such models.
    """
    kind = int(PieceType.NORMAL)
    normal = [id for id, type in enumerate(types) if type == kind]
    normal.sort(key=scores.__getitem__, reverse=True)
    best_first = [pieces[id] for id in normal]
    parts = set(best_first)
    return [
        (left, right)
        for piece in best_first
        for cut in range(len(piece) - 1, 0, -1)
        if (left := piece[:cut]) in parts and (right := piece[cut:]) in parts
    ]


def read_model(path: Path) -> Backend:
    """A tokenizer.model file, of BPE or unigram type.

    Raises TokenizerError if it can't be read, or the package `sentencepiece` is missing.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2 as protobuf
    except ImportError as error:
        raise TokenizerError(
            f"{path}: reading it needs the package sentencepiece ({error}); "
            "pip install '.[sentencepiece]' in Tensorray's source, or use a model with a "
            "tokenizer.json"
        ) from None
    model = protobuf.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose place differs by version
        raise TokenizerError(f"{path}: not a SentencePiece model: {error}") from None
    pieces = [piece.piece for piece in model.pieces]
    scores = [piece.score for piece in model.pieces]
    types = [piece.type for piece in model.pieces]
    if not pieces:
        raise TokenizerError(f"{path}: not a SentencePiece model: it has no pieces")
    normalizer = model.normalizer_spec
    if model.trainer_spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise TokenizerError(f"{path}: spaces as suffixes or unescaped are not supported")
    kind = model.trainer_spec.model_type
    if kind == model.trainer_spec.BPE:
        backend = piece_bpe(pieces, scores, types, add_space_prefix=normalizer.add_dummy_prefix)
    elif kind == model.trainer_spec.UNIGRAM:
        backend = _unigram(pieces, scores, types, add_space_prefix=normalizer.add_dummy_prefix)
    else:
        raise TokenizerError(f"{path}: a SentencePiece model of neither BPE nor unigram type")
    before: list[normalizers.Normalizer] = []
    if normalizer.precompiled_charsmap:
        before.append(normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if before:
        backend.normalizer = normalizers.Sequence([*before, backend.normalizer])
    return backend


def _unigram(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_space_prefix: bool,
) -> Backend:
    """The likeliest cut of a text into pieces (Kudo, arXiv 1804.10959)."""
    unknown = next((i for i, type in enumerate(types) if type == PieceType.UNKNOWN), None)
    backend = Backend(
        models.Unigram(
            list(zip(pieces, scores, strict=True)),
            unk_id=unknown,
            byte_fallback=PieceType.BYTE in types,
        )
    )
    set_space_spelling(backend, add_space_prefix=add_space_prefix)
    add_marked_tokens(backend, pieces, types)
    return backend
