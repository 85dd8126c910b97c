"""Gemma 3 270M from GGUF says what transformers says, greedily, on 20 prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tensorray.cluster.demo import model_path
from tensorray.cluster.llm import LLM, SamplingParams
from tensorray.cluster.outputs import CompletionOutput

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("one_tokenizer")]

GOLDEN = json.loads(
    (Path(__file__).parent / "fixtures" / "gemma3_270m_golden.json").read_text("utf-8")
)
# Under this distance between the two largest logits, the order of summation may decide.
NEAR_TIE = 1e-3


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(model_path()), max_model_len=1024, num_kv_blocks=2048) as llm:
        yield llm


def unexplained_difference(record: dict[str, Any], tokens: list[int]) -> str:
    """Empty if the tokens are the recorded ones up to a near-tie, else where they part."""
    expected = record["token_ids"]
    for place, (token, recorded) in enumerate(zip(tokens, expected, strict=False)):
        if token != recorded:
            if record["margins"][place] < NEAR_TIE:
                return ""
            return f"token {place} is {token}, not {recorded}: {record['prompt'][:30]!r}"
    return (
        "" if len(tokens) == len(expected) else f"{len(tokens)} tokens: {record['prompt'][:30]!r}"
    )


def test_prompts_become_the_recorded_token_ids(llm: LLM) -> None:
    outputs = llm.generate(
        [record["prompt"] for record in GOLDEN["records"]], SamplingParams(max_tokens=1)
    )
    assert [list(output.prompt_token_ids) for output in outputs] == [
        record["prompt_token_ids"] for record in GOLDEN["records"]
    ]


@pytest.fixture(scope="module")
def outputs(llm: LLM) -> list[CompletionOutput]:
    outputs = llm.generate(
        [record["prompt_token_ids"] for record in GOLDEN["records"]],
        SamplingParams(temperature=0.0, max_tokens=GOLDEN["max_tokens"]),
    )
    return [output.outputs[0] for output in outputs]


def test_greedy_tokens_are_the_recorded_ones(outputs: list[CompletionOutput]) -> None:
    differences = [
        unexplained_difference(record, output.token_ids)
        for record, output in zip(GOLDEN["records"], outputs, strict=True)
    ]
    assert not any(differences), "\n".join(filter(None, differences))


def test_text_is_the_recorded_text(outputs: list[CompletionOutput]) -> None:
    texts = [
        (output.text, record["text"])
        for record, output in zip(GOLDEN["records"], outputs, strict=True)
        if output.token_ids == record["token_ids"]
    ]
    assert len(texts) >= 15  # hardly any record should meet a near-tie
    assert [ours for ours, _ in texts] == [recorded for _, recorded in texts]


def test_guessed_tokens_are_the_recorded_ones() -> None:
    repetitive = [GOLDEN["records"][index] for index in (9, 12)]
    settings: dict[str, Any] = {"max_model_len": 128, "speculative_config": {"method": "ngram"}}
    with LLM(str(model_path()), device="cpu", num_kv_blocks=256, **settings) as speculative:
        outputs = speculative.generate(
            [record["prompt_token_ids"] for record in repetitive],
            SamplingParams(temperature=0.0, max_tokens=GOLDEN["max_tokens"]),
        )
    differences = [
        unexplained_difference(record, output.outputs[0].token_ids)
        for record, output in zip(repetitive, outputs, strict=True)
    ]
    assert not any(differences), "\n".join(filter(None, differences))
    assert sum(output.usage.accepted_prediction_tokens for output in outputs) > 40
