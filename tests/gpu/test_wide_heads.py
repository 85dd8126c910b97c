"""Whole runs with heads as wide as published models have, in float16, against the CPU shard.

The small checkpoints' heads are of 8 dims, which the kernels for 64, 128 and 256 do not take; here
random weights run through those, in pipelined steps that prefill in pieces beside decodes, over a
cache that holds NaN wherever nothing was written.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.equality import assert_same_tokens, choice
from helpers.running import Arrival, RecordingShard, run

from tensorray.actors.config import ShardConfig
from tensorray.actors.device import find_device
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.protocol import Sampling, StepPlan, StepResult
from tensorray.cluster.scheduler import Scheduler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device() is None, reason="needs a GPU that CuPy can use"),
]

GREEDY = Sampling(temperature=0.0)
VOCABULARY = 2000
MAX_MODEL_LEN = 704
REQUESTS = 24


def model(directory: Path, head_dim: int, kv_heads: int, group: int) -> Path:
    config = {
        **{"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5},
        **{"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3},
        **{"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads},
        **{"head_dim": head_dim},
        **{"vocab_size": VOCABULARY, "max_position_embeddings": 1024, "rope_theta": 1e4},
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def settings(directory: Path, **more: Any) -> ShardConfig:
    return ShardConfig(
        str(directory),
        load_format="dummy",
        max_model_len=MAX_MODEL_LEN,
        num_kv_blocks=2000,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        **more,
    )


def arrivals() -> list[Arrival]:
    """Prompts of a few tokens to several tiles of keys, two a step, so that decodes run beside."""
    rng = np.random.default_rng(3)
    lengths = rng.choice([1, 15, 16, 17, 100, 128, 129, 300, 511, 650], REQUESTS)
    return [
        Arrival(i // 2, rng.integers(3, VOCABULARY, length).tolist(), GREEDY, 24)
        for i, length in enumerate(lengths.tolist())
    ]


def scheduler(shard: Any) -> Scheduler:
    return Scheduler(
        shard.info.kv,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )


class Late:
    """A result that is waited for when it is looked at."""

    def __init__(self, shard: GpuShard, plan: StepPlan) -> None:
        self._pending = shard.submit(plan)
        self._result: StepResult | None = None

    def __getattr__(self, name: str) -> Any:
        if self._result is None:
            self._result = self._pending()
        return getattr(self._result, name)


class Pipelined:
    def __init__(self, shard: GpuShard) -> None:
        self.info = shard.info
        self._shard = shard

    def execute(self, plan: StepPlan) -> Any:
        return Late(self._shard, plan)


@cache
def alone_on_the_cpu(head_dim: int, kv_heads: int, group: int) -> list[tuple[list[int], list[Any]]]:
    """Each request's tokens, and the logits they were chosen by."""
    with tempfile.TemporaryDirectory() as directory:
        path = model(Path(directory), head_dim, kv_heads, group)
        shard = RecordingShard.load(settings(path, device="cpu"))
    found = []
    for arrival in arrivals():
        shard.reset()
        lone = Arrival(0, arrival.prompt, GREEDY, arrival.max_tokens)
        (outcome,) = run(shard, scheduler(shard), [lone])
        found.append((outcome.tokens, shard.rows))
    return found


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("heads", [(128, 8, 4), (64, 2, 2), (256, 2, 1), (96, 2, 3)], ids=str)
def test_tokens_are_the_cpu_path_s(
    heads: tuple[int, int, int], eager: bool, tmp_path: Path
) -> None:
    shard = GpuShard.load(
        settings(
            model(tmp_path, *heads),
            device="cuda",
            dtype="float16",
            segment_backend="kernels",
            enforce_eager=eager,
        )
    )
    with shard._device.current():
        for pages in shard._cache._pages:
            pages.fill(float("nan"))
    outcomes = run(Pipelined(shard), scheduler(shard), arrivals(), depth=shard.info.depth)  # type: ignore[arg-type]
    shard.close()
    references = alone_on_the_cpu(*heads)
    for outcome, arrival, (tokens, rows) in zip(outcomes, arrivals(), references, strict=True):

        def clear(position: int, arrival: Any = arrival, rows: Any = rows, tokens: Any = tokens):
            return choice(rows[position], GREEDY, tokens[:position], arrival.prompt)

        assert outcome.finish_reason == "length"
        assert_same_tokens(outcome.tokens, tokens, clear, dtype="float16")
