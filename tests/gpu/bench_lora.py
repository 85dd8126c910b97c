"""Steps of a GPU shard with LoRA adapters, at a published size with random weights.

    python3 tests/gpu/bench_lora.py [--model Llama-3.1-8B] [--batches 1,16,64] [--rank 16]

Each batch decodes with 0, 1 and 8 different adapters, two steps in flight; then a prefill of one
step's tokens. Printed: milliseconds a step; what adapters add; the floor of that, the matrices of
the adapters that run read once at the measured copy rate; and what was predicted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from bench_steps import COPY_RATE, decode
from helpers.published_configs import PUBLISHED

from tensorray.actors.adapter import Adapter
from tensorray.actors.config import ShardConfig
from tensorray.actors.device_adapters import DeviceAdapters
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.link import PendingStep
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan
from tensorray.kernels.low_rank import Block, LowRank

# Of Llama-3.1-8B and rank 16 on an H200, in milliseconds: 11 launches a layer more, some 2.5 us
# each, and each row's matrices (84 MB) from the L2 cache at some 6 TB/s; of many rows, the products
# read and written once more, and tiles of 8 rows from the L2 cache.
PREDICTED = {1: "0.9", 16: "1.1", 64: "1.6"}
PREDICTED_PREFILL = "13-15"


class WithAdapters:
    """A shard whose sequences have one of so many adapters each, in turn."""

    def __init__(self, shard: GpuShard, adapters: int) -> None:
        self.info = shard.info
        self.reset = shard.reset
        self._shard = shard
        self._adapters = adapters

    def submit(self, plan: StepPlan) -> PendingStep:
        if self._adapters:
            starts = [
                msgspec.structs.replace(start, adapter=1 + start.seq % self._adapters)
                for start in plan.starts
            ]
            plan = msgspec.structs.replace(plan, starts=starts)
        return self._shard.submit(plan)


def load(arguments: argparse.Namespace, batches: list[int]) -> GpuShard:
    directory = Path(tempfile.mkdtemp()) / arguments.model
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(PUBLISHED[arguments.model].config))
    config = ShardConfig(
        str(directory),
        load_format="dummy",
        device="cuda",
        dtype=arguments.dtype,
        max_model_len=8192,
        max_num_batched_tokens=2048,
        segment_backend="kernels",
        cudagraph_capture_sizes=(*batches, 2048),
        enable_lora=True,
        max_loras=8,
        max_lora_rank=arguments.rank,
    )
    return GpuShard.load(config)


def add_adapters(adapters: DeviceAdapters, count: int, rank: int) -> float:
    """Random ones; milliseconds that laying one out in pinned memory takes."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1 << 22, np.float32) * 0.02
    layout = adapters._layout

    def matrix(*shape: int) -> Any:
        return np.resize(values, shape)

    found = {}
    for place, each in layout.sections.items():
        blocks = []
        for i, outputs in enumerate(each.outputs):
            b = matrix(outputs.stop - outputs.start, rank)
            blocks.append(Block(outputs, slice(i * rank, (i + 1) * rank), b))
        found[place] = LowRank(matrix(len(blocks) * rank, each.inner), tuple(blocks))
    began = time.perf_counter()
    for id in range(1, count + 1):
        adapter = Adapter(f"a{id}", id, "random")
        adapters._loaded[id] = adapters.hold(adapter, found)
    return (time.perf_counter() - began) / count * 1e3


def prefill(shard: WithAdapters, sequences: int, tokens: int) -> float:
    """Milliseconds of steps that prefill so many sequences, of so many tokens in all."""
    each = tokens // sequences
    width = -(-(each + 1) // shard.info.kv.block_size)
    rng = np.random.default_rng(1)
    times = []
    shard.reset()
    for step in range(6):
        seqs = list(range(step * sequences, (step + 1) * sequences))
        starts = [
            SequenceStart(
                seq,
                rng.integers(10, 1000, each).tolist(),
                each,
                0,
                [[1 + i * width + j for j in range(width)]] * len(shard.info.kv.windows),
                Sampling(temperature=0.0),
            )
            for i, seq in enumerate(seqs)
        ]
        ends = [seq - sequences for seq in seqs] if step else []
        plan = StepPlan(step, seqs, [each] * sequences, starts=starts, ends=ends)
        began = time.perf_counter()
        shard.submit(plan)()
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:])) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    batches = [int(each) for each in arguments.batches.split(",")]
    shard = load(arguments, batches)
    adapters = shard._adapters
    assert adapters is not None
    print(f"{arguments.model}: loaded in {shard.info.load_seconds:.1f} s, ", end="")
    print(f"{adapters.nbytes / 2**20:.0f} MiB for 8 adapters of rank {arguments.rank}")
    print(f"an adapter laid out in {add_adapters(adapters, 8, arguments.rank):.0f} ms", flush=True)
    one = adapters.nbytes / 8
    print(
        f"{'':8} {'adapters':>8} {'step ms':>8} {'submit':>7} {'added':>7} {'floor':>6} predicted"
    )
    for batch in batches:
        plain = 0.0
        for count in (0, 1, 8):
            chosen = WithAdapters(shard, count)
            step, submit = decode(chosen, batch, 256, arguments.steps)  # type: ignore[arg-type]
            plain = plain or step
            floor = min(count, batch) * one / COPY_RATE * 1e3
            print(
                f"batch {batch:<3} {count:7} {step:8.3f} {submit:7.3f} {step - plain:7.3f} "
                f"{floor:6.3f} {PREDICTED.get(batch, '') if count else ''}",
                flush=True,
            )
    plain = 0.0
    for count in (0, 1, 8):
        step = prefill(WithAdapters(shard, count), 8, 2048)
        plain = plain or step
        print(
            f"2048 rows {count:5} {step:8.3f} {'':7} {step - plain:7.3f} "
            f"{count * one / COPY_RATE * 1e3:6.3f} {PREDICTED_PREFILL if count else ''}",
            flush=True,
        )
    shard.close()


if __name__ == "__main__":
    main()
