"""Times of linear layers of few rows, beside cuBLAS, PyTorch and the floor.

    python3 tests/gpu/bench_linear.py [--plans] [--rows 1 16 ...] [--shapes NAME ...]

Each product is captured in a CUDA graph that goes round so many copies of its weight that none is
left in the L2 cache, and the graph's replays are timed. The floor is the weight's bytes at the rate
of a large copy, measured in the same run. --plans times every plan of the kernel as well.
"""

from __future__ import annotations

import argparse
import functools
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
WARM_UP = 0.03  # seconds: idle clocks are low


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


def time_replays(replay: Callable[[], Any]) -> float:
    """Seconds of a graph's replay, once the clocks have risen."""
    first = time_once(replay)
    for _ in range(min(int(WARM_UP / first) + 1, 1000)):
        replay()
    return statistics.median(time_once(replay) for _ in range(REPLAYS))


def time_graph(call: Callable[[Any], Any], weights: list[Any]) -> float:
    """Seconds a call, of one call a weight captured in one graph."""
    call(weights[0])
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for weight in weights:
            call(weight)
        graph = stream.end_capture()
        return time_replays(graph.launch) / len(weights)


def torch_time(weights: list[Any], x: Any) -> float:
    import torch

    tensors = [torch.from_dlpack(weight) for weight in weights]
    row = torch.from_dlpack(x)
    torch.nn.functional.linear(row, tensors[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [torch.nn.functional.linear(row, tensor) for tensor in tensors]
    with cupy.cuda.Stream.from_external(torch.cuda.current_stream()):
        seconds = time_replays(graph.replay)
    del kept
    return seconds / len(tensors)


def plans(outs: int, inner: int, rows: int, normed: bool, gated: bool) -> list[Plan]:
    """What is worth a try: the deepest pipelines that fit, and shallower ones of small weights."""
    found = []
    most = compiler.most_shared_bytes()
    for mtiles in (1, 2, 4):
        if gated and mtiles == 1:
            continue
        fitting = [
            plan
            for plan in (Plan(mtiles, stages) for stages in range(2, 9))
            if plan.fits(most, rows, inner, normed)
        ]
        rounds = max(-(-inner // 512), 2) if outs < 40000 else 8
        found += [plan for plan in fitting if plan.stages <= rounds][-1:]
    return found


def compile_all(calls: list[tuple[int, int, int, bool, bool, list[Plan]]]) -> None:
    """Fill the cache of cubins on all cores."""
    half = {"WEIGHT": "__half", "INPUT": "__half", "OUTPUT": "__half", "GROUPED": 0}
    names = ("NTILES", "MTILES", "STAGES", "NORM", "GATED")
    sets = {
        (cuda.ntiles(rows), plan.mtiles, plan.stages, normed, gated)
        for _, _, rows, normed, gated, listed in calls
        for plan in listed
    }

    def one(key: tuple[Any, ...]) -> None:
        compiler.compile("linear.cu", **half, **dict(zip(names, map(int, key), strict=True)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, sets))


def run_plan(x: Any, norm: Any, gate: str | None, residual: Any, plan: Plan, weight: Any) -> Any:
    return cuda.few_rows(x, weight, None, norm, 1e-5, gate, residual, plan)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options = parser.parse_args()
    gpu = compiler.multiprocessors(), compiler.most_shared_bytes()
    cases: dict[tuple[str, int], list[Plan]] = {}
    calls = []
    for name, rows in itertools.product(options.shapes, options.rows):
        outs, inner, kind = SHAPES[name]
        if rows > cuda.FEW_ROWS:
            continue
        flags = (kind != "residual" and rows <= cuda.FEW_NORMED_ROWS, kind == "gate")
        own_plan = cuda.choose(outs, inner, rows, *flags, *gpu)
        if own_plan is None:
            continue
        listed = [own_plan]
        if options.plans:
            listed += plans(outs, inner, rows, *flags)
        cases[name, rows] = listed
        calls.append((outs, inner, rows, *flags, listed))
    compile_all(calls)
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s")
    rng = cupy.random.default_rng(0)
    results = []
    for name in options.shapes:
        outs, inner, kind = SHAPES[name]
        size = 2 * outs * inner
        weights = [
            (rng.standard_normal((outs, inner), np.float32) * inner**-0.5).astype(np.float16)
            for _ in range(max(-(-4 * L2_BYTES // size), 3))
        ]
        for rows in options.rows:
            x = rng.standard_normal((rows, inner), np.float32).astype(np.float16)
            stream = rng.standard_normal((rows, outs), np.float32).astype(np.float16)
            norm = None if kind == "residual" else cupy.ones(inner, np.float16)
            gate = "silu" if kind == "gate" else None
            residual = stream if kind == "residual" else None
            own = functools.partial(run_own, x, norm, gate, residual)
            times = {
                "floor": size / rate,
                "own": time_graph(own, weights),
                "cublas": time_graph(functools.partial(cublas.matmul, x), weights),
                "torch": torch_time(weights, x),
            }
            results.append({"name": name, "rows": rows, **times})
            shown = "  ".join(
                f"{k} {v * 1e6:6.1f} us ({times['floor'] / v:.2f})" for k, v in times.items()
            )
            print(f"{name:13} {rows:3} {shown}", flush=True)
            if options.plans and (name, rows) in cases:
                if rows > cuda.FEW_NORMED_ROWS:
                    norm = None
                by_plan = {}
                for plan in dict.fromkeys(cases[name, rows][1:]):
                    call = functools.partial(run_plan, x, norm, gate, residual, plan)
                    key = f"{plan.mtiles}/{plan.stages}"
                    by_plan[key] = time_graph(call, weights)
                results[-1]["plans"] = by_plan
                chosen = cases[name, rows][0]
                best = sorted(by_plan.items(), key=lambda item: item[1])
                listed_times = ", ".join(f"{k} {v * 1e6:.1f}" for k, v in best)
                print(
                    f"    mtiles/stages: chosen {chosen.mtiles}/{chosen.stages} of {listed_times}",
                    flush=True,
                )
        del weights
    out = os.environ.get("JOB_OUT") or os.environ.get("OUT")
    if out:
        Path(out, "bench_linear.json").write_text(json.dumps(results, indent=1))


def run_own(x: Any, norm: Any, gate: str | None, residual: Any, weight: Any) -> Any:
    return cuda.linear(x, weight, norm=norm, eps=1e-5, gate=gate, residual=residual)


if __name__ == "__main__":
    main()
