"""Hidden states that a GPU pools, against transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import directory

from tensorray.actors.config import ShardConfig
from tensorray.actors.device import find_device
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.protocol import Sampling
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.sequence import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device() is None, reason="needs a GPU that CuPy can use"),
]

GOLDEN = dict(np.load(Path(__file__).parents[1] / "fixtures" / "pooling.npz"))
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}  # of the vector's length


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["last", "mean", "cls"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "llama3"])
def test_vectors_are_transformers(name: str, kind: str, dtype: Any) -> None:
    shard = GpuShard.load(
        ShardConfig(
            str(directory(name)),
            device="cuda",
            dtype=dtype,
            segment_backend="kernels",
            max_model_len=64,
            block_size=4,
            num_kv_blocks=512,
            max_num_seqs=8,
            max_num_batched_tokens=16,
        )
    )
    books = Scheduler(shard.info.kv, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=16)
    for i in range(5):  # the last one generates
        request = GenerationRequest(
            request_id=str(i),
            prompt=GOLDEN[f"{name}_prompt_{i % 4}"].tolist(),
            sampling=Sampling(temperature=0.0),
            max_tokens=1 if i < 4 else 8,
            pooling=kind if i < 4 else "",
            reuse_prefix=kind == "last",
        )
        books.add(Sequence(i, request, request.sampling))
    found: dict[int, np.ndarray] = {}
    under_way: list[Any] = []
    while books.unfinished:
        while len(under_way) < 2 and (plan := books.schedule()) is not None:
            under_way.append(shard.submit(plan))
        for each in books.update(under_way.pop(0)()):
            if each.pooled:
                found[each.sequence.seq] = np.frombuffer(each.pooled, "<f4")
    shard.close()
    for i in range(4):
        expected = GOLDEN[f"{name}_{kind}_{i}"]
        error = np.linalg.norm(found[i] - expected) / np.linalg.norm(expected)
        assert error < TOLERANCE[dtype], i
