"""Prompts handed from one GPU shard to another, both on one GPU.

python3 -m pytest tests/gpu/test_gpu_handover.py -q --import-mode=importlib -p no:cacheprovider
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from helpers.handover import pair
from helpers.tiny_models import directory

from tensorray.actors.config import ShardConfig
from tensorray.actors.device import find_device
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.protocol import Sampling
from tensorray.cluster.request import GenerationRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device() is None, reason="needs a GPU that CuPy can use"),
]

PROMPTS = [[3 + (i * i * k + 5 * i) % 80 for i in range(30)] for k in range(4, 12)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "fp8"])
def test_blocks_are_read_as_they_were_written(dtype: str) -> None:
    settings: Any = {"dtype": dtype}
    if dtype == "fp8":
        settings = {"dtype": "float16", "kv_cache_dtype": "fp8"}
    shard = GpuShard.load(
        ShardConfig(
            str(directory("gemma3")),
            device="cuda",
            segment_backend="kernels",
            max_model_len=64,
            block_size=4,
            num_kv_blocks=256,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            enforce_eager=True,
            **settings,
        )
    )
    rng = np.random.default_rng(2)
    blocks = rng.permutation(np.arange(1, 256))[:100].astype(np.int32)
    data = rng.integers(0, 256, 100 * shard.block_bytes).astype(np.uint8)
    shard.write_blocks(blocks, data)
    assert np.array_equal(shard.read_blocks(blocks), data)
    one = shard.read_blocks(blocks[7:8])
    arrays = len(shard._cache._pages)
    assert np.array_equal(one.reshape(arrays, -1), data.reshape(arrays, 100, -1)[:, 7])
    shard.close()


@pytest.mark.parametrize("model", ["gemma3", "llama3"])
def test_two_replicas_tell_what_one_tells(model: str) -> None:
    """While other requests decode, so that copies come between steps that run from graphs."""

    async def tokens(client: Any, asked: GenerationRequest) -> list[int]:
        return [t async for deltas in client.generate(asked) for d in deltas for t in d.tokens]

    async def run() -> None:
        settings = {"device": "cuda", "dtype": "float32", "segment_backend": "kernels"}
        async with pair(model, enable_prefix_caching=False, **settings) as both:
            asked = [
                GenerationRequest(f"r{i}", prompt, Sampling(temperature=0.9, seed=i), 30)
                for i, prompt in enumerate(PROMPTS)
            ]
            alone = await asyncio.gather(*(tokens(both.decode, each) for each in asked))
            split = await asyncio.gather(*(tokens(both.client, each) for each in asked))
            assert split == alone
            assert both.decode.handovers.stats.fetched == len(PROMPTS)
            assert both.decode.handovers.stats.failed == 0

    asyncio.run(run())
