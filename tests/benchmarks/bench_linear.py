"""Linear layers of Gemma 3 270M three ways: the C kernel, OpenBLAS by NumPy, and numba.

    python tests/benchmarks/bench_linear.py [--threads 2] [--repeats 7] [--cpu]

One line a shape and row count: milliseconds (best of the repeats, the ways taking turns so that
load from outside hits all alike) and the ratio of each other way to ours, which is the C kernel
up to 96 rows and OpenBLAS on our threads beyond. Weights rotate through 300 MB, as a step's do, so
none are in the cache. On a machine with other work use --cpu: CPU time, all threads together.
numba's column needs numba installed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from tensorray import kernels
from tensorray.kernels.linear import linear, linear_numpy

SHAPES = {
    "LM head": (262144, 640),
    "gate and up": (4096, 640),
    "down": (640, 2048),
    "QKV": (1536, 640),
    "attention out": (640, 1024),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)


def numba_linear(threads: int) -> Callable[[Any, Any], Any] | None:
    """The same tiling as the C kernel's, as far as numba lets one say it."""
    try:
        import numba
    except ImportError:
        return None
    numba.set_num_threads(threads)

    @numba.njit(parallel=True, fastmath=True)
    def run(x: Any, weight: Any) -> Any:
        rows, inner = x.shape
        y = np.empty((rows, weight.shape[0]), np.float32)
        for n in numba.prange(weight.shape[0]):
            w = weight[n]
            m = 0
            while m + 4 <= rows:
                a = b = c = d = np.float32(0)
                for k in range(inner):
                    a += x[m, k] * w[k]
                    b += x[m + 1, k] * w[k]
                    c += x[m + 2, k] * w[k]
                    d += x[m + 3, k] * w[k]
                y[m, n], y[m + 1, n], y[m + 2, n], y[m + 3, n] = a, b, c, d
                m += 4
            while m < rows:
                a = np.float32(0)
                for k in range(inner):
                    a += x[m, k] * w[k]
                y[m, n] = a
                m += 1
        return y

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    kernels.set_num_threads(options.threads)
    ways: dict[str, Callable[[Any, Any], Any]] = {"ours": linear, "OpenBLAS": linear_numpy}
    by_numba = numba_linear(options.threads)
    if by_numba is not None:
        ways["numba"] = by_numba
    rng = np.random.default_rng(0)
    others = [way for way in ways if way != "ours"]
    print(f"{'':14}{'rows':>5}" + "".join(f"{way + ' ms':>13}" for way in ways), end="")
    print(f"{'GB/s':>8}" + "".join(f"{way + '/ours':>14}" for way in others))
    for name, (out, inner) in SHAPES.items():
        copies = max(1, 300_000_000 // (out * inner * 4))
        weights = [rng.standard_normal((out, inner), np.float32) for _ in range(copies)]
        for rows in ROWS:
            if rows > 32 and out > 100_000:
                continue
            x = rng.standard_normal((rows, inner), np.float32)
            best = dict.fromkeys(ways, float("inf"))
            some = weights if rows <= 32 else weights[: max(1, copies // 4)]
            for _ in range(options.repeats):
                for way, run in ways.items():
                    blas_threads = options.threads if way == "OpenBLAS" else 1
                    with threadpool_limits(limits=blas_threads, user_api="blas"):
                        begin = clock()
                        for weight in some:
                            run(x, weight)
                        best[way] = min(best[way], (clock() - begin) / len(some) * 1e3)
            print(f"{name:14}{rows:5}" + "".join(f"{best[way]:13.3f}" for way in ways), end="")
            rate = weights[0].nbytes / best["ours"] / 1e6
            print(f"{rate:8.1f}" + "".join(f"{best[way] / best['ours']:14.2f}" for way in others))


if __name__ == "__main__":
    main()
