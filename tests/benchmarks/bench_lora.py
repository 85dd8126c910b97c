"""What LoRA adapters cost a step of Gemma 3 270M (float32, random weights) on a CPU.

    python tests/benchmarks/bench_lora.py [--threads 2] [--context 256] [--rank 16]

One line a step kind: milliseconds without any adapter (best of the repeats), and the ratio to that
of the same step where one adapter, or eight by turns, run with the sequences. Adapters are on all
linear layers. The steps that are compared take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import time
from itertools import cycle, islice
from typing import Any

import numpy as np
from bench_step import BLOCK, CONFIG, batch_of, random_weights, step

from tensorray import kernels
from tensorray.actors.adapter import Adapter, AdapterSource
from tensorray.actors.adapters import AdapterOps, LoadedAdapter, ShardAdapters, StepRows
from tensorray.builder.array_ops import LayerKV
from tensorray.builder.model import ShardWeights
from tensorray.builder.models.gemma3 import Gemma3
from tensorray.kernels.low_rank import Block, LowRank

LINEAR = {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}  # matrices that each is made of


def random_adapter(weights: ShardWeights, number: int, rank: int) -> LoadedAdapter:
    rng = np.random.default_rng(number)
    deltas = {}
    for group in weights.layers.values():
        for name, matrices in LINEAR.items():
            outputs, inputs = group.arrays[name].shape
            a = rng.standard_normal((rank * matrices, inputs), np.float32) * np.float32(0.01)
            blocks = []
            for i in range(matrices):
                cut = slice(outputs * i // matrices, outputs * (i + 1) // matrices)
                b = rng.standard_normal((cut.stop - cut.start, rank), np.float32)
                blocks.append(Block(cut, slice(rank * i, rank * (i + 1)), b * np.float32(0.01)))
            deltas[id(group.arrays[name])] = LowRank(a, tuple(blocks))
    return LoadedAdapter(Adapter(str(number), number, ""), deltas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    kernels.set_num_threads(options.threads)
    model = Gemma3(CONFIG)
    weights = random_weights(model)
    loaded = [random_adapter(weights, number, options.rank) for number in range(1, 9)]
    print(f"an adapter of rank {options.rank}: {loaded[0].nbytes / 2**20:.1f} MiB")
    shard = ShardAdapters(model, weights, range(18), source=AdapterSource(), max_rank=512)
    kinds = {f"{n} decodes": [1] * n for n in (1, 8, 16, 32, 64)}
    kinds["16 decodes, prefill 128"] = [1] * 16 + [min(128, options.context)]
    for name, counts in kinds.items():
        batch = batch_of(counts, options.context)
        blocks = 1 + len(counts) * -(-options.context // BLOCK)
        pages = np.zeros((2, blocks, 1, BLOCK, 256), np.float32)
        kv = [
            LayerKV(pages[0], pages[1], 0, model.kv_spec(layer).window)
            for layer in range(model.num_layers)
        ]
        ops = AdapterOps(shard, np, kv, 32_768)
        ops.batch = batch
        owners: list[list[Any]] = [
            list(islice(cycle(some), len(counts))) for some in ([None], loaded[:1], loaded)
        ]
        best = [float("inf")] * len(owners)
        for _ in range(options.repeats):
            for i, owned in enumerate(owners):
                begin = time.perf_counter()
                rows = StepRows(owned, batch.query_starts, frozenset()) if any(owned) else None
                shard.rows = rows
                step(model, ops, weights)
                best[i] = min(best[i], time.perf_counter() - begin)
        plain, one, eight = best
        print(
            f"{name:24}{plain * 1e3:8.1f} ms   one adapter {one / plain:.2f}   "
            f"{len({*owners[2]})} adapters {eight / plain:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
