"""Decode attention, and RoPE with the append: microseconds on a GPU, replayed from a CUDA graph.

    python tests/gpu/bench_attention.py [--dtype float16] [--only TEXT ...] [--variants]

Each case takes caches of several layers in turn, together larger than the L2 cache, as a step does.
The floor is the bytes of the visible keys and values at the rate of a large copy, measured here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from tensorray.kernels import rope
from tensorray.kernels.cuda import attention

L2_BYTES = 60e6


@dataclass(frozen=True)
class Case:
    name: str
    sequences: int
    length: int  # of each sequence, in the cache
    heads: int
    kv_heads: int
    head_dim: int = 128
    cache: str = ""
    window: int | None = None
    capacity: int = 0  # tokens that a row of the block table holds; 0: the length
    spread: float = 0.0  # lengths lie between (1 - spread) and (1 + spread) times the length


CASES = [
    Case("8B, 32 x 8192", 32, 8192, 32, 8),
    Case("8B, 32 x 8192, fp8 cache", 32, 8192, 32, 8, cache="float8"),
    Case("8B, 1 x 256", 1, 256, 32, 8, capacity=8192),
    Case("8B, 1 x 384, table of 131072", 1, 384, 32, 8, capacity=131072),
    Case("8B, 1 x 1024", 1, 1024, 32, 8, capacity=8192),
    Case("8B, 1 x 8192", 1, 8192, 32, 8),
    Case("8B, 1 x 131072", 1, 131072, 32, 8),
    Case("8B, 16 x 256", 16, 256, 32, 8, capacity=8192),
    Case("8B, 64 x 1024", 64, 1024, 32, 8, capacity=8192),
    Case("8B, 256 x 640", 256, 640, 32, 8, capacity=8192),
    Case("8B, 256 x 640, uneven", 256, 640, 32, 8, capacity=8192, spread=0.9),
    Case("0.6B, 1 x 256", 1, 256, 16, 8, capacity=8192),
    Case("0.6B, 16 x 256", 16, 256, 16, 8, capacity=8192),
    Case("0.6B, 256 x 640", 256, 640, 16, 8, capacity=8192),
    Case("Gemma 270M, 1 x 256", 1, 256, 4, 1, 256, capacity=8192),
    Case("Gemma 270M, 1 x 8192, window 512", 1, 8192, 4, 1, 256, window=512),
    Case("Gemma 270M, 64 x 1024", 64, 1024, 4, 1, 256),
    Case("head_dim 64, 32 x 4096", 32, 4096, 32, 8, 64),
]


def microseconds(calls: list[Callable[[], Any]], repeats: int = 12) -> float:
    """The median time of a call, each repeat being all of them in one graph."""
    cupy.cuda.Device().synchronize()  # inputs come from another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for call in calls:
            call()
        stream.synchronize()
        stream.begin_capture()
        kept = [call() for call in calls]
        graph = stream.end_capture()
        graph.launch()
        times = []
        for _ in range(repeats):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            graph.launch()
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / len(calls))
    del kept
    return float(np.median(times))


def copy_rate() -> float:
    """Bytes read and written per microsecond by a large copy, a kernel: copy engines do less."""
    source = cupy.random.standard_normal(1 << 28, np.float32).view(np.complex128)
    target = cupy.empty_like(source)
    copy = cupy.ElementwiseKernel("T x", "T y", "y = x", "copy_words")
    return 2 * source.nbytes / microseconds([lambda: copy(source, target)])


def random(shape: tuple[int, ...], dtype: str) -> Any:
    if dtype == "float8":
        return cupy.random.randint(0, 0x70, shape, np.uint8)  # no NaN
    return cupy.random.standard_normal(shape, np.float32).astype(dtype)


class Layers:
    """A case's arrays: as many layers as the L2 cache can't hold, each with pages of its own."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, block = case, 16
        cache = case.cache or dtype
        rng = np.random.default_rng(0)
        spread = rng.uniform(1 - case.spread, 1 + case.spread, case.sequences)
        lens = np.maximum(1, case.length * spread).astype(np.int32)
        blocks = -(-lens // block)
        width = max(int(blocks.max()), -(-case.capacity // block))
        table = np.zeros((case.sequences, width), np.int32)
        ids = rng.permutation(int(blocks.sum())).astype(np.int32)
        for row, count in zip(table, blocks, strict=True):
            row[:count], ids = ids[:count], ids[count:]
        seen = lens if case.window is None else np.minimum(lens, case.window)
        itemsize = 1 if cache == "float8" else 2
        self.bytes = 2 * int(seen.sum()) * case.kv_heads * case.head_dim * itemsize
        count = int(np.clip(3 * L2_BYTES / self.bytes, 2, 32))
        shape = (int(blocks.sum()), case.kv_heads, block, case.head_dim)
        self.pages = [(random(shape, cache), random(shape, cache)) for _ in range(count)]
        self.q = random((case.sequences, case.heads, case.head_dim), dtype)
        self.lens, self.table = cupy.asarray(lens), cupy.asarray(table)

    def time_fused(self, normed: bool) -> tuple[float, float]:
        """The step's RoPE, append and attention: as one kernel, and as two."""
        case = self.case
        packed = random((case.sequences, case.heads + 2 * case.kv_heads, case.head_dim), "float16")
        packed = packed.astype(self.q.dtype)
        q, k, v = cupy.split(packed, [case.heads, case.heads + case.kv_heads], axis=1)
        table, positions = random((4096, case.head_dim), "float32"), self.lens - 1
        blocks = cupy.take_along_axis(self.table, positions[:, None] // 16, axis=1)[:, 0]
        slots = blocks.astype("int64") * 16 + positions % 16
        starts = cupy.arange(case.sequences + 1, dtype="int32")
        norms = {}
        if normed:
            norms = {name: random((case.head_dim,), "float16") for name in ("q_norm", "k_norm")}
            norms = {name: weight.astype(self.q.dtype) for name, weight in norms.items()}
        options: dict[str, Any] = {"scale": case.head_dim**-0.5, "window": case.window}
        positions = positions % 4096

        def one(k_pages: Any, v_pages: Any) -> Callable[[], Any]:
            return lambda: rope.rope_attention(
                *(
                    q,
                    k,
                    v,
                    table,
                    positions,
                    k_pages,
                    v_pages,
                    slots,
                    starts,
                    self.lens,
                    self.table,
                ),
                **options,
                **norms,
                max_query=1,
            )

        def two(k_pages: Any, v_pages: Any) -> Callable[[], Any]:
            def call() -> Any:
                rotated = rope.rope_append(
                    q, k, v, table, positions, k_pages, v_pages, slots, **norms
                )
                return attention.decode(rotated, k_pages, v_pages, self.lens, self.table, **options)

            return call

        first, second = (
            microseconds([way(k_pages, v_pages) for k_pages, v_pages in self.pages])
            for way in (one, two)
        )
        return first, second

    def time(self, **chosen: Any) -> float:
        def call(k: Any, v: Any) -> Callable[[], Any]:
            return lambda: attention.decode(
                *(self.q, k, v, self.lens, self.table),
                scale=self.case.head_dim**-0.5,
                window=self.case.window,
                **chosen,
            )

        return microseconds([call(k, v) for k, v in self.pages])


def rope_append_time(tokens: int, heads: int, kv_heads: int, dtype: str) -> float:
    packed = random((tokens, heads + 2 * kv_heads, 128), dtype)
    pages = [random((tokens // 16 + 1, kv_heads, 16, 128), dtype) for _ in range(2)]
    table = random((4096, 128), "float32")
    positions = cupy.arange(tokens, dtype=np.int32) % 4096
    slots = cupy.arange(tokens, dtype=np.int64)
    q, k, v = packed[:, :heads], packed[:, heads : heads + kv_heads], packed[:, heads + kv_heads :]
    calls = [lambda: rope.rope_append(q, k, v, table, positions, *pages, slots)] * 32
    return microseconds(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose name holds one of these"
    )
    parser.add_argument("--variants", action="store_true", help="other splits and block shapes too")
    chosen = parser.parse_args()
    rate = copy_rate()
    print(f"copy: {rate / 1e6:.2f} TB/s")
    for case in CASES:
        if not any(text in case.name for text in chosen.only):
            continue
        layers = Layers(case, chosen.dtype)
        floor = layers.bytes / rate
        taken = layers.time()
        share = 100 * floor / taken
        print(f"{case.name:36s} {taken:8.2f} us, floor {floor:7.2f}, {share:3.0f} %", end="")
        fused, apart = layers.time_fused(normed="0.6B" in case.name)
        print(f"; with RoPE and append {fused:8.2f}, as two kernels {apart:8.2f}")
        if chosen.variants:
            for label, options in variants(case):
                taken = layers.time(**options)
                print(f"    {label:32s} {taken:8.2f} us, {100 * floor / taken:3.0f} %")
        del layers
        cupy.get_default_memory_pool().free_all_blocks()
    for tokens in (1, 16, 256, 8192) if chosen.only == [""] else ():
        for name, heads in (("8B", 32), ("0.6B", 16)):
            taken = rope_append_time(tokens, heads, 8, chosen.dtype)
            floor = tokens * (heads + 16) * 128 * 2 * 2 / rate
            print(f"rope_append, {name}, {tokens} tokens: {taken:.2f} us, floor {floor:.2f}")


def variants(case: Case) -> list[tuple[str, dict[str, Any]]]:
    finer = {"SPLIT_TILES": 4}
    found: list[tuple[str, dict[str, Any]]] = [
        (f"{splits} splits", {"splits": splits, "constants": finer})
        for splits in (1, 2, 4, 8, 16, 32, 64)
        if splits * 64 <= max(case.length, 64)
    ]
    for warps, held in ((4, 2), (4, 4), (8, 1)):
        constants = {"WARPS": warps, "MIN_BLOCKS": held}
        label = f"{warps} warps, {held} blocks"
        found += [(label, {"constants": constants})]
        found += [(f"{label}, 1 split", {"splits": 1, "constants": constants})]
    return found


if __name__ == "__main__":
    main()
