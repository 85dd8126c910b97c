"""LoRA adapters: many in one batch answer as each one merged into the base does."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.equality import assert_same_tokens
from helpers.lora_cases import (
    GREEDY,
    LORA,
    SMALL,
    assert_same,
    first_choice,
    margins_of,
    merged_answers,
    requests,
)
from helpers.lora_files import linear_sizes, merge, prompt, write_adapter, write_adapters
from helpers.quantized_files import gptq, quantize_model, write_plain
from helpers.tiny_models import directory

from tensorray.cluster.adapters import AdapterRefused
from tensorray.cluster.assembly import GenerationFailed
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.llm import LLM, LoRARequest, SamplingParams
from tensorray.cluster.outputs import RequestOutput

FAMILIES = ("llama3", "qwen3", "gemma3", "gpt2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """A family's adapters, by its name."""

    @cache
    def make(name: str) -> list[Path]:
        return write_adapters(name, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="module")
def merged(
    made: Callable[[str], list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[RequestOutput]]:
    """What the base, then each adapter merged into it, answers to a family's prompt."""

    @cache
    def answers(name: str) -> list[RequestOutput]:
        return merged_answers(name, made(name), tmp_path_factory.mktemp(f"{name}-merged"))

    return answers


LAYOUTS = [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
GOLDEN = Path(__file__).parent / "fixtures" / "lora"


@pytest.mark.parametrize("layout", LAYOUTS, ids=["TP1", "TP2", "PP2"])
@pytest.mark.parametrize("name", sorted(each.name for each in GOLDEN.iterdir()))
def test_what_peft_saved_computes_what_peft_does(name: str, layout: dict[str, int]) -> None:
    """Target modules by "all-linear", regular expression and list; patterns of ranks and alphas;
    fused and transposed matrices; an output layer."""
    with np.load(GOLDEN / name / "reference.npz") as arrays:
        tokens, logits, greedy = (arrays[key] for key in ("prompt", "logits", "greedy"))
    params = SamplingParams(
        temperature=0,
        max_tokens=len(greedy),
        ignore_eos=True,
        logprobs=2,
        prompt_logprobs=1,
    )
    lora = LoRARequest("golden", 1, str(GOLDEN / name))
    with LLM(str(directory(name)), **LORA, **layout) as llm:
        (output,) = llm.generate([tokens.tolist()], params, lora_request=lora)
    assert output.outputs[0].logprobs is not None
    assert_same_tokens(
        output.outputs[0].token_ids, greedy.tolist(), margins_of(output.outputs[0].logprobs)
    )
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    assert output.prompt_logprobs is not None
    for i, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.logprob == pytest.approx(expected[i, tokens[i + 1]], abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=["TP1", "TP2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_eight_adapters_in_one_batch_answer_as_merged_ones(
    name: str,
    layout: dict[str, int],
    made: Callable[[str], list[Path]],
    merged: Callable[[str], list[RequestOutput]],
) -> None:
    expected = merged(name)
    plain, *adapted = map(first_choice, expected)
    assert all(each != pytest.approx(plain, abs=0.01) for each in adapted), "it does not matter"
    asked = [None, *requests(made(name))]
    with LLM(str(directory(name)), **LORA, **layout) as llm:
        # The longest prompts come in chunks, so prefills and decodes of several share steps.
        outputs = llm.generate([prompt(name)] * 9, GREEDY, lora_request=asked)
        again = llm.generate([prompt(name)] * 9, GREEDY, lora_request=asked)
    for found in (outputs, again):
        for ours, reference in zip(found, expected, strict=True):
            assert_same(ours, reference)


EXPERT_PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
MIXTURES = ("mixtral", "qwen3-moe")


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_of_a_mixture_answer_as_merged_ones_wherever_its_experts_are(
    name: str, tmp_path: Path
) -> None:
    """Of all but its experts: attention, and the router that chooses among them."""
    base = directory(name)
    kinds: list[dict[str, Any]] = [
        {"modules": ("q_proj", "k_proj", "v_proj", "o_proj")},
        {"modules": (".gate",), "rank": 2, "spread": 0.8},
        {"modules": ("v_proj", ".gate", "lm_head"), "spread": 0.4},
    ]
    adapters = [
        write_adapter(base, tmp_path / f"adapter-{i}", seed=i, **kind)
        for i, kind in enumerate(kinds)
    ]
    expected = merged_answers(name, adapters, tmp_path / "merged")
    plain, *adapted = map(first_choice, expected)
    assert all(each != pytest.approx(plain, abs=0.01) for each in adapted), "it does not matter"
    for layout in ({}, EXPERT_PARALLEL):
        with LLM(str(base), **LORA, **layout) as llm:
            asked = [None, *requests(adapters)]
            for ours, reference in zip(
                llm.generate([prompt(name)] * len(asked), GREEDY, lora_request=asked),
                expected,
                strict=True,
            ):
                assert_same(ours, reference)


@pytest.mark.parametrize("layout", [{}, EXPERT_PARALLEL], ids=["TP1", "EP2"])
@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_of_experts_are_refused_by_name(
    name: str, layout: dict[str, Any], tmp_path: Path
) -> None:
    """Also by a shard that does not hold the expert."""
    base = directory(name)
    experts = sorted(module for module in linear_sizes(base) if ".experts." in module)
    with LLM(str(base), **LORA, **layout) as llm:
        for id, module in enumerate((experts[0], experts[-1]), 1):
            adapter = write_adapter(base, tmp_path / module, seed=1, modules=(module,))
            asked = LoRARequest(module, id, str(adapter))
            with pytest.raises(AdapterRefused, match=f"{re.escape(module)}: .*experts are not s"):
                llm.generate([[3, 4]], GREEDY, lora_request=asked)


def test_no_prefix_is_shared_between_adapters_nor_versions(
    made: Callable[[str], list[Path]], merged: Callable[[str], list[RequestOutput]]
) -> None:
    adapters = made("llama3")
    expected = merged("llama3")
    first = LoRARequest("a", 1, str(adapters[0]))
    other = LoRARequest("b", 2, str(adapters[2]))
    newer = LoRARequest("a", 3, str(adapters[3]))
    asked = [(None, 0), (first, 1), (other, 3), (first, 1), (None, 0), (newer, 4), (newer, 4)]
    with LLM(str(directory("llama3")), **LORA) as llm:
        cached = []
        for lora, answer in asked:
            (output,) = llm.generate([prompt("llama3")], GREEDY, lora_request=lora)
            cached.append(output.num_cached_tokens > 0)
            assert_same(output, expected[answer])
    assert cached == [False, False, False, True, True, False, True]


def test_drafts_are_checked_with_the_sequences_own_adapter(
    made: Callable[[str], list[Path]], merged: Callable[[str], list[RequestOutput]]
) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    asked = [None, *requests(made("gemma3"))]
    with LLM(str(directory("gemma3")), **LORA, speculative_config=speculation) as llm:
        outputs = llm.generate([prompt("gemma3")] * 9, GREEDY, lora_request=asked)
    for ours, reference in zip(outputs, merged("gemma3"), strict=True):
        assert_same(ours, reference)


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=["TP1", "TP2"])
def test_adapters_are_added_to_quantized_weights(
    layout: dict[str, int], made: Callable[[str], list[Path]], tmp_path: Path
) -> None:
    """With activation ordering, so that the base's columns are not where the adapter's are."""
    base, plain = tmp_path / "quantized", tmp_path / "plain"
    values = quantize_model(directory("llama3"), base, gptq(act_order=True, symmetric=False))
    write_plain(directory("llama3"), plain, values)
    adapters = made("llama3")[:3]
    expected = []
    for i, each in enumerate(adapters):
        with LLM(str(merge(plain, each, tmp_path / f"merged-{i}")), **SMALL) as llm:
            expected += llm.generate([prompt("llama3")], GREEDY)
    with LLM(str(base), **LORA, **layout) as llm:
        outputs = llm.generate([prompt("llama3")] * 3, GREEDY, lora_request=requests(adapters))
    for ours, reference in zip(outputs, expected, strict=True):
        assert_same(ours, reference)


def test_a_sequence_whose_adapter_is_lost_fails_alone(made: Callable[[str], list[Path]]) -> None:
    """As when a shard was started again and the adapter's files were gone."""
    one, two = requests(made("llama3"))[:2]
    with LLM(str(directory("llama3")), **LORA) as llm:
        llm.generate([prompt("llama3")], GREEDY, lora_request=one)
        llm.generate([prompt("llama3")], GREEDY, lora_request=two)
        (shard,) = llm._shards[0].holders
        shard.remove_adapter(next(each.id for each in shard.adapters() if each.name == "adapter-1"))
        with pytest.raises(GenerationFailed, match="load the adapter again"):
            llm.generate([[5, 6, 7]] * 2, GREEDY, lora_request=[None, two])
        assert llm.generate([[5, 6, 7]], GREEDY, lora_request=one)[0].finished


def test_what_is_asked_of_llm_has_to_fit(made: Callable[[str], list[Path]]) -> None:
    (lora, *_) = requests(made("llama3"))
    with (
        LLM(str(directory("llama3")), **SMALL) as llm,
        pytest.raises(BadRequest, match="enable_lora"),
    ):
        llm.generate([[5]], GREEDY, lora_request=lora)
    with LLM(str(directory("llama3")), **LORA) as llm:
        with pytest.raises(ValueError, match="2 prompts but 1 lora_request"):
            llm.generate([[5], [6]], GREEDY, lora_request=[lora])
        with pytest.raises(AdapterRefused, match="no such directory"):
            llm.generate([[5]], GREEDY, lora_request=LoRARequest("x", 1, "/nowhere"))
        deltas = list(llm.stream([5], GREEDY, lora_request=lora))
        assert deltas[-1].finished
    with pytest.raises(AdapterRefused, match="no such directory"):
        LLM(str(directory("llama3")), **LORA, lora_modules=["x=/nowhere"])
