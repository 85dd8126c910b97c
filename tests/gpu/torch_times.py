"""The timed segments of check_segments.py in PyTorch: same math, same sizes, same way of timing.

Prints one line of JSON: microseconds by segment and rows. Needs PyTorch and a GPU only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

HIDDEN, INNER, Q, KV, VOCABULARY, EPS = 4096, 14336, 4096, 1024, 128256, 1e-5
ROWS = (1, 16, 64, 256, 512, 2048, 8192)


def random(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.float16, device="cuda") / shape[-1] ** 0.5


def norm(x: Any, weight: Any) -> Any:
    return F.rms_norm(x, (HIDDEN,), weight, EPS)


def mlp(x: Any, y: Any, w: list[Any]) -> Any:
    gate, up = F.linear(norm(x, w[0]), w[1]).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w[2])


def qkv(x: Any, y: Any, w: list[Any]) -> Any:
    return F.linear(norm(x, w[0]), w[1]).split([Q, KV, KV], -1)


def out(x: Any, y: Any, w: list[Any]) -> Any:
    return x + F.linear(y, w[0])


def head(x: Any, y: Any, w: list[Any]) -> Any:
    return F.linear(norm(x, w[0]), w[1])


SEGMENTS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "mlp": (mlp, [(HIDDEN,), (2 * INNER, HIDDEN), (HIDDEN, INNER)]),
    "qkv": (qkv, [(HIDDEN,), (Q + 2 * KV, HIDDEN)]),
    "out": (out, [(HIDDEN, Q)]),
    "head": (head, [(HIDDEN,), (VOCABULARY, HIDDEN)]),
}


def microseconds(math: Callable[..., Any], rows: int, sets: list[list[Any]]) -> float:
    x, y = random(rows, HIDDEN), random(rows, HIDDEN)
    for _ in range(2):
        math(x, y, sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weights in sets:
            math(x, y, weights)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(12):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(sets))
    return sorted(times)[len(times) // 4]


@torch.no_grad()
def main() -> None:
    found: dict[str, dict[int, float]] = {}
    for name, (math, shapes) in SEGMENTS.items():
        first = [random(*shape) for shape in shapes]
        size = sum(each.nbytes for each in first)
        count = min(16, max(2, -(-(512 << 20) // size)))
        sets = [first] + [[each.clone() for each in first] for _ in range(count - 1)]
        rows = [each for each in ROWS if name != "head" or each <= 512]
        found[name] = {each: microseconds(math, each, sets) for each in rows}
        del first, sets
        torch.cuda.empty_cache()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
