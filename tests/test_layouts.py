"""Layouts: tensor, pipeline, expert and data parallel shards choose the tokens of one shard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.equality import assert_same_tokens
from helpers.tiny_models import NAMES, directory, references

from tensorray.actors.link import ShardError
from tensorray.builder.model import ModelConfigError
from tensorray.cluster.llm import LLM, SamplingParams

SMALL: dict[str, Any] = {"num_kv_blocks": 512, "block_size": 4, "max_num_batched_tokens": 24}
SMALL |= {"max_num_seqs": 8, "num_threads": 1}

TP2 = {"tensor_parallel_size": 2}
TP4 = {"tensor_parallel_size": 4}
PP2 = {"pipeline_parallel_size": 2}
PP3 = {"pipeline_parallel_size": 3}
EP2 = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
DP2 = {"data_parallel_size": 2}

# The families' layers and heads say what divides them.
THREE_LAYERS = ("gemma2", "gemma3", "qwen2", "qwen3-moe")
CASES = [
    *((name, layout) for name in NAMES for layout in (TP2, TP4, PP2, TP2 | PP2)),
    *((name, PP3) for name in THREE_LAYERS),
    *((name, layout) for name in ("mixtral", "qwen3-moe") for layout in (EP2, EP2 | PP2)),
    *((name, DP2) for name in NAMES),
    ("llama3", DP2 | TP2 | PP2),
]


def described(case: Any) -> str:
    if isinstance(case, str):
        return case
    short = {"tensor": "TP", "pipeline": "PP", "data": "DP", "enable": "EP"}
    return "x".join(f"{short[key.split('_')[0]]}{int(value)}" for key, value in case.items())


@pytest.mark.parametrize(("name", "layout"), CASES, ids=described)
def test_a_layout_continues_prompts_as_transformers_does(name: str, layout: Any) -> None:
    """Prompts in chunks, with prompt and token log-probabilities, several at once."""
    cases = references(name)
    prompts = [case.prompt.tolist() for case in cases]
    length = max(map(len, prompts)) + 16
    params = SamplingParams(
        temperature=0, max_tokens=16, ignore_eos=True, logprobs=2, prompt_logprobs=1
    )
    with LLM(str(directory(name)), max_model_len=length, **SMALL, **layout) as llm:
        outputs = llm.generate(prompts, params)
        stats = [engine.scheduler.stats() for engine in llm.engines]
    for case, output in zip(cases, outputs, strict=True):
        (completion,) = output.outputs
        assert completion.logprobs is not None
        margins = [
            float(np.subtract(*sorted((top.logprob for top in entry.top), reverse=True)[:2]))
            for entry in completion.logprobs
        ]
        assert_same_tokens(completion.token_ids, case.greedy.tolist(), margins)
        expected = log_softmax(case.logits)
        assert output.prompt_logprobs is not None
        for i, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            assert entry.logprob == pytest.approx(expected[i, case.prompt[i + 1]], abs=1e-4)
    assert all(each.free_blocks == each.total_blocks for each in stats)


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("layout", [TP2, PP2, TP2 | PP2], ids=described)
def test_draws_and_penalties_are_those_of_one_shard(layout: Any) -> None:
    """Many more sequences than fit at once, ends at any time, blocks that run out."""
    params = [
        SamplingParams(
            temperature=0.9, seed=i, top_p=0.95, repetition_penalty=1.2, max_tokens=3 + 5 * (i % 5)
        )
        for i in range(24)
    ]
    prompts = [[(7 * i + j) % 250 + 1 for j in range(3 + i % 9)] for i in range(24)]
    tight = {**SMALL, "num_kv_blocks": 40, "max_model_len": 40}
    found = []
    for changes in ({}, layout):
        with LLM(str(directory("gemma3")), **tight, **changes) as llm:
            outputs = llm.generate(prompts, params)
            found.append([output.outputs[0].token_ids for output in outputs])
            if changes:
                assert llm.engine.scheduler.stats().preemptions > 0
    assert found[0] == found[1]


def test_stages_work_at_the_same_time() -> None:
    """Sequences are shared out over as many steps in flight as there are stages."""
    settings = {**SMALL, "max_model_len": 64}
    with LLM(str(directory("gemma3")), **settings, **PP3) as llm:
        plans: list[list[int]] = []
        link = llm.engine._link
        send = link.send

        def record(plan: Any) -> None:
            plans.append(plan.seqs)
            send(plan)

        link.send = record  # type: ignore[method-assign]
        llm.generate([[5, 6, 7]] * 6, SamplingParams(temperature=0, max_tokens=12))
    decodes = plans[6:-6]
    for first, second, third in zip(decodes, decodes[1:], decodes[2:], strict=False):
        assert not set(first) & set(second)
        assert not (set(first) | set(second)) & set(third)
        assert len(first) <= 2


@pytest.mark.parametrize(
    ("name", "layout", "error", "message"),
    [
        ("llama3", {"tensor_parallel_size": 3}, ModelConfigError, "sizes that do: 1, 2, 4"),
        ("llama3", PP3, ModelConfigError, "3 pipeline stages for 2 layers"),
        (
            "qwen3-moe",
            {"tensor_parallel_size": 4, "enable_expert_parallel": True},
            ModelConfigError,
            "4 expert-parallel ranks do not divide the 6 experts; sizes that do: 1, 2, 3, 6",
        ),
    ],
)
def test_a_layout_the_model_does_not_divide_into_is_refused(
    name: str, layout: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM(str(directory(name)), **SMALL, **layout)


def test_a_failed_shard_ends_the_step_with_its_own_reason() -> None:
    settings = {**SMALL, "max_model_len": 64}
    with LLM(str(directory("llama3")), **settings, **TP2, **PP2) as llm:
        host = llm._shards[0]._replica._hosts[1]  # type: ignore[union-attr]
        host._executor._weights.layers.clear()
        params = SamplingParams(temperature=0, max_tokens=12)

        def broken(*_: Any) -> Any:
            raise MemoryError("out of luck")

        host._executor._forward = broken
        with pytest.raises(Exception, match="rank 1: MemoryError: out of luck"):
            llm.generate([[5, 6, 7]], params)
        assert llm.engine.failure is not None
        assert "rank 0" not in llm.engine.failure
        assert ShardError.__name__ not in llm.engine.failure
