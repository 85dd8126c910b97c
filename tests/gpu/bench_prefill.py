"""Prefill attention: TFLOP/s on a GPU, replayed from a CUDA graph, beside PyTorch's if installed.

    python tests/gpu/bench_prefill.py [--dtype float16] [--mma]

Operations are counted by the keys that each query sees, so causal ones count half. Every replay
takes other arrays of a set larger than the L2 cache. PyTorch has the same sequences in padded
batches, without pages; a mixed step has no counterpart there. "by two": decodes that come first by
the kernel for decodes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from tensorray.kernels.cuda import attention, prefill

HEADS, KV_HEADS = 32, 8
L2_BYTES = 60e6


def microseconds(calls: list[Callable[[], Any]], repeats: int = 12) -> float:
    """The median time of a call, each repeat being all of them in one graph."""
    cupy.cuda.Device().synchronize()  # the arrays were made on another stream
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


def random(shape: tuple[int, ...], dtype: str) -> Any:
    if dtype == "float8":
        return cupy.random.randint(0, 0x70, shape, np.uint8)  # no NaN
    return cupy.random.standard_normal(shape, np.float32).astype(dtype)


def step(queries: list[int], prefixes: list[int], head_dim: int, dtype: str, cache: str) -> Any:
    block = 16
    n, prefix = np.array(queries, np.int32), np.array(prefixes, np.int32)
    lens = (n + prefix).astype(np.int32)
    blocks = -(-lens // block)
    table = np.zeros((len(n), blocks.max()), np.int32)
    ids = np.random.default_rng(0).permutation(blocks.sum()).astype(np.int32)
    for s, end in enumerate(np.cumsum(blocks)):
        table[s, : blocks[s]] = ids[end - blocks[s] : end]
    pages = (int(blocks.sum()), KV_HEADS, block, head_dim)
    starts = np.concatenate([[0], np.cumsum(n)]).astype(np.int32)
    return (
        random((int(n.sum()), HEADS, head_dim), dtype),
        random(pages, cache),
        random(pages, cache),
        *(cupy.asarray(x) for x in (starts, lens, table)),
    )


def operations(queries: list[int], prefixes: list[int], head_dim: int) -> float:
    return sum(
        4.0 * HEADS * head_dim * (n * prefix + n * (n + 1) / 2)
        for n, prefix in zip(queries, prefixes, strict=True)
    )


def read_bytes(queries: list[int], prefixes: list[int], head_dim: int) -> float:
    keys = sum(n + prefix for n, prefix in zip(queries, prefixes, strict=True))
    return 4.0 * head_dim * (KV_HEADS * keys + HEADS * sum(queries))


def pytorch(queries: list[int], head_dim: int, dtype: str) -> float | None:
    """Microseconds of PyTorch's attention; None where there is none for these sequences."""
    try:
        import torch
    except ImportError:
        return None
    if len(set(queries)) != 1:
        return None
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = getattr(torch, dtype)
    q, k, v = (
        torch.randn(len(queries), heads, queries[0], head_dim, dtype=kind, device="cuda")
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    best = None
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):

                def call() -> Any:
                    return torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True
                    )

                for _ in range(3):
                    call()
                times = []
                for _ in range(10):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
                    start.record()
                    call()
                    end.record()
                    end.synchronize()
                    times.append(start.elapsed_time(end) * 1e3)
        except RuntimeError:
            continue
        best = min(best or 1e9, float(np.median(times)))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--mma", action="store_true", help="without Hopper's own kernel")
    parsed = parser.parse_args()
    dtype = parsed.dtype
    attention._SPLIT_TOKENS = 1 << 30  # to measure both ways of every step
    if parsed.mma:
        prefill._WGMMA_SHAPES.clear()
    rng = np.random.default_rng(0)
    mixed = rng.integers(16, 1025, 64).tolist()
    shapes: dict[str, tuple[list[int], list[int]]] = {
        "1 x 8192": ([8192], [0]),
        "8 x 1024": ([1024] * 8, [0] * 8),
        "16 x 512": ([512] * 16, [0] * 16),
        "1 x 512": ([512], [0]),
        "512 behind 8192": ([512], [8192]),
        "64 mixed, 16 to 1024": (mixed, [0] * 64),
        "255 decode (768) + 2048": ([1] * 255 + [2048], [768] * 255 + [0]),
        "64 decode (4096) + 512": ([1] * 64 + [512], [4096] * 64 + [0]),
        "1 decode (8192) + 512": ([1, 512], [8192, 0]),
        "256 decode (768)": ([1] * 256, [768] * 256),
    }
    rows = [("128", dtype, name) for name in shapes]
    rows += [(str(d), dtype, n) for d in (64, 256) for n in ("1 x 8192", "8 x 1024")]
    rows += [("128", "float8", n) for n in ("1 x 8192", "64 decode (4096) + 512")]
    print("| head_dim | cache | step | us | TFLOP/s | GB/s read | us by two | PyTorch us | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for head_dim_text, cache, name in rows:
        head_dim, (queries, prefixes) = int(head_dim_text), shapes[name]
        try:
            bytes_read = read_bytes(queries, prefixes, head_dim)
            sets = min(8, 1 + int(2 * L2_BYTES // bytes_read))
            steps = [step(queries, prefixes, head_dim, dtype, cache) for _ in range(sets)]
            scale = head_dim**-0.5

            def call(arrays: Any, scale: float = scale) -> Any:
                return prefill.paged_attention(*arrays, scale=scale)

            ours = microseconds([lambda s=s: call(s) for s in steps])  # type: ignore[misc]
            singles = next((i for i, n in enumerate(queries) if n > 1), len(queries))
            count = cupy.asarray([singles], np.int32)

            def split(arrays: Any, scale: float = scale, count: Any = count) -> Any:
                return attention.paged_attention(*arrays, scale=scale, singles=count)

            by_two = microseconds([lambda s=s: split(s) for s in steps])  # type: ignore[misc]
            whole = not any(prefixes) and cache == dtype
            theirs = pytorch(queries, head_dim, dtype) if whole else None
            flops = operations(queries, prefixes, head_dim)
            beside = f"{theirs:.0f} | {theirs / ours:.2f}" if theirs else "|"
            print(
                f"| {head_dim} | {cache} | {name} | {ours:.0f} | {flops / ours / 1e6:.0f} "
                f"| {bytes_read / ours / 1e3:.0f} | {by_two:.0f} | {beside} |",
                flush=True,
            )
        except Exception as error:  # the other shapes are worth having
            print(f"| {head_dim} | {cache} | {name} | {type(error).__name__}: {error} |")


if __name__ == "__main__":
    main()
