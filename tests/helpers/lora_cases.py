"""What adapters of a small checkpoint answer merged into it, and how to compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tensorray.cluster.llm import LLM, LoRARequest, SamplingParams
from tensorray.cluster.outputs import RequestOutput, TokenLogprob

from .equality import assert_same_tokens
from .lora_files import merge, prompt
from .tiny_models import directory

SMALL: dict[str, Any] = {
    "num_kv_blocks": 512,
    "block_size": 4,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 16,
    "max_model_len": 64,
    "num_threads": 1,
}
LORA: dict[str, Any] = {**SMALL, "enable_lora": True}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)


def merged_answers(name: str, adapters: list[Path], root: Path) -> list[RequestOutput]:
    """What the base, then each adapter merged into it, answers to a family's prompt."""
    models = [directory(name)]
    models += [merge(directory(name), each, root / each.name) for each in adapters]
    found = []
    for model in models:
        with LLM(str(model), device="cpu", **SMALL) as llm:
            found += llm.generate([prompt(name)], GREEDY)
    return found


def requests(adapters: list[Path]) -> list[LoRARequest]:
    return [LoRARequest(each.name, i + 1, str(each)) for i, each in enumerate(adapters)]


def margins_of(entries: Sequence[TokenLogprob | None]) -> list[float]:
    """How clear each choice was."""
    tops = [sorted(top.logprob for top in entry.top) for entry in entries if entry is not None]
    return [float(best[-1] - best[-2]) for best in tops]


def assert_same(ours: RequestOutput, reference: RequestOutput) -> None:
    (expected,) = reference.outputs
    assert expected.logprobs is not None
    margins = margins_of(expected.logprobs)
    assert_same_tokens(ours.outputs[0].token_ids, expected.token_ids, margins)
    assert first_choice(ours) == pytest.approx(first_choice(reference), abs=1e-3)


def first_choice(output: RequestOutput) -> dict[int, float]:
    """The best tokens of the first position with their log-probabilities."""
    entries = output.outputs[0].logprobs
    assert entries is not None
    return {top.token_id: top.logprob for top in entries[0].top}
