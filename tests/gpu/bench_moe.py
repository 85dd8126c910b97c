"""Times of a mixture of experts beside the floor: the chosen experts' weights, or the operations.

python3 tests/gpu/bench_moe.py
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
from bench_linear import copy_rate, time_graph

from tensorray.kernels import moe

# experts, chosen, hidden, inner
SHAPES = {"Mixtral 8x7B": (8, 2, 4096, 14336), "Qwen3 30B-A3B": (128, 8, 2048, 768)}
OPERATIONS = 7.9e14  # a second, of large float16 products


def main() -> None:
    rate = copy_rate()
    rng = cupy.random.default_rng(0)
    for name, (experts, top_k, hidden, inner) in SHAPES.items():

        def weights(*shape: int) -> Any:
            made = cupy.empty(shape, np.float16)
            for each in made:
                each[...] = rng.standard_normal(shape[1:], np.float32) * shape[-1] ** -0.5
            return made

        gate_up, down = weights(experts, 2 * inner, hidden), weights(experts, hidden, inner)
        for rows in (1, 4, 16, 64, 256, 1024, 4096):
            x = rng.standard_normal((rows, hidden), np.float32).astype(np.float16)
            logits = [rng.standard_normal((rows, experts), np.float32) for _ in range(8)]
            chosen = np.mean([len(cupy.unique(moe.route(each, top_k, True)[1])) for each in logits])
            seconds = time_graph(
                lambda each, x=x, top_k=top_k, gate_up=gate_up, down=down: moe.experts(
                    x, *moe.route(each, top_k, True), gate_up, down
                ),
                logits,
            )
            size = 2 * chosen * 3 * inner * hidden
            work = 2 * rows * top_k * 3 * inner * hidden
            floor = max(size / rate, work / OPERATIONS)
            print(
                f"{name:14} {rows:5} {seconds * 1e6:8.1f} us, floor {floor * 1e6:8.1f} "
                f"({floor / seconds:.2f})",
                flush=True,
            )
        del gate_up, down


if __name__ == "__main__":
    main()
