"""Requests that guessed tokens are tried on, and what they give without any."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

from tensorray.actors.link import PendingStep
from tensorray.actors.protocol import Sampling, StepPlan, StepResult
from tensorray.cluster.scheduler import Scheduler

from .equality import assert_same_tokens, choice
from .running import Arrival, RecordingShard, make_shard, run
from .tiny_models import directory

GREEDY = Sampling(temperature=0.0)


def arrivals() -> list[Arrival]:
    """Prompts that repeat themselves, under all that a request can ask of sampling, two at a time;
    one is cancelled."""
    draw = Random(0)
    kinds = [
        GREEDY,
        Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4),
        Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=5),
        Sampling(temperature=1.3, min_p=0.02, seed=7, presence_penalty=0.5),
        Sampling(temperature=0.0, stop_token_ids=list(range(0, 272, 9)), min_tokens=7),
        Sampling(temperature=0.0, logit_bias={5: 3.0}, no_repeat_ngram_size=3),
        Sampling(temperature=0.9, seed=11),
        GREEDY,
    ]
    found = []
    for index, sampling in enumerate(kinds):
        phrase = [draw.randrange(10, 250) for _ in range(draw.randint(3, 6))]
        cancel = 9 if index == 6 else None
        found.append(Arrival(index // 2, phrase * 4, sampling, 38 - index, cancel))
    return found


class Ahead:
    """Reads each result only when it is asked for, as an engine does, and keeps it."""

    def __init__(self, shard: Any) -> None:
        self._shard = shard
        self.steps = 0
        self.results: list[StepResult] = []

    def execute(self, plan: StepPlan) -> Any:
        self.steps += 1
        return Late(self._shard.submit(plan), self.results)


class Late:
    def __init__(self, pending: PendingStep, kept: list[StepResult]) -> None:
        self._pending = pending
        self._kept = kept
        self._result: StepResult | None = None

    def __getattr__(self, name: str) -> Any:
        if self._result is None:
            self._result = self._pending()
            self._kept.append(self._result)
        return getattr(self._result, name)


def scheduler(shard: Any) -> Scheduler:
    return Scheduler(
        shard.info.kv,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        drafting=shard.info.drafting,
    )


@cache
def alone(name: str, index: int) -> tuple[list[int], list[Any]]:
    """What the CPU shard chooses for an arrival that is alone, without guesses; its logits."""
    shard = make_shard(directory(name), kind=RecordingShard)
    arrival = arrivals()[index]
    lone = Arrival(0, arrival.prompt, arrival.sampling, arrival.max_tokens)
    (outcome,) = run(shard, scheduler(shard), [lone])
    return outcome.tokens, shard.rows


def texts(name: str) -> list[list[int]]:
    return [each.prompt + alone(name, i)[0] for i, each in enumerate(arrivals())]


def assert_like_the_cpu(
    name: str, shard: Any, only: Sequence[int] = range(8)
) -> tuple[Ahead, Scheduler]:
    ahead, plans = Ahead(shard), scheduler(shard)
    asked = arrivals()
    outcomes = run(ahead, plans, [asked[i] for i in only], depth=shard.info.depth)
    for index, ours in zip(only, outcomes, strict=True):
        arrival = asked[index]
        expected, rows = alone(name, index)
        if arrival.cancel_after is not None:
            expected = expected[: len(ours.tokens)]

        def clear(position: int, a: Any = arrival, rows: Any = rows, t: Any = expected) -> Any:
            return choice(rows[position], a.sampling, t[:position], a.prompt)

        assert_same_tokens(ours.tokens, expected, clear)
    stats = plans.stats()
    assert stats.free_blocks == stats.total_blocks
    return ahead, plans
