"""Tokenizers out of a model's directory, in each of the formats models come in."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tokenizers as small
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from tensorray.cluster.tokenizer import Tokenizer, TokenizerError
from tensorray.cluster.tokenizer_files import load_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A tokenizer cuts text into pieces, and pieces into smaller pieces.",
    "Numbers like 1234 and 3.14 appear; so do names like Zürich or São Paulo.",
    "the cat sat on the mat; the dog sat on the log, and the bird sang on the twig",
]


def write_json(directory: Path, name: str, value: object) -> None:
    (directory / name).write_text(json.dumps(value), "utf-8")


def save_backend(tokenizer: Tokenizer, directory: Path) -> Backend:
    backend = tokenizer._backend
    backend.save(str(directory / "tokenizer.json"))
    return backend


def config(**changes: Any) -> dict[str, Any]:
    return {"bos_token": "<|begin|>", "eos_token": {"content": "<|im_end|>"}, **changes}


# --- tokenizer.json -------------------------------------------------------------------------


def test_tokenizer_json(tmp_path: Path) -> None:
    original = small.byte_level()
    save_backend(original, tmp_path)
    write_json(tmp_path, "tokenizer_config.json", config(chat_template="T"))
    tokenizer = load_tokenizer(tmp_path)
    text = "Hello world<|im_end|><think>é"
    assert tokenizer.encode(text, add_special_tokens=False) == original.encode(
        text, add_special_tokens=False
    )
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    assert tokenizer.eos_ids == original.eos_ids
    assert tokenizer.bos_id == original.bos_id
    assert tokenizer.prefix_ids == []
    assert tokenizer.chat_templates == {"default": "T"}


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = small.byte_level()._backend
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("Hello world" * 4)) == 8


@pytest.mark.parametrize(
    ("post_processor", "flags", "prefix", "suffix"),
    [
        (False, {}, [], []),
        (False, {"add_bos_token": True}, ["<|begin|>"], []),
        (True, {}, ["<|begin|>"], ["<|im_end|>"]),
        (True, {"add_bos_token": False}, [], ["<|im_end|>"]),
        (True, {"add_bos_token": True, "add_eos_token": False}, ["<|begin|>"], []),
    ],
)
def test_what_goes_around_a_text(
    tmp_path: Path,
    post_processor: bool,
    flags: dict[str, bool],
    prefix: list[str],
    suffix: list[str],
) -> None:
    backend = small.byte_level()._backend
    ids = {token: backend.token_to_id(token) for token in ("<|begin|>", "<|im_end|>")}
    if post_processor:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A <|im_end|>", special_tokens=list(ids.items())
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path, "tokenizer_config.json", config(**flags))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix_ids == [ids[token] for token in prefix]
    assert tokenizer.suffix_ids == [ids[token] for token in suffix]


def test_chat_templates_by_name_and_in_files(tmp_path: Path) -> None:
    save_backend(small.byte_level(), tmp_path)
    listed = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    write_json(tmp_path, "tokenizer_config.json", config(chat_template=listed))
    assert load_tokenizer(tmp_path).chat_templates == {"default": "A", "tool_use": "B"}
    write_json(tmp_path, "chat_template.json", {"chat_template": "C"})
    assert load_tokenizer(tmp_path).chat_templates["default"] == "C"
    (tmp_path / "chat_template.jinja").write_text("D", "utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("E", "utf-8")
    assert load_tokenizer(tmp_path).chat_templates == {
        "default": "D",
        "tool_use": "B",
        "rag": "E",
    }


def test_special_tokens_map_is_read_after_the_config(tmp_path: Path) -> None:
    save_backend(small.byte_level(), tmp_path)
    write_json(tmp_path, "special_tokens_map.json", {"eos_token": "[INST]", "pad_token": "[INST]"})
    write_json(tmp_path, "tokenizer_config.json", config())
    assert load_tokenizer(tmp_path).special_tokens == {
        "bos_token": "<|begin|>",
        "eos_token": "<|im_end|>",
        "pad_token": "[INST]",
    }


# --- vocab.json and merges.txt --------------------------------------------------------------


def test_gpt2_files(tmp_path: Path) -> None:
    original = small.byte_level()
    original._backend.model.save(str(tmp_path))
    added = {
        str(id): {"content": token.content, "special": token.special}
        for id, token in original._backend.get_added_tokens_decoder().items()
    }
    write_json(tmp_path, "tokenizer_config.json", config(added_tokens_decoder=added))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("Hello world", " the <think>  x", "<|im_end|>é"):
        assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, parse_special=True) == original.encode(
            text, add_special_tokens=False, parse_special=True
        )
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_added_tokens_must_fit_the_vocabulary(tmp_path: Path) -> None:
    original = small.byte_level()
    original._backend.model.save(str(tmp_path))
    write_json(tmp_path, "added_tokens.json", {"<extra>": 99999})
    with pytest.raises(TokenizerError, match="'<extra>' has id 99999"):
        load_tokenizer(tmp_path)


# --- tokenizer.model ------------------------------------------------------------------------


def train(kind: str, directory: Path, **options: Any) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=written,
        model_type=kind,
        vocab_size=420,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (directory / "tokenizer.model").write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


TEXTS = [
    *SENTENCES,
    "the pieces",
    "pieces of the mat",
    "  two  spaces  ",
    "a\nb\tc",
    "unseen: 世界 😀 ñandú",
    "sat sat sat on on the",
    "x",
    "ﬁne ½ Ｗide",
]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
        },
        {"normalization_rule_name": "nmt_nfkc"},
    ],
    ids=["llama", "gemma", "t5"],
)
def test_sentencepiece_model(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    processor = train(kind, tmp_path, **options)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == processor.vocab_size()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids) == processor.decode(ids), text


def test_sentencepiece_conventions(tmp_path: Path) -> None:
    train("bpe", tmp_path, user_defined_symbols=["<tool>"], control_symbols=["<turn>"])
    write_json(
        tmp_path,
        "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix_ids == [1]
    assert tokenizer.eos_ids == (2,)
    turn, tool = tokenizer.token_to_id("<turn>"), tokenizer.token_to_id("<tool>")
    ids = tokenizer.encode("<turn><tool>the")
    assert turn not in ids
    assert tool in ids
    assert turn in tokenizer.encode("<turn>", parse_special=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"treat_whitespace_as_suffix": True}, "spaces as suffixes"), ({}, "neither BPE nor unigram")],
)
def test_other_sentencepiece_models_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    train("unigram" if options else "char", tmp_path, **options)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_sentencepiece_package_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(TokenizerError, match=r"pip install .*sentencepiece"):
        load_tokenizer(tmp_path)


# --- what can be wrong ----------------------------------------------------------------------


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer: neither tokenizer.json nor"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: not a valid tokenizer"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: a JSON object was expected"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("special_tokens_map.json", b"{", "special_tokens_map.json: not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    save_backend(small.byte_level(), tmp_path)
    load_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_damaged_sentencepiece_model(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(TokenizerError, match=r"tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_decoder_that_is_not_token_by_token_is_refused(tmp_path: Path) -> None:
    from tokenizers import decoders

    backend = small.byte_level()._backend
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="decoder has a step"):
        load_tokenizer(tmp_path)
