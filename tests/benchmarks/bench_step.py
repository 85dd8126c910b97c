"""A whole step of Gemma 3 270M (float32, random weights) on the CPU kernels, by batch and context.

    python tests/benchmarks/bench_step.py [--threads 2] [--context 256] [--numpy]

One line a step kind: milliseconds (best of the repeats), and where they went, op by op. `--numpy`
runs the NumPy twins instead of the C kernels.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tensorray import kernels
from tensorray.builder.array_ops import ArrayOps, LayerKV
from tensorray.builder.model import ShardWeights, Weight, Weights
from tensorray.builder.models.gemma3 import Gemma3
from tensorray.builder.shares import weight_shape
from tensorray.kernels import native
from tensorray.kernels.batch import Batch

CONFIG = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32_768,
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
BLOCK = 16


class TimedOps(ArrayOps):
    """ArrayOps that adds up the seconds its ops take."""

    seconds: dict[str, float]

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not hasattr(value, "op_kind"):
            return value

        def timed(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            result = value(*arguments, **named)
            self.seconds[name] += time.perf_counter() - begin
            return result

        return timed


def random_weights(model: Gemma3) -> ShardWeights:
    rng = np.random.default_rng(0)
    made: dict[Weight, Any] = {}

    def group(declared: dict[str, Weight]) -> Weights:
        for weight in declared.values():
            if weight not in made:
                array = rng.standard_normal(weight_shape(weight, model.layout), np.float32)
                made[weight] = array * np.float32(0.02) + np.float32(weight.add)
        return Weights({name: made[weight] for name, weight in declared.items()})

    layers = {layer: group(model.layer_weights(layer)) for layer in range(model.num_layers)}
    return ShardWeights(group(model.embed_weights()), layers, group(model.head_weights()))


def step(model: Gemma3, ops: ArrayOps, weights: ShardWeights) -> Any:
    x = model.embed(ops, weights.embed, ops.batch.tokens)
    for layer, group in weights.layers.items():
        x = model.layer(ops, group, x, layer)
    return model.head(ops, weights.head, ops.select_rows(x))


def batch_of(counts: list[int], context: int) -> Batch:
    """Sequences of `context` tokens, each running its last `count`."""
    width = -(-context // BLOCK)
    table = 1 + np.arange(len(counts) * width, dtype=np.int32).reshape(len(counts), width)
    positions = np.concatenate([np.arange(context - n, context) for n in counts])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = np.repeat(np.arange(len(counts)), counts)
    slots = table[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    return Batch(
        tokens=(positions * 37 % 262_144).astype(np.int32),
        positions=positions.astype(np.int32),
        query_starts=starts,
        seq_lens=np.full(len(counts), context, np.int32),
        block_tables=[table],
        slots=[slots],
        logit_rows=starts[1:] - 1,
    )


def best_of(repeats: int, run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--numpy", action="store_true")
    options = parser.parse_args()
    kernels.set_num_threads(options.threads)
    if options.numpy:
        native.library = None  # type: ignore[assignment]
    model = Gemma3(CONFIG)
    weights = random_weights(model)
    context = options.context
    kinds = {f"{n} decodes": [1] * n for n in (1, 2, 4, 8, 16, 32, 64)}
    kinds[f"prefill {context}"] = [context]
    kinds["16 decodes, prefill 128"] = [1] * 16 + [min(128, context)]
    for name, counts in kinds.items():
        batch = batch_of(counts, context)
        blocks = 1 + len(counts) * -(-context // BLOCK)
        pages = np.zeros((2, blocks, 1, BLOCK, 256), np.float32)
        kv = [
            LayerKV(pages[0], pages[1], 0, model.kv_spec(layer).window)
            for layer in range(model.num_layers)
        ]
        ops, timed = ArrayOps(np, kv, 32_768), TimedOps(np, kv, 32_768)
        ops.batch = timed.batch = batch
        best = best_of(options.repeats, partial(step, model, ops, weights))
        timed.seconds = defaultdict(float)
        step(model, timed, weights)
        timed.seconds.clear()
        step(model, timed, weights)
        spent = sorted(timed.seconds.items(), key=lambda item: -item[1])[:6]
        parts = ", ".join(f"{op} {seconds * 1e3:.1f}" for op, seconds in spent)
        print(f"{name:24}{best * 1e3:9.1f} ms   {parts}", flush=True)


if __name__ == "__main__":
    main()
