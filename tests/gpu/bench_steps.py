"""Steps of a GPU shard at published sizes, random weights: what a step costs device and host.

    python3 tests/gpu/bench_steps.py [--models Qwen3-0.6B,Llama-3.1-8B] [--batches 1,16,64,256]
        [--dtype float16] [--eager] [--context 256]

Each batch decodes for a while with two steps in flight. Printed: milliseconds a step; what the
host spends starting one; what the device alone takes for the graph; the floor, weights and KV
cache read once at the measured copy rate.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
from helpers.published_configs import PUBLISHED

from tensorray.actors.config import ShardConfig
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan

COPY_RATE = 4.3e12  # bytes a second, measured on an H200


def load(name: str, arguments: argparse.Namespace) -> GpuShard:
    directory = Path(tempfile.mkdtemp()) / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(PUBLISHED[name].config))
    return GpuShard.load(
        ShardConfig(
            str(directory),
            load_format="dummy",
            device="cuda",
            dtype=arguments.dtype,
            max_model_len=8192,
            enforce_eager=arguments.eager,
            segment_backend=arguments.backend,
            cudagraph_capture_sizes=tuple(arguments.graphs),
        )
    )


def decode(shard: GpuShard, batch: int, context: int, steps: int) -> tuple[float, float]:
    """Milliseconds a step, and of these what `submit` takes, at about `context` cached tokens."""
    rng = np.random.default_rng(batch)
    width = -(-(context + steps + 32) // shard.info.kv.block_size)
    shard.reset()
    sampling = Sampling(temperature=0.0)
    step = 0
    chunk = max(1, shard.info.step_tokens // context)
    for first in range(0, batch, chunk):
        seqs = list(range(first, min(first + chunk, batch)))
        starts = [
            SequenceStart(
                seq,
                rng.integers(10, 1000, context).tolist(),
                context,
                0,
                [[1 + seq * width + i for i in range(width)]] * len(shard.info.kv.windows),
                sampling,
            )
            for seq in seqs
        ]
        shard.submit(StepPlan(step, seqs, [context] * len(seqs), starts=starts))()
        step += 1
    seqs, counts = list(range(batch)), [1] * batch
    pending, submits, ends = deque(), [], []
    for i in range(steps):
        began = time.perf_counter()
        pending.append(shard.submit(StepPlan(step + i, seqs, counts)))
        submits.append(time.perf_counter() - began)
        if len(pending) == 2:
            pending.popleft()()
            ends.append(time.perf_counter())
    while pending:
        pending.popleft()()
    return float(np.median(np.diff(ends[3:]))) * 1e3, float(np.median(submits[3:])) * 1e3


def replay(shard: GpuShard, batch: int, times: int = 20) -> float:
    """Milliseconds of the decode graph alone, back to back."""
    forward, device = shard._forward, shard._device
    size = forward._decode_sizes.fit(batch)
    if size is None:
        return float("nan")
    with device.current():
        forward._decodes[size]()
        device.mark().wait()
        began = time.perf_counter()
        for _ in range(times):
            forward._decodes[size]()
        device.mark().wait()
        return (time.perf_counter() - began) / times * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="Qwen3-0.6B,Llama-3.1-8B")
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--backend", default="kernels")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--graphs", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f %(message)s")
    rows = []
    for name in arguments.models.split(","):
        shard = load(name, arguments)
        info = shard.info
        print(f"{name}: loaded in {info.load_seconds:.1f} s, {info.kv.num_blocks} blocks")
        for batch in map(int, arguments.batches.split(",")):
            step, submit = decode(shard, batch, arguments.context, arguments.steps)
            tokens = batch * (arguments.context + arguments.steps // 2)
            per_token = info.kv_cache_bytes / info.kv.num_blocks / info.kv.block_size
            per_token *= len(info.kv.windows)
            floor = (info.weight_bytes + tokens * per_token) / COPY_RATE * 1e3
            rows.append((name, batch, step, submit, replay(shard, batch), floor))
            print(rows[-1], flush=True)
        shard.close()
        del shard
    print(f"{'model':14} {'batch':>5} {'step ms':>8} {'submit':>7} {'graph':>7} {'floor':>7}")
    for name, batch, step, submit, graph, floor in rows:
        print(f"{name:14} {batch:5} {step:8.3f} {submit:7.3f} {graph:7.3f} {floor:7.3f}")


if __name__ == "__main__":
    main()
