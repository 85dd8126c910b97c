"""Prompts that are cut: which tokens stay."""

from __future__ import annotations

import pytest
from helpers.tiny_models import directory

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.llm import LLM, PoolingParams, SamplingParams
from tensorray.cluster.truncation import shortened

BOS, EOS = 1, 2


@pytest.mark.parametrize(
    ("most", "start", "end"),
    [
        (9, [BOS, 5, 6, 7, EOS], [BOS, 5, 6, 7, EOS]),
        (5, [BOS, 5, 6, 7, EOS], [BOS, 5, 6, 7, EOS]),
        (4, [BOS, 5, 6, EOS], [BOS, 6, 7, EOS]),
        (2, [BOS, EOS], [BOS, EOS]),
        (1, [BOS], [EOS]),
    ],
)
def test_what_a_tokenizer_adds_stays_and_counts(
    most: int, start: list[int], end: list[int]
) -> None:
    tokens, bare = [BOS, 5, 6, 7, EOS], [5, 6, 7]
    assert shortened(tokens, bare, most, "start") == start
    assert shortened(tokens, bare, most, "end") == end


def test_tokens_that_merge_with_what_is_added_are_cut_as_they_are() -> None:
    assert shortened([1, 9, 7], [5, 6, 7], 2, "end") == [9, 7]


@pytest.fixture(scope="module")
def llm():
    with LLM(str(directory("llama3")), max_model_len=32, num_kv_blocks=64, block_size=4) as llm:
        yield llm


def test_a_prompt_keeps_its_end_and_an_embedded_one_its_start(llm) -> None:
    ids = list(range(3, 60))

    def prompt(most: int, given: object = ids, max_tokens: int = 4) -> list[int]:
        params = SamplingParams(max_tokens=max_tokens, truncate_prompt_tokens=most)
        return llm.generate([given], params)[0].prompt_token_ids

    assert prompt(5) == ids[-5:]
    assert prompt(-1, max_tokens=12) == ids[-20:]
    assert prompt(5, ids[:3]) == ids[:3]
    text = "a prompt with a beginning of its own"
    whole = llm.frontend.prompt_tokens(text, True)
    bare = llm.frontend.prompt_tokens(text, False)
    added = whole[: len(whole) - len(bare)]
    assert prompt(8, text) == [*added, *bare[-(8 - len(added)) :]]
    embedded = llm.embed([ids], PoolingParams(truncate_prompt_tokens=-1))
    assert embedded[0].prompt_token_ids == ids[:32]


def test_what_can_not_be_cut_is_refused(llm) -> None:
    params = SamplingParams(truncate_prompt_tokens=4)
    with pytest.raises(BadRequest, match="echo is of the whole prompt"):
        llm.frontend.request([5, 6], params, request_id="a", echo=True)
    with pytest.raises(ValueError, match="at least 1"):
        SamplingParams(truncate_prompt_tokens=0)
    with pytest.raises(BadRequest, match="too long"):
        llm.generate([[5] * 60], SamplingParams(truncate_prompt_tokens=50))
