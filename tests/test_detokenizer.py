"""Text that comes token by token is the text that comes at once, and stops where it should."""

from __future__ import annotations

import itertools

import pytest
from helpers import tokenizers as small
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorray.cluster.detokenizer import Detokenizer, OutputText, StopStrings
from tensorray.cluster.tokenizer import Tokenizer

TOKENIZERS = {
    "byte level": small.byte_level(),
    "sentencepiece": small.sentencepiece(),
    "sentencepiece without prefix": small.sentencepiece(add_space_prefix=False),
    "unigram": small.unigram(),
}
tokenizers = st.sampled_from(list(TOKENIZERS.values()))
texts = st.text(
    st.one_of(
        st.sampled_from("the Hello world <|>/s_ \n"),
        st.characters(exclude_categories=["Cs"], exclude_characters="▁"),
    ),
    max_size=40,
)


@st.composite
def tokens_in_pushes(draw: st.DrawFn) -> tuple[Tokenizer, list[list[int]]]:
    """Any tokens at all, or a text's, cut into pushes."""
    tokenizer = draw(tokenizers)
    if draw(st.booleans()):
        tokens = tokenizer.encode(draw(texts), parse_special=True)
    else:
        tokens = draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    return tokenizer, cut(tokens, draw(st.lists(st.integers(0, 5), max_size=20)))


def cut(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    pieces = []
    for size in sizes:
        pieces.append(tokens[:size])
        tokens = tokens[size:]
    return [*pieces, tokens]


def text_of(detokenizer: Detokenizer, pushes: list[list[int]]) -> str:
    return "".join(detokenizer.push(tokens) for tokens in pushes) + detokenizer.finish()


@given(tokens_in_pushes(), st.booleans())
def test_pushes_add_up_to_the_whole_text(
    case: tuple[Tokenizer, list[list[int]]], skip: bool
) -> None:
    tokenizer, pushes = case
    tokens = list(itertools.chain(*pushes))
    streamed = text_of(Detokenizer(tokenizer, skip_special_tokens=skip), pushes)
    assert streamed == tokenizer.decode(tokens, skip_special_tokens=skip)


@given(tokens_in_pushes())
def test_the_librarys_decoder_agrees_on_valid_text(
    case: tuple[Tokenizer, list[list[int]]],
) -> None:
    tokenizer, pushes = case
    tokens = list(itertools.chain(*pushes))
    # It shows an added token's own characters as bytes, and broken bytes in its own way.
    tokens = [token for token in tokens if tokenizer.id_to_token(token) != "é"]
    whole = tokenizer._backend.decode(tokens, skip_special_tokens=False)
    if "�" not in whole:
        assert tokenizer.decode(tokens, skip_special_tokens=False) == whole


@given(tokenizers, texts, st.lists(st.integers(0, 5), max_size=20))
def test_no_push_has_half_a_character(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.decode(tokens, skip_special_tokens=False) != text:
        return  # a character the vocabulary does not have
    detokenizer = Detokenizer(tokenizer)
    shown = ""
    for piece in cut(tokens, sizes):
        shown += detokenizer.push(piece)
        assert text.startswith(shown)
    assert shown == text
    assert detokenizer.finish() == ""


@given(tokens_in_pushes(), texts)
def test_a_context_is_gone_on_from(case: tuple[Tokenizer, list[list[int]]], prompt: str) -> None:
    tokenizer, pushes = case
    context = tokenizer.encode(prompt or "a", add_special_tokens=False)
    tokens = list(itertools.chain(*pushes))
    together = tokenizer.decode([*context, *tokens])
    before = tokenizer.decode(context)
    added = text_of(Detokenizer(tokenizer, context=context), pushes)
    assert before + added == together


def test_a_character_begun_in_the_prompt_is_finished() -> None:
    tokenizer = small.byte_level()
    *first, last = tokenizer.encode("a世", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, context=first)
    assert detokenizer.push([last]) == "世"


def test_the_prefix_space_is_kept_when_text_goes_on() -> None:
    tokenizer = small.sentencepiece()
    tokens = tokenizer.encode("world", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(tokens) == "world"
    assert Detokenizer(tokenizer, context=[1]).push(tokens) == " world"


def test_a_character_cut_short_shows_at_the_end() -> None:
    tokenizer = small.byte_level()
    tokens = tokenizer.encode("a世", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(tokens[:-1]) == "a"
    assert detokenizer.finish() == "�"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = small.byte_level()
    tokens = tokenizer.encode("a<|im_end|>b<|tool|>", parse_special=True)
    assert Detokenizer(tokenizer).push(tokens) == "ab<|tool|>"
    shown = Detokenizer(tokenizer, skip_special_tokens=False).push(tokens)
    assert shown == "<|begin|>a<|im_end|>b<|tool|>"


# --- stop strings -----------------------------------------------------------------------------

short = st.text("ab<", max_size=30)
stops = st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3)


def cut_at_first_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition, character by character."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(short, stops, st.lists(st.integers(0, 4), max_size=20), st.booleans())
def test_stop_strings_by_definition(
    text: str, stops: list[str], sizes: list[int], include: bool
) -> None:
    expected, stop = cut_at_first_stop(text, stops, include)
    matcher = StopStrings(stops, include=include)
    shown = ""
    for piece in map("".join, cut(list(text), sizes)):  # type: ignore[arg-type]
        shown += matcher.push(piece)
        assert expected.startswith(shown)
    assert matcher.found() == stop
    assert shown + matcher.finish() == expected
    if stop is not None and not include:
        assert not any(each in expected for each in stops)


@given(short, stops)
def test_text_is_held_back_no_longer_than_needed(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = matcher.push(text)
    if matcher.found() is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@settings(max_examples=200)
@given(
    st.sampled_from([small.byte_level(), small.sentencepiece()]),
    st.lists(st.sampled_from(["Hello", " world", "the", "世", "a", "<", "|", "\n"]), max_size=12),
    st.lists(st.sampled_from(["world", "he", "ell", "世a", "lo w", "\n", "a<|"]), max_size=2),
    st.lists(st.integers(0, 4), max_size=12),
    st.integers(0, 6),
    st.booleans(),
)
def test_output_text_however_it_is_pushed(
    tokenizer: Tokenizer,
    words: list[str],
    stops: list[str],
    sizes: list[int],
    min_tokens: int,
    include: bool,
) -> None:
    tokens = tokenizer.encode("".join(words), add_special_tokens=False)

    def run(pushes: list[list[int]]) -> tuple[str, int, str | None]:
        output = OutputText(
            tokenizer, prompt=[1], stop=stops, include_stop=include, min_tokens=min_tokens
        )
        text, taken = "", 0
        for piece in pushes:
            text += output.push(piece)
            taken += output.taken
        return text + output.finish(), taken, output.stopped()

    text, taken, stopped = one_by_one = run([[token] for token in tokens])
    assert run(cut(tokens, sizes)) == one_by_one
    # What is taken has the stop string at its end, and one token less has none.
    detokenized = Detokenizer(tokenizer, context=[1])
    exempt = len(detokenized.push(tokens[:min_tokens]))
    whole = text_of(Detokenizer(tokenizer, context=[1]), [tokens])
    expected, stop = cut_at_first_stop(whole[exempt:], stops, include)
    assert (text, stopped) == (whole[:exempt] + expected, stop)
    if stop is None:
        assert taken == len(tokens)
    else:
        before = text_of(Detokenizer(tokenizer, context=[1]), [tokens[: taken - 1]])
        assert cut_at_first_stop(before[exempt:], stops, include)[1] is None


def test_stop_string_across_tokens_is_never_shown() -> None:
    tokenizer = small.byte_level()
    output = OutputText(tokenizer, stop=["o wor"])
    shown = [output.push([token]) for token in tokenizer.encode("Hello world", parse_special=True)]
    assert "".join(shown) == "Hell"
    assert output.stopped() == "o wor"
    assert output.push(tokenizer.encode("the")) == ""
    assert output.taken == 0
    assert output.finish() == ""


def test_text_that_only_began_a_stop_string_comes_in_the_end() -> None:
    tokenizer = small.byte_level()
    output = OutputText(tokenizer, stop=["worlds"])
    assert output.push(tokenizer.encode("Hello world")) == "Hello "
    assert output.finish() == "world"
    assert output.stopped() is None


@pytest.mark.parametrize("count", [1, 7])
def test_the_token_that_ends_the_text_is_known(count: int) -> None:
    tokenizer = small.byte_level()
    tokens = tokenizer.encode("the the the world the", add_special_tokens=False)
    output = OutputText(tokenizer, stop=["wor"])
    taken = 0
    for start in range(0, len(tokens), count):
        output.push(tokens[start : start + count])
        taken += output.taken
    assert [tokenizer.id_to_token(token) for token in tokens[:taken]][-1] == "Ġworld"


@pytest.mark.parametrize("count", [1, 7])
def test_stop_strings_count_after_min_tokens(count: int) -> None:
    tokenizer = small.byte_level()
    tokens = tokenizer.encode("Hello world the world", add_special_tokens=False)
    output = OutputText(tokenizer, prompt=[1], stop=["world"], min_tokens=2)
    pushes = [tokens[start : start + count] for start in range(0, len(tokens), count)]
    assert "".join(map(output.push, pushes)) == "Hello world the "
    assert output.stopped() == "world"
