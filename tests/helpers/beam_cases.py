"""transformers' beam searches on the tiny checkpoints, and running them on a shard.

tests/reference/make_beam_golden.py made them. None hangs by a near-tie (in float64 they come out
the same), so whoever searches in float32 has to find them to their ends.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import Any

import numpy as np

from helpers.tiny_models import references
from tensorray.cluster.beams import Hypothesis
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.sampling_params import SamplingParams
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.sequence import Sequence

Case = dict[str, Any]

GOLDEN: dict[str, list[Case]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "beam_search.json").read_text()
)
WIDTH, TOKENS, VOCAB = 4, 12, 272


def params_of(case: Case) -> SamplingParams:
    asked = dict(case["settings"])
    return SamplingParams(
        use_beam_search=True,
        n=WIDTH,
        max_tokens=TOKENS,
        ignore_eos=True,
        stop_token_ids=asked.pop("eos_token_id"),
        min_tokens=asked.pop("min_new_tokens", 0),
        **asked,
    )


def prompt_of(name: str, case: Case) -> list[int]:
    prompt: list[int] = references(name)[case["prompt"]].prompt.tolist()
    return prompt


def assert_found(
    answers: Sequences[tuple[list[int], float | None]], case: Case, tolerance: float = 1e-3
) -> None:
    """transformers' answers in its order, score for score: `answers` are tokens and the sums of
    their log-probabilities."""
    assert [tokens for tokens, _ in answers] == case["answers"]
    penalty = case["settings"].get("length_penalty", 1.0)
    scores = [(total or 0.0) / len(tokens) ** penalty for tokens, total in answers]
    np.testing.assert_allclose(scores, case["scores"], atol=tolerance)


def searches(
    shard: Any, scheduler: Scheduler, name: str, cases: list[Case], *, beside: int = 0
) -> tuple[list[list[Hypothesis]], list[list[int]]]:
    """What the cases' searches find on a shard, all in one batch with `beside` greedy sequences,
    and the tokens of these; as many steps in flight as the shard likes."""
    found: list[list[Hypothesis]] = [[] for _ in cases]
    tokens: list[list[int]] = [[] for _ in range(beside)]
    places: dict[int, Any] = {}
    for place, case in enumerate(cases):
        params, prompt = params_of(case), prompt_of(name, case)
        sampling = params.resolve([], VOCAB)
        request = GenerationRequest(
            str(place), prompt, sampling, TOKENS, n=WIDTH, beams=params.beam_search()
        )
        scheduler.add(Sequence(place * WIDTH, request, sampling))
        places[place * WIDTH] = found[place]
    for index in range(beside):
        sampling = SamplingParams(temperature=0).resolve([], VOCAB)
        prompt = references(name)[index % 3].prompt.tolist()
        seq = len(cases) * WIDTH + index
        request = GenerationRequest(f"beside {index}", prompt, sampling, 16)
        scheduler.add(Sequence(seq, request, sampling))
        places[seq] = tokens[index]
    steps: deque[Any] = deque()
    while scheduler.unfinished:
        while len(steps) < shard.info.depth and (plan := scheduler.schedule()) is not None:
            steps.append(shard.submit(plan))
        for gain in scheduler.update(steps.popleft()()):
            assert not gain.error
            if gain.hypotheses is not None:
                places[gain.sequence.seq] += gain.hypotheses
            elif gain.token is not None:
                places[gain.sequence.seq].append(gain.token)
    while steps:
        scheduler.update(steps.popleft()())
    stats = scheduler.stats()
    assert stats.free_blocks == stats.total_blocks
    return found, tokens


def assert_searched(found: list[Hypothesis], case: Case, tolerance: float = 1e-3) -> None:
    answers = [([e.token for e in each.entries], each.beam.cumulative) for each in found]
    assert_found(answers, case, tolerance)
