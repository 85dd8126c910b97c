"""Products by quantized weights beside those by float32 ones, on one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_quantized.py

Times are CPU time, the least of several; all of a row's in turn, so that they met the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tensorray.kernels.linear import linear
from tensorray.kernels.quantized import Kind, QuantizedWeight, linear_quantized_numpy, pack_int4

OUT, IN = 16384, 4096  # 268 MB in float32
ROWS = (1, 2, 4, 8, 16, 32, 64, 96)
FORMS: tuple[tuple[Kind, int, bool], ...] = (
    ("int4", 128, False),
    ("int4", 128, True),
    ("int8", IN, False),
    ("float8", IN, False),
)


def weight(kind: Kind, group: int, zeros: bool) -> QuantizedWeight:
    generator = np.random.default_rng(0)
    codes = generator.integers(-8, 8, (OUT, IN), np.int8)
    values = {"int4": pack_int4, "int8": lambda c: c, "float8": lambda c: c.view(np.uint8) & 0xBF}
    shape = (OUT, IN // group)
    return QuantizedWeight(
        kind,
        group,
        values[kind](codes),
        generator.random(shape, np.float32),
        generator.integers(-8, 8, shape, np.int8) if zeros else None,
    )


def best(work: Callable[[], object], times: int) -> float:
    """Milliseconds."""
    taken = []
    for _ in range(times):
        began = time.thread_time()
        work()
        taken.append(time.thread_time() - began)
    return 1e3 * min(taken)


def main() -> None:
    generator = np.random.default_rng(1)
    dense = generator.standard_normal((OUT, IN), np.float32)
    print("| weights | rows | float32, ms | quantized, ms | float32 / quantized | twin, ms |")
    print("|---|---|---|---|---|---|")
    for kind, group, zeros in FORMS:
        held = weight(kind, group, zeros)
        name = f"{kind}, {'a scale a row' if group == IN else f'groups of {group}'}"
        name += ", zeros" if zeros else ""
        for rows in ROWS:
            x = generator.standard_normal((rows, IN), np.float32)
            plain = best(lambda x=x: linear(x, dense), 7)
            ours = best(lambda x=x, held=held: linear(x, held), 7)
            twin = best(lambda x=x, held=held: linear_quantized_numpy(x, held), 1)
            times = f"{plain:.1f} | {ours:.1f} | {plain / ours:.2f} | {twin:.0f}"
            print(f"| {name} | {rows} | {times} |", flush=True)


if __name__ == "__main__":
    main()
