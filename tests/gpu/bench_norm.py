"""Times of norms and activations beside the floor: their bytes at the rate of a large copy.

python3 tests/gpu/bench_norm.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from bench_linear import copy_rate, time_graph

from tensorray.kernels import activation, norm


def main() -> None:
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s")
    hidden, inner, heads, kv_heads, head_dim = 4096, 14336, 32, 8, 128
    weight = cupy.ones(hidden, np.float16)
    head_weight = cupy.ones(head_dim, np.float16)
    for rows in (1, 16, 256, 8192):
        copies = max(2, min(64, (256 << 20) // (rows * hidden * 2)))
        x = [cupy.random.standard_normal((rows, hidden), np.float32) for _ in range(copies)]
        half = [each.astype(np.float16) for each in x]
        packed = [cupy.zeros((rows, 2 * inner), np.float16) for _ in range(min(copies, 8))]
        qkv = [cupy.zeros((rows, 48 * head_dim), np.float16) for _ in range(min(copies, 16))]

        def qk_norm(row: Any) -> Any:
            q, k = row[:, : heads * head_dim], row[:, heads * head_dim : 40 * head_dim]
            q = q.reshape(len(row), heads, head_dim)
            k = k.reshape(len(row), kv_heads, head_dim)
            return norm.qk_norm(q, k, head_weight, head_weight, 1e-6)

        cases: dict[str, tuple[Callable[[Any], Any], list[Any], int]] = {
            "rms_norm": (lambda row: norm.rms_norm(row, weight, 1e-6), half, 4 * hidden),
            "layer_norm": (lambda r: norm.layer_norm(r, weight, weight, 1e-6), half, 4 * hidden),
            "add_rms_norm": (
                functools.partial(norm.add_rms_norm, half[0], weight=weight, eps=1e-6),
                half,
                8 * hidden,
            ),
            "add_rms_norm, float32": (
                functools.partial(norm.add_rms_norm, delta=half[0], weight=weight, eps=1e-6),
                x,
                12 * hidden,
            ),
            "qk_norm": (qk_norm, qkv, 4 * (heads + kv_heads) * head_dim),
            "gated": (lambda row: activation.gated(row, "silu"), packed, 6 * inner),
        }
        for name, (call, arrays, bytes_a_row) in cases.items():
            seconds = time_graph(call, arrays)
            floor = bytes_a_row * rows / rate
            print(
                f"{name:22} {rows:5} {seconds * 1e6:7.1f} us, floor {floor * 1e6:6.1f}", flush=True
            )


if __name__ == "__main__":
    main()
