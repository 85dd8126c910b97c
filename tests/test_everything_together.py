"""Beams, drafts, adapters and edited logits in one batch that runs short of blocks, then embeddings
of what it leaves: each request gets what it gets alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.lora_files import merge, write_adapter
from helpers.tiny_models import directory, references

from tensorray.cluster.llm import LLM, LoRARequest, SamplingParams
from tensorray.cluster.outputs import RequestOutput

SMALL: dict[str, Any] = {
    "block_size": 4,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 16,
    "max_model_len": 64,
    "num_threads": 1,
}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"use_beam_search": True, "n": 2, "beam_width": 4},
    {"use_beam_search": True, "n": 2, "beam_width": 3, "no_repeat_ngram_size": 2},
    {"n": 2, "seed": 5, "temperature": 0.8, "repetition_penalty": 1.2},
    {"temperature": 0, "no_repeat_ngram_size": 2, "bad_words": [[5, 6]]},
    {"temperature": 0, "forced_prefix": [7, 8, 9]},
    {"temperature": 0, "prompt_logprobs": 1},
    {"n": 2, "seed": 9, "top_k": 5, "min_tokens": 3},
]
PARAMS = [SamplingParams(max_tokens=14, ignore_eos=True, logprobs=1, **kind) for kind in KINDS]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [each.token_ids for output in outputs for each in output.outputs]


def scores(outputs: list[RequestOutput]) -> list[float | None]:
    return [each.cumulative_logprob for output in outputs for each in output.outputs]


def test_each_request_gets_what_it_gets_alone(tmp_path: Path) -> None:
    base = directory("llama3")
    adapter = write_adapter(base, tmp_path / "adapter", seed=3)
    known = references("llama3")[0].prompt.tolist()[:20]
    prompts = [known, known[:4] * 3]
    alone: list[RequestOutput] = []
    vectors = []
    for model in (base, merge(base, adapter, tmp_path / "merged")):
        with LLM(str(model), num_kv_blocks=512, **SMALL) as llm:
            alone += [llm.generate([each], p)[0] for each in prompts for p in PARAMS]
            vectors += [llm.embed([each])[0].outputs.data for each in prompts]
    short: dict[str, Any] = {"num_kv_blocks": 45, "enable_lora": True, "speculative_config": DRAFTS}
    with LLM(str(base), **short, **SMALL) as llm:
        scheduler = llm.engines[0].scheduler
        together = llm.generate(
            [each for each in prompts * 2 for _ in PARAMS],
            PARAMS * 4,
            lora_request=[
                *[None] * (2 * len(PARAMS)),
                *[LoRARequest("adapter", 1, str(adapter))] * (2 * len(PARAMS)),
            ],
        )
        assert tokens(together) == tokens(alone)
        assert scores(together) == pytest.approx(scores(alone), abs=1e-2)
        # From prefixes that the others have left, and none of those that an adapter computed.
        for each, vector in zip(llm.embed(prompts), vectors, strict=False):
            np.testing.assert_allclose(each.outputs.data, vector, atol=1e-4)
        stats = scheduler.stats()
        assert stats.preemptions
        assert stats.prefix_hits
        assert stats.accepted_tokens
        assert stats.free_blocks == stats.total_blocks
        assert not stats.running
