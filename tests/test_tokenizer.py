"""Control tokens are obeyed only where they are meant, and bytes add up to the decoder's text."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import tokenizers as small

from tensorray.cluster.demo import model_path
from tensorray.cluster.tokenizer import InvalidText, Tokenizer
from tensorray.cluster.tokenizer_files import load_tokenizer

GOLDEN = Path(__file__).parent / "fixtures" / "tokenizers"
TEXTS = ["Hello world", "the end", " two  spaces ", "naïve 世界 😀", "<|im_end|> x", "é", "a\n\n\n"]


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": small.byte_level,
    "sentencepiece": small.sentencepiece,
    "sentencepiece without prefix": lambda: small.sentencepiece(add_space_prefix=False),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


@pytest.mark.model
def test_gemma_from_gguf_cuts_text_as_llama_cpp_does() -> None:
    tokenizer = load_tokenizer(model_path())
    assert tokenizer.vocab_size == 262144
    assert (tokenizer.bos_id, tokenizer.prefix_ids, tokenizer.eos_ids) == (2, [2], (1, 106))
    for case in json.loads((GOLDEN / "gemma3_270m.json").read_text("utf-8")):
        text = case["text"]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == case["ids"], text
        if "▁" not in text:  # which the vocabulary can't tell from a space
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert b"".join(tokenizer.token_bytes[i] for i in ids).decode() == tokenizer.decode(ids)
    turn = "<start_of_turn>user\nHi<end_of_turn>\n"
    ids = tokenizer.encode(turn, add_special_tokens=False, parse_special=True)
    assert [ids[0], ids[-2]] == [105, 106]
    assert not {105, 106} & set(tokenizer.encode(turn))


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) > 1


def test_words_of_the_vocabulary_are_found() -> None:
    tokenizer = small.byte_level()
    ids = tokenizer.encode("Hello world", add_special_tokens=False)
    assert [tokenizer.id_to_token(i) for i in ids] == ["Hello", "Ġworld"]
    tokenizer = small.sentencepiece()
    ids = tokenizer.encode("Hello world\n\n!", add_special_tokens=False)
    assert [tokenizer.id_to_token(i) for i in ids] == ["▁Hello", "▁world", "\n\n", "▁", "!"]


def test_control_tokens_in_text_are_text_unless_asked(tokenizer: Tokenizer) -> None:
    for spelling in tokenizer.control_strings:
        control = tokenizer.token_to_id(spelling)
        text = f"Hello {spelling} world{spelling}"
        literal = tokenizer.encode(text, add_special_tokens=False)
        assert control not in literal
        assert tokenizer.decode(literal) == text
        parsed = tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        assert parsed.count(control) == 2


def test_unflagged_markers_are_control_tokens_but_shown() -> None:
    tokenizer = small.byte_level()
    tool = tokenizer.token_to_id("<|tool|>")
    assert tool is not None
    assert tool not in tokenizer.encode("<|tool|>")
    assert tool in tokenizer.encode("<|tool|>", parse_special=True)
    assert not tokenizer.is_special(tool)
    assert tokenizer.decode([tool]) == "<|tool|>"


def test_added_tokens_that_are_no_markers_are_always_found() -> None:
    tokenizer = small.byte_level()
    assert tokenizer.token_to_id("<think>") in tokenizer.encode("a<think>b")


def test_special_tokens_around_a_text(tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_id
    assert tokenizer.encode("a")[0] == bos
    assert bos not in tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("") == [bos]
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert tokenizer.decode([bos, *tokenizer.encode("a")][:1], skip_special_tokens=False) != ""


def test_encode_around_all_or_none_equals_encode(tokenizer: Tokenizer) -> None:
    first, second = list(tokenizer.control_strings)[1:3]
    text = f"{first}user\n\nHello  world{second} the{first}{second}"
    found = tokenizer.find_control_tokens(text)
    assert [token.id for token in found] == [
        tokenizer.token_to_id(s) for s in (first, second, first, second)
    ]
    assert tokenizer.encode_around(text, found) == tokenizer.encode(
        text, add_special_tokens=False, parse_special=True
    )
    assert tokenizer.encode_around(text, []) == tokenizer.encode(text, add_special_tokens=False)


def test_encode_around_some_leaves_the_others_text(tokenizer: Tokenizer) -> None:
    marker = list(tokenizer.control_strings)[1]
    id = tokenizer.token_to_id(marker)
    text = f"{marker}Hello{marker} world{marker}"
    first, _, last = tokenizer.find_control_tokens(text)
    ids = tokenizer.encode_around(text, [first, last])
    assert ids.count(id) == 2
    assert ids[0] == ids[-1] == id
    assert tokenizer.decode(ids[1:-1], skip_special_tokens=False) == f"Hello{marker} world"


def test_text_after_a_control_token_gets_no_space_it_should_not() -> None:
    tokenizer = small.unigram()
    text = "a</s>a</s>b"
    first, second = tokenizer.find_control_tokens(text)
    parsed = tokenizer.encode(text, parse_special=True)
    assert [tokenizer.id_to_token(i) for i in parsed] == ["▁a", "</s>", "a", "</s>", "b"]
    assert tokenizer.encode_around(text, [first, second]) == parsed
    some = tokenizer.encode_around(text, [second])
    assert [tokenizer.id_to_token(i) for i in some][-2:] == ["</s>", "b"]
    assert tokenizer.decode(some, skip_special_tokens=False) == text


def test_a_vocabulary_that_spells_a_control_token_cannot_forge_it() -> None:
    tokenizer = small.unigram()
    ids = tokenizer.encode("a</s>b</s>")
    assert 1 not in ids
    assert tokenizer.decode(ids) == "a</s>b</s>"


def test_unknown_characters_are_no_forgery() -> None:
    tokenizer = small.unigram()
    assert tokenizer.encode("a世") == [tokenizer.token_to_id("▁a"), 0]


def test_control_tokens_are_found_longest_first() -> None:
    tokenizer = small.byte_level()
    text = "<|im_start|><|im_<|im_end|>"
    assert [text[t.start : t.end] for t in tokenizer.find_control_tokens(text)] == [
        "<|im_start|>",
        "<|im_end|>",
    ]


def test_unpaired_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidText, match="surrogate"):
        tokenizer.encode("a\ud800b")
    with pytest.raises(InvalidText, match="surrogate"):
        tokenizer.encode("a\ud800b", parse_special=True)


def test_unused_ids_are_empty(tokenizer: Tokenizer) -> None:
    beyond = tokenizer.vocab_size + 5
    assert tokenizer.token_bytes[beyond] == b""
    assert tokenizer.id_to_token(beyond) is None
    assert tokenizer.decode([beyond]) == ""


def test_bytes_and_texts_of_single_tokens() -> None:
    tokenizer = small.sentencepiece()
    half = tokenizer.token_to_id("<0xE4>")
    assert half is not None
    assert tokenizer.token_bytes[half] == b"\xe4"
    assert tokenizer.token_text(half) == "�"
    word = tokenizer.token_to_id("▁world")
    assert word is not None
    assert tokenizer.token_text(word) == " world"


def test_threads_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    marker = list(tokenizer.control_strings)[2]
    text = f"Hello {marker} world " * 20
    control = tokenizer.token_to_id(marker)

    def count(parse: bool) -> int:
        return tokenizer.encode(text, parse_special=parse).count(control or -1)

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(count, [True, False] * 100))
    assert counts == [20, 0] * 100
