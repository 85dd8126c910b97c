"""Driving a real shard and a real scheduler step by step, without an event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tensorray.actors.kv_cache import KVCache, plan_groups
from tensorray.actors.protocol import Sampling, StepResult
from tensorray.actors.shard import Shard
from tensorray.builder.checkpoint import open_checkpoint
from tensorray.builder.load import load_weights, plan_bytes
from tensorray.builder.model import Layout, Model, ShardWeights, stage_layers
from tensorray.builder.registry import resolve
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.scheduler import Progress, Scheduler
from tensorray.cluster.sequence import Sequence


@lru_cache
def load(path: Path, layout: Layout | None = None) -> tuple[Model, ShardWeights]:
    layout = layout or Layout()
    checkpoint = open_checkpoint(str(path))
    model = resolve(checkpoint.config, None)(checkpoint.config, layout)
    layers = stage_layers(model.num_layers, layout.pp_size, layout.pp_rank)
    return model, load_weights(model, checkpoint, layers=layers)


def make_shard(
    path: Path,
    *,
    num_blocks: int = 512,
    block_size: int = 4,
    max_model_len: int = 64,
    max_num_seqs: int = 16,
    kind: type[Shard] = Shard,
    vocabulary: Any = None,
    processors: Any = None,
) -> Shard:
    """A shard over a small checkpoint, its weights loaded once for all."""
    model, weights = load(path)
    groups = plan_groups([model.kv_spec(i) for i in range(model.num_layers)], block_size)
    return kind(
        model,
        weights,
        KVCache(groups, num_blocks, np, np.float32),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        weight_bytes=plan_bytes(model),
        load_seconds=0.0,
        vocabulary=vocabulary,
        processors=processors,
    )


@dataclass
class Arrival:
    """A request that comes when `step` steps have run."""

    step: int
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    cancel_after: int | None = None  # steps after its arrival
    salt: str = ""


def sequence(seq: int, arrival: Arrival) -> Sequence:
    request = GenerationRequest(
        request_id=str(seq),
        prompt=arrival.prompt,
        sampling=arrival.sampling,
        max_tokens=arrival.max_tokens,
        cache_salt=arrival.salt,
    )
    return Sequence(seq, request, arrival.sampling)


@dataclass
class Outcome:
    tokens: list[int]
    finish_reason: str | None = None


def run(
    shard: Shard, scheduler: Scheduler, arrivals: Iterable[Arrival], *, depth: int = 1
) -> list[Outcome]:
    """Run all arrivals to their ends, up to `depth` steps in flight; outcomes in their order."""
    coming = deque(sorted(enumerate(arrivals), key=lambda item: item[1].step))
    outcomes = [Outcome([]) for _ in coming]
    cancels: list[tuple[int, int]] = []
    results: deque[StepResult] = deque()
    step = 0
    while coming or scheduler.unfinished:
        while coming and coming[0][1].step <= step:
            seq, arrival = coming.popleft()
            scheduler.add(sequence(seq, arrival))
            if arrival.cancel_after is not None:
                cancels.append((step + arrival.cancel_after, seq))
        for when, seq in cancels:
            if when == step and scheduler.cancel(seq):
                outcomes[seq].finish_reason = "abort"
        step += 1
        while len(results) < depth and (plan := scheduler.schedule()) is not None:
            results.append(shard.execute(plan))
        if not results:
            continue
        for progress in scheduler.update(results.popleft()):
            take(outcomes[progress.sequence.seq], progress)
        assert step < 10_000, "no end in sight"
    while results:  # steps that were on their way when the last sequence ended
        scheduler.update(results.popleft())
    return outcomes


def take(outcome: Outcome, progress: Progress) -> None:
    assert outcome.finish_reason is None, "progress after the end"
    if progress.token is not None:
        outcome.tokens.append(progress.token)
    outcome.finish_reason = progress.finish_reason


class RecordingShard(Shard):
    """Keeps every row of logits it sampled from."""

    rows: list[np.ndarray]

    def reset(self) -> None:
        super().reset()
        self.rows = []

    def _logits(self, batch: Any, hidden: Any) -> Any:
        logits = super()._logits(batch, hidden)
        self.rows.extend(np.array(logits))
        return logits
