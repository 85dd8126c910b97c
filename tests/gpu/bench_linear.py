"""Times of linear layers of few rows, beside cuBLAS, PyTorch and the floor.

    python3 tests/gpu/bench_linear.py [--plans] [--rows 1 16 ...] [--shapes NAME ...]

Each product is captured in a CUDA graph that goes round so many copies of its weight that none is
left in the L2 cache, and the graph's replays are timed. The floor is the weight's bytes at the rate
of a large copy, measured in the same run. --plans times every plan of the kernel as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from tensorray.kernels.cuda import compiler, cublas
from tensorray.kernels.cuda import linear as cuda
from tensorray.kernels.cuda.linear import Plan

# out, in, what is joined to the product in a decode step
SHAPES = {
    "8B qkv": (6144, 4096, "norm"),
    "8B o": (4096, 4096, "residual"),
    "8B gate_up": (28672, 4096, "gate"),
    "8B down": (4096, 14336, "residual"),
    "8B head": (128256, 4096, "norm"),
    "0.6B qkv": (4096, 1024, "norm"),
    "0.6B o": (1024, 2048, "residual"),
    "0.6B gate_up": (6144, 1024, "gate"),
    "0.6B down": (1024, 3072, "residual"),
    "0.6B head": (151936, 1024, "norm"),
}
L2_BYTES = 60 << 20
REPLAYS = 7


def copy_rate() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = cupy.random.randint(0, 255, 1 << 30, np.uint8)
    target = cupy.empty_like(source)
    times = [time_once(lambda: cupy.copyto(target, source)) for _ in range(8)]
    return float(2 * source.nbytes / statistics.median(times))


def time_once(work: Callable[[], Any]) -> float:
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(begin, end) / 1e3)


def time_graph(calls: list[Callable[[], Any]]) -> float:
    """Seconds a call, of all calls captured in one graph."""
    calls[0]()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
        graph.launch()
        times = [time_once(graph.launch) for _ in range(REPLAYS)]
    stream.synchronize()
    return statistics.median(times) / len(calls)


def torch_time(weights: list[Any], x: Any) -> float:
    import torch

    tensors = [torch.from_dlpack(weight) for weight in weights]
    row = torch.from_dlpack(x)
    for tensor in tensors[:2]:
        torch.nn.functional.linear(row, tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [torch.nn.functional.linear(row, tensor) for tensor in tensors]
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del kept
    return statistics.median(times) / len(tensors)


def plans(rows: int, gated: bool) -> list[Plan]:
    ntiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
    return [
        Plan(mtiles, splits, stages)
        for mtiles, splits, stages in itertools.product([1, 2, 4], [1, 2, 4], [2, 3, 4, 6])
        if not (gated and mtiles == 1)
        and stages * (4 * mtiles + 2 * ntiles + 2) <= 50
        and stages * mtiles >= 4
    ]


def compile_plans(rows: list[int]) -> None:
    """Fill the cache of cubins on all cores."""
    sets = {
        (ntiles, plan.mtiles, plan.stages, norm, gated)
        for row in rows
        for ntiles in [1 if row <= 8 else 2 if row <= 16 else 4]
        for norm, gated in [(row <= 4, 0), (row <= 4, 1), (0, 0)]
        for plan in plans(row, bool(gated))
    }

    def one(key: tuple[Any, ...]) -> None:
        names = ("NTILES", "MTILES", "STAGES", "NORM", "GATED")
        types = {"WEIGHT": "__half", "INPUT": "__half", "OUTPUT": "__half"}
        compiler.compile("linear.cu", **types, **dict(zip(names, map(int, key), strict=True)))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, sets))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options = parser.parse_args()
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s")
    if options.plans:
        compile_plans(options.rows)
    rng = cupy.random.default_rng(0)
    results = []
    for name in options.shapes:
        outs, inner, kind = SHAPES[name]
        size = 2 * outs * inner
        copies = max(-(-4 * L2_BYTES // size), 3)
        weights = [
            (rng.standard_normal((outs, inner), np.float32) * inner**-0.5).astype(np.float16)
            for _ in range(copies)
        ]
        for rows in options.rows:
            x = rng.standard_normal((rows, inner), np.float32).astype(np.float16)
            scale = cupy.ones(inner, np.float16)
            stream = rng.standard_normal((rows, outs), np.float32).astype(np.float16)
            gate = "silu" if kind == "gate" else None
            joined = {
                "norm": scale if kind in ("norm", "gate") else None,
                "eps": 1e-5,
                "gate": gate,
                "residual": stream if kind == "residual" else None,
            }
            floor = size / rate
            times = {"own": time_graph([lambda w=w: cuda.linear(x, w, **joined) for w in weights])}
            if rows <= 32:
                plan = cuda.choose(outs, inner, rows, gate is not None)
                times["plain"] = time_graph(
                    [
                        lambda w=w: cuda.few_rows(x, w, None, None, 0.0, None, None, plan)
                        for w in weights
                    ]
                )
            times["cublas"] = time_graph([lambda w=w: cublas.matmul(x, w) for w in weights])
            try:
                times["torch"] = torch_time(weights, x)
            except Exception as error:
                print("torch:", error)
            row = {"name": name, "rows": rows, "floor": floor, **times}
            if options.plans and rows <= 32:
                norm = joined["norm"] if rows <= cuda.FEW_NORMED_ROWS else None
                by_plan = {}
                for plan in plans(rows, gate is not None):
                    try:
                        by_plan[str((plan.mtiles, plan.splits, plan.stages))] = time_graph(
                            [
                                lambda w=w, plan=plan: cuda.few_rows(
                                    x, w, None, norm, 1e-5, gate, joined["residual"], plan
                                )
                                for w in weights
                            ]
                        )
                    except Exception as error:
                        print(name, rows, plan, error)
                row["plans"] = dict(sorted(by_plan.items(), key=lambda item: item[1]))
            results.append(row)
            shown = " ".join(
                f"{k} {v * 1e6:.1f} us ({floor / v:.2f})" for k, v in times.items() if v
            )
            print(f"{name:13} {rows:3} floor {floor * 1e6:6.1f} us  {shown}", flush=True)
            if "plans" in row:
                best = list(row["plans"].items())
                listed = ", ".join(f"{k} {v * 1e6:.1f}" for k, v in best[:5] + best[-1:])
                print(f"    plans (mtiles, splits, stages): {listed}", flush=True)
        del weights
    out = os.environ.get("JOB_OUT") or os.environ.get("OUT")
    if out:
        Path(out, "bench_linear.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
