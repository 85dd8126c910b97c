"""Medusa heads that know a text, and files of heads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tensorray.actors.drafter import Drafter
from tensorray.actors.kv_cache import KVCache, plan_stage
from tensorray.actors.protocol import Drafting
from tensorray.actors.shard import Shard
from tensorray.actors.speculation import Speculation
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.checkpoint.medusa import MedusaHead
from tensorray.cluster.scheduler import Scheduler

from .running import Arrival, load, run


class _Watching(Drafter):
    """Keeps what each token was chosen from, and guesses nothing."""

    def __init__(self) -> None:
        self.rows: list[NDArray[Any]] = []

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        self.rows.append(row.copy())


def heads_that_know(path: Path, arrival: Arrival, count: int) -> tuple[list[MedusaHead], list[int]]:
    """Heads whose likeliest guesses are right all along what a checkpoint answers to one request,
    and that answer, of no more tokens than hidden states have elements."""
    model, weights = load(path)
    groups, _ = plan_stage(model, 4)
    watching = _Watching()
    shard = Shard(
        model,
        weights,
        KVCache(groups, 64 * len(groups.groups), np, np.float32),
        max_model_len=64,
        max_num_seqs=1,
        weight_bytes=0,
        load_seconds=0.0,
        speculation=Speculation(Drafting(1, 0.0, 0.0), watching),
    )
    plans = Scheduler(shard.info.kv, max_model_len=64, max_num_seqs=1, max_num_batched_tokens=40)
    (outcome,) = run(shard, plans, [arrival])
    states = model.final_norm(ArrayOps(np, {}), weights.head, np.stack(watching.rows))
    heads = []
    for ahead in range(1, count + 1):
        wanted = np.zeros((len(states), model.vocab_size), np.float32)
        known = range(len(states) - ahead)
        wanted[known, outcome.tokens[ahead:]] = 1.0
        projection = np.linalg.lstsq(states[known], wanted[known], rcond=None)[0]
        block = np.zeros((model.hidden_size, model.hidden_size), np.float32)
        heads.append(MedusaHead(((block, None),), np.ascontiguousarray(projection.T)))
    return heads, outcome.tokens


def write_heads(path: Path, heads: Sequence[MedusaHead]) -> Path:
    """Heads in their authors' layout."""
    tensors = {}
    for place, head in enumerate(heads):
        tensors[f"medusa_head.{place}.0.linear.weight"] = head.blocks[0][0]
        tensors[f"medusa_head.{place}.1.weight"] = head.projection
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "medusa_lm_head.safetensors")
    return path
