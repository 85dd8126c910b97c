"""Products by quantized weights on a GPU against float64, and the GPU shard on such checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import quantized_files, tiny_models
from helpers.gpu_arrays import normal, relative_error, wide

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from tensorray.actors.config import ShardConfig  # noqa: E402
from tensorray.actors.gpu_shard import GpuShard  # noqa: E402
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan  # noqa: E402
from tensorray.actors.shard import Shard  # noqa: E402
from tensorray.kernels import moe  # noqa: E402
from tensorray.kernels.linear import linear, linear_numpy  # noqa: E402
from tensorray.kernels.quantized import (  # noqa: E402
    Kind,
    QuantizedWeight,
    dequantize,
    pack_int4,
)

TOLERANCE = {"float16": 2e-3, "bfloat16": 1.5e-2, "float32": 1e-5}


def weight(kind: Kind, *shape: int, group: int, zeros: bool, order: bool) -> QuantizedWeight:
    rng = np.random.default_rng(shape)
    codes = rng.integers(-8, 8, shape, np.int8)
    values = {"int4": pack_int4, "int8": lambda c: c, "float8": lambda c: c.view(np.uint8) & 0xBF}
    by_group = (*shape[:-1], -(-shape[-1] // group))
    inputs = rng.permutation(shape[-1]).astype(np.int32)
    if len(shape) == 3:
        inputs = np.stack([inputs] * shape[0])
    return QuantizedWeight(
        kind,
        group,
        values[kind](codes),
        (rng.uniform(0.5, 1.0, by_group) / 8 * shape[-1] ** -0.5).astype(np.float32),
        rng.integers(-8, 8, by_group, np.int8) if zeros else None,
        inputs if order else None,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
def test_linear(kind: Kind, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorray.kernels.quantized._BLOCK_VALUES_CUDA", 1 << 16)
    rng = np.random.default_rng(0)
    for group, zeros, order in ((256, False, False), (128, True, False), (64, True, True)):
        held = weight(kind, 512, 256, group=group, zeros=zeros, order=order)
        there, values = held.map(cupy.asarray), dequantize(held).astype(np.float64)
        assert relative_error(dequantize(there), values) < 1e-6
        for rows in (1, 7, 200):
            x = normal(rng, rows, 256, dtype=dtype)
            norm, bias = normal(rng, 256, dtype=dtype), normal(rng, 512, dtype=dtype)
            residual = normal(rng, rows, 256, dtype=dtype)
            expected = wide(x) @ values.T + wide(bias)
            assert relative_error(linear(x, there, bias), expected) < TOLERANCE[dtype]
            given: dict[str, Any] = {"norm": norm, "gate": "silu", "residual": residual}
            found = linear(x, there, bias, eps=1e-6, **given)
            given = {name: g if isinstance(g, str) else wide(g) for name, g in given.items()}
            expected = linear_numpy(wide(x), values, wide(bias), eps=1e-6, **given)
            assert relative_error(found, expected) < 2 * TOLERANCE[dtype]
            assert found.dtype == x.dtype


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_a_captured_product_waits_for_what_unpacks_its_weight(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of several weights, unpacked one after the other to the same memory."""
    monkeypatch.setattr("tensorray.kernels.quantized._BLOCK_VALUES_CUDA", 1 << 20)
    rng = np.random.default_rng(2)
    held = [
        weight("int4", 4096, 2048, group=128, zeros=bool(i % 2), order=False).map(cupy.asarray)
        for i in range(2)
    ]
    held[1].scales[...] *= 3
    x = normal(rng, rows, 2048, dtype="float16")
    expected = [cupy.asnumpy(linear(x, each)) for each in held]
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        linear(x, held[0])
        stream.begin_capture()
        found = [linear(x, each) for each in [*held, *held]]
        graph = stream.end_capture()
        for _ in range(20):
            graph.launch(stream)
            stream.synchronize()
            for ours, theirs in zip(found, [*expected, *expected], strict=True):
                assert np.array_equal(cupy.asnumpy(ours), theirs)


def test_experts() -> None:
    rng = np.random.default_rng(1)
    gate_up = weight("int4", 4, 128, 64, group=32, zeros=True, order=True)
    down = weight("int8", 4, 64, 64, group=64, zeros=False, order=False)
    x = normal(rng, 9, 64, dtype="float16")
    there = gate_up.map(cupy.asarray), down.map(cupy.asarray)
    # The only experts, or those of a rank, of which rows choose some or none.
    for all_experts, first in [(4, None), (8, 2), (8, 8)]:
        weights, ids = moe.route(normal(rng, 9, all_experts, dtype="float32"), 2, True)
        found = moe.experts(x, weights, ids, *there, first)
        plain = wide(x), wide(weights), cupy.asnumpy(ids), dequantize(gate_up), dequantize(down)
        assert relative_error(found, moe.experts_numpy(*plain, first or 0)) < 5e-3


LAYOUTS = {
    "gptq, act-order": quantized_files.gptq(act_order=True, symmetric=False),
    "awq": quantized_files.awq(),
    "packed 8 bits": quantized_files.packed(bits=8, group=8),
    "modelopt": quantized_files.modelopt(),
}


@pytest.mark.parametrize("model", ["llama3", "mixtral", "gemma3"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_give_the_cpus_tokens(tmp_path: Path, name: str, model: str) -> None:
    """Greedily, in float32, from recorded graphs on the GPU."""
    directory = tmp_path / "m"
    quantized_files.quantize_model(tiny_models.directory(model), directory, LAYOUTS[name])
    config = ShardConfig(
        str(directory),
        dtype="float32",
        max_model_len=64,
        block_size=4,
        num_kv_blocks=512,
        max_num_seqs=4,
        max_num_batched_tokens=64,
    )
    prompt = np.random.default_rng(3).integers(3, 90, 11).tolist()
    found = []
    for kind, chosen in (
        (Shard, config),
        (GpuShard, replace(config, device="cuda", segment_backend="kernels")),
    ):
        shard = kind.load(chosen)  # type: ignore[attr-defined]
        groups = len(shard.info.kv.windows)
        blocks = [list(range(1 + 8 * g, 9 + 8 * g)) for g in range(groups)]
        start = SequenceStart(
            seq=1,
            tokens=prompt,
            prompt_len=len(prompt),
            computed=0,
            blocks=blocks,
            sampling=Sampling(temperature=0.0),
        )
        tokens = []
        for step in range(12):
            plan = StepPlan(
                step=step,
                starts=[] if step else [start],
                seqs=[1],
                counts=[1 if step else len(prompt)],
                new_blocks={},
                ends=[],
            )
            tokens += shard.submit(plan)().tokens
        found.append(tokens)
        shard.close()
    assert found[0] == found[1]
