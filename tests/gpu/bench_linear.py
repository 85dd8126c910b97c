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
NORMED_ROWS = 16  # up to here --plans norms in the kernel where x is resident


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
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        seconds = time_replays(graph.replay)
    del kept
    return seconds / len(tensors)


def plans(outs: int, inner: int, rows: int, gated: bool) -> list[Plan]:
    """What is worth a try: plans whose blocks fit the multiprocessor they share, and no smaller
    pipelines than need be."""
    found = []
    for mtiles, team, blocks, resident in itertools.product(
        [1, 2, 4], [2, 4, 8], [1, 2], [False, True]
    ):
        if (gated and mtiles == 1) or (team < 8 and outs < 4000):
            continue
        for kilobytes in (110, 226):
            fitting = [
                plan
                for stages in range(2, 9)
                for plan in [Plan(mtiles, team, stages, blocks, resident)]
                if plan.shared_bytes(rows, inner) <= (kilobytes << 10) // blocks
            ]
            chunks = -(-inner // (64 * team)) * (1 if outs < 40000 else 4)
            useful = [plan for plan in fitting if plan.stages <= max(chunks, 2)]
            found += useful[-1:]
    return list(dict.fromkeys(found))


def compile_plans(cases: list[tuple[int, int, int, str]]) -> None:
    """Fill the cache of cubins on all cores."""
    half = {"WEIGHT": "__half", "INPUT": "__half", "OUTPUT": "__half", "GROUPED": 0}
    sets = set()
    for outs, inner, rows, kind in cases:
        gated = kind == "gate"
        for plan in plans(outs, inner, rows, gated):
            normed = plan.resident and kind != "residual" and rows <= NORMED_ROWS
            sizes = (cuda.ntiles(rows), plan.mtiles, plan.team, plan.stages, plan.resident)
            sets.add((*sizes, normed, gated))
    names = ("NTILES", "MTILES", "TEAM", "STAGES", "RESIDENT", "NORM", "GATED")

    def one(key: tuple[Any, ...]) -> None:
        compiler.compile("linear.cu", **half, **dict(zip(names, map(int, key), strict=True)))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, sets))
    print(f"{len(sets)} variants compiled", flush=True)


def time_plans(
    weights: list[Any], x: Any, norm: Any, gate: str | None, residual: Any
) -> dict[str, float]:
    """Seconds by plan, the fastest first; a norm that a plan can't have is left out."""
    times = {}
    for plan in plans(*weights[0].shape, len(x), gate is not None):
        own_norm = norm if plan.resident else None
        call = functools.partial(run_plan, x, own_norm, gate, residual, plan)
        name = f"{plan.mtiles}/{plan.team}/{plan.stages}/{plan.blocks}{'r' * plan.resident}"
        times[name] = time_graph(call, weights)
    return dict(sorted(times.items(), key=lambda item: item[1]))


def run_plan(x: Any, norm: Any, gate: str | None, residual: Any, plan: Plan, weight: Any) -> Any:
    return cuda.few_rows(x, weight, None, norm, 1e-5, gate, residual, plan)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options = parser.parse_args()
    cases = [
        (outs, inner, rows, kind)
        for outs, inner, kind in (SHAPES[name] for name in options.shapes)
        for rows in options.rows
    ]
    if options.plans:
        compile_plans(cases)
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
            if options.plans:
                by_plan = time_plans(
                    weights, x, norm if rows <= NORMED_ROWS else None, gate, residual
                )
                results[-1]["plans"] = by_plan
                best = list(by_plan.items())
                listed = ", ".join(f"{k} {v * 1e6:.1f}" for k, v in best[:7] + best[-1:])
                print(f"    mtiles/team/stages/blocks, resident: {listed}", flush=True)
        del weights
    out = os.environ.get("JOB_OUT") or os.environ.get("OUT")
    if out:
        Path(out, "bench_linear.json").write_text(json.dumps(results, indent=1))


def run_own(x: Any, norm: Any, gate: str | None, residual: Any, weight: Any) -> Any:
    return cuda.linear(x, weight, norm=norm, eps=1e-5, gate=gate, residual=residual)


if __name__ == "__main__":
    main()
