"""Tokenizers out of GGUF metadata: llama.cpp's own cuts, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tensorray.cluster.gguf_tokenizer import PRE_TOKENIZERS, from_metadata
from tensorray.cluster.sentencepiece_tokenizer import PieceType, normal_merges
from tensorray.cluster.token_bytes import byte_level_alphabet
from tensorray.cluster.tokenizer import Tokenizer, TokenizerError

GOLDEN = json.loads(
    (Path(__file__).parent / "fixtures" / "tokenizers" / "pre_tokenizers.json").read_text("utf-8")
)


def metadata(model: str, **keys: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": model,
        **{
            key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}": value
            for key, value in keys.items()
        },
    }


def golden(pre: str, **keys: Any) -> Tokenizer:
    return from_metadata(
        metadata("gpt2", pre=pre, tokens=GOLDEN["tokens"], merges=GOLDEN["merges"], **keys)
    )


@pytest.mark.parametrize("pre", GOLDEN["ids"])
def test_text_is_cut_as_llama_cpp_cuts_it(pre: str) -> None:
    tokenizer = golden(pre)
    for text, expected in zip(GOLDEN["texts"], GOLDEN["ids"][pre], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text


def test_pre_tokenizers_differ() -> None:
    # Else the test above would not notice one taken for another.
    distinct = {json.dumps(ids) for ids in GOLDEN["ids"].values()}
    assert len(distinct) >= len(GOLDEN["ids"]) - 2  # two pairs differ only in merges and NFC


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_round_trips(pre: str) -> None:
    tokenizer = golden(pre)
    for text in GOLDEN["texts"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_pre_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer.ggml.pre is 'kimi-k9'.*--tokenizer"):
        golden("kimi-k9")


def test_qwen2_composes_characters() -> None:
    assert golden("qwen2").encode("e\u0301") == golden("qwen2").encode("é")
    assert golden("gpt-2").encode("e\u0301") != golden("gpt-2").encode("é")


def byte_level(extra: dict[str, PieceType], **keys: Any) -> Tokenizer:
    tokens = [*byte_level_alphabet().values(), *extra]
    types = [PieceType.NORMAL] * 256 + list(extra.values())
    keys = {"pre": "gpt-2", "merges": [], **keys}
    return from_metadata(
        metadata("gpt2", tokens=tokens, token_type=np.array(types, np.int32), **keys)
    )


def test_special_tokens_and_flags() -> None:
    tokenizer = byte_level(
        {
            "<|begin|>": PieceType.CONTROL,
            "<|im_end|>": PieceType.CONTROL,
            "<tool>": PieceType.USER_DEFINED,
        },
        bos_token_id=256,
        eos_token_id=256,
        add_bos_token=True,
        **{"tokenizer.chat_template": "A", "tokenizer.chat_template.rag": "B"},
    )
    assert tokenizer.prefix_ids == [256]
    assert tokenizer.suffix_ids == []
    assert tokenizer.eos_ids == (256, 257)  # the second by its name
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|begin|>"}
    assert tokenizer.chat_templates == {"default": "A", "rag": "B"}
    assert tokenizer.is_special(257)
    assert not tokenizer.is_special(258)
    assert tokenizer.encode("<tool><|im_end|>", add_special_tokens=False)[0] == 258
    assert 257 not in tokenizer.encode("<|im_end|>")


@pytest.mark.parametrize(
    ("pre", "flags", "prefix", "suffix"),
    [
        ("llama-bpe", {}, [256], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("gpt-2", {}, [], []),
        ("gpt-2", {"add_eos_token": True}, [], [257]),
    ],
)
def test_what_goes_around_a_text(
    pre: str, flags: dict[str, bool], prefix: list[int], suffix: list[int]
) -> None:
    tokenizer = byte_level(
        {"<b>": PieceType.CONTROL, "<e>": PieceType.CONTROL},
        pre=pre,
        bos_token_id=256,
        eos_token_id=257,
        **flags,
    )
    assert tokenizer.encode("a") == [*prefix, tokenizer.token_to_id("a"), *suffix]


def pieces(**keys: Any) -> Tokenizer:
    marked = {
        "<unk>": PieceType.UNKNOWN,
        "<s>": PieceType.CONTROL,
        **{f"<0x{byte:02X}>": PieceType.BYTE for byte in range(256)},
    }
    normal = ["▁", "a", "b", "<", "s", ">", "<s", "▁a", "ab", "▁ab"]
    keys = {
        "scores": np.array([0.0] * len(marked) + [-float(i) for i in range(len(normal))]),
        "token_type": np.array([*marked.values(), *[PieceType.NORMAL] * len(normal)]),
        "bos_token_id": 1,
        **keys,
    }
    return from_metadata(metadata("llama", tokens=[*marked, *normal], **keys))


def test_sentencepiece_joins_the_best_pair_first() -> None:
    tokenizer = pieces()

    def cut(text: str) -> list[str | None]:
        return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    assert cut("ab") == ["▁ab"]  # ▁a beats ab, then takes b
    assert cut("abab") == ["▁ab", "ab"]
    assert cut("<s>") == ["▁", "<s", ">"]  # never the control token, though its parts are there
    assert cut("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("a")[0] == 1


def test_merges_have_the_published_order() -> None:
    # As in the tokenizer.json of models that were converted from such pieces.
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    merges = normal_merges(tokens, [-9.0, -9.0, -9.0, -2.0, -3.0, -1.0], [PieceType.NORMAL] * 6)
    assert merges == [("ab", "c"), ("a", "bc"), ("a", "b"), ("b", "c")]


def test_sentencepiece_space_prefix_is_the_files_choice() -> None:
    tokenizer = pieces(add_space_prefix=False, add_bos_token=False)
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("ab ab")] == ["ab", "▁ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"
    assert pieces().decode(pieces().encode(" ab")) == " ab"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "model is 'bert'; supported are 'llama' and 'gpt2'"),
        ({"tokenizer.ggml.model": None}, "no tokenizer.ggml.model"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' of one piece"),
        ({"tokenizer.ggml.merges": ["a x"]}, "merges"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries for 3 tokens"),
        ({"tokenizer.ggml.token_type": [1, 1, 9]}, "token_type 9"),
        ({"tokenizer.ggml.model": "llama"}, "no tokenizer.ggml.scores"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]},
            "scores has 1 entries for 3 tokens",
        ),
    ],
)
def test_damaged_metadata_is_refused(change: dict[str, Any], message: str) -> None:
    whole = metadata("gpt2", pre="gpt-2", tokens=["a", "b", "ab"], merges=["a b"])
    assert from_metadata(whole).encode("ab") == [2]
    changed = {key: value for key, value in {**whole, **change}.items() if value is not None}
    with pytest.raises(TokenizerError, match=message):
        from_metadata(changed)
