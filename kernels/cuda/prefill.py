"""Attention of packed queries over a paged KV cache, for steps in which a sequence may have many.

prefill_hopper.cu (wgmma, TMA) serves Hopper and the usual head sizes, prefill.cu (mma.sync) the
rest, any GPU from compute capability 8.0 on. Which tile of which sequence a block works on is found
on the device, so a launch depends on array shapes only and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.hopper import MMA_TYPES, is_hopper, tensor_map
from tensorray.kernels.cuda.scratch import counters

# struct Step of prefill.cuh.
_STEP = np.dtype(
    [
        *((name, np.int32) for name in ("tokens", "sequences", "heads", "kv_heads", "share")),
        *((name, np.int32) for name in ("queries_per_tile", "q_stride", "block_size")),
        *((name, np.int32) for name in ("table_stride", "window")),
        *((name, np.float32) for name in ("scale", "softcap", "out_scale")),
    ]
)
_NO_WINDOW = 1 << 30
_MAX_HEAD_DIM = 256

_MMA_WARPS = 4
_MMA_ROWS = 16 * _MMA_WARPS

# By head size: keys of a tile and stages of the ring. A thread has registers for 128 scores and 64
# results, or the other way round.
_WGMMA_SHAPES = {64: (128, 2), 128: (128, 2), 256: (64, 2)}
_WGMMA_ROWS = 128
_WGMMA_THREADS = 384
_COLUMN = 64  # elements of a row that lie together in shared memory

Constants = dict[str, int | str]


def _mma_constants(dtype: str, kv: str, head_dim: int, softcap: bool) -> Constants:
    keys = 64 if head_dim <= 128 else 32
    return {"T": dtype, "KV": kv, "HEAD_DIM": head_dim, "KEYS": keys, "SOFTCAP": int(softcap)}


def _wgmma_constants(dtype: str, kv: str, head_dim: int, softcap: bool) -> Constants:
    keys, stages = _WGMMA_SHAPES[head_dim]
    return {
        **{"T": dtype, "MMA_TYPE": MMA_TYPES[dtype], "KV": kv, "HEAD_DIM": head_dim},
        **{"KEYS": keys, "STAGES": stages, "SOFTCAP": int(softcap)},
    }


CONSTANT_SETS = {
    "prefill.cu": [
        _mma_constants("__half", "__half", 128, False),
        _mma_constants("__nv_bfloat16", "__nv_fp8_e4m3", 256, True),
        _mma_constants("__nv_bfloat16", "__nv_bfloat16", 80, False),
    ],
    # For sm_90a; elsewhere it is an empty file.
    "prefill_hopper.cu": [
        _wgmma_constants("__half", "__half", 128, False),
        _wgmma_constants("__nv_bfloat16", "__nv_fp8_e4m3", 256, True),
    ],
}


def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scale: float = 1.0,
    ahead: Any | None = None,
    out: Any | None = None,
) -> Any:
    """`kernels.attention.paged_attention` on CuPy arrays, for any number of queries a sequence.

    q `[T, heads, head_dim]` float16 or bfloat16, each token's heads contiguous, head_dim a multiple
    of 16, at most 256; pages of the same dtype or float8_e4m3fn (as such or as uint8), whose
    numbers stand for `kv_scale` times themselves; query_starts, seq_lens and block_table int32.
    Rows of tokens that belong to no sequence become zeros. A row's result is the same, bit for bit,
    whatever else is in the step. `ahead`, int32 [1], is how many sequences come first that are left
    alone: their rows of `out`, an array like q to write to, stay as they are. Raises ValueError for
    arrays that are none of these.
    """
    import cupy

    _check(q, k_pages, v_pages, query_starts, seq_lens, block_table, scale)
    hopper = (
        q.shape[2] in _WGMMA_SHAPES
        and k_pages.shape[2] % 8 == 0
        and is_hopper(cupy.cuda.runtime.getDevice())
    )
    if out is None:
        out = cupy.empty(q.shape, q.dtype)
    if not q.size:
        return out
    (_launch_wgmma if hopper else _launch_mma)(
        *(q, k_pages, v_pages, query_starts, seq_lens, block_table, out, ahead),
        *(scale, window, softcap, kv_scale),
    )
    return out


def _launch_mma(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    out: Any,
    ahead: Any | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kv_scale: float,
) -> None:
    head_dim = q.shape[2]
    step = _step(_MMA_ROWS, q, k_pages, block_table, scale, window, softcap, kv_scale)
    constants = _mma_constants(ctype(q), ctype(k_pages), head_dim, softcap is not None)
    shared_bytes = _mma_shared_bytes(head_dim, int(constants["KEYS"]), k_pages.itemsize)
    kernel = compiler.load("prefill.cu", None, **constants).function("prefill_mma", shared_bytes)
    kernel(
        (_tiles(step), q.shape[1] // int(step["share"])),
        (32 * _MMA_WARPS,),
        *(q, k_pages, v_pages, query_starts, seq_lens, block_table, out, ahead, step),
        overlap=True,
    )


def _launch_wgmma(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    out: Any,
    ahead: Any | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    kv_scale: float,
) -> None:
    heads, head_dim = q.shape[1:]
    keys, stages = _WGMMA_SHAPES[head_dim]
    step = _step(_WGMMA_ROWS, q, k_pages, block_table, scale, window, softcap, kv_scale)
    share, queries = int(step["share"]), int(step["queries_per_tile"])
    block_size = k_pages.shape[2]
    box_rows = min(keys, block_size & -block_size)  # of a page that one copy takes
    width = head_dim * q.itemsize
    q_map = tensor_map(
        q.data.ptr, 2, (head_dim, heads, len(q)), (width, q.strides[0]), (_COLUMN, share, queries)
    )
    narrow = k_pages.itemsize == 1
    page_box = (head_dim if narrow else _COLUMN, box_rows)
    k_map, v_map = (
        tensor_map(
            *(pages.data.ptr, pages.itemsize, (head_dim, pages.size // head_dim)),
            *((head_dim * pages.itemsize,), page_box),
        )
        for pages in (k_pages, v_pages)
    )
    # Matrices, room to align them by 1024, barriers and the like.
    shared_bytes = (_WGMMA_ROWS + 2 * stages * keys + narrow * keys) * width + 2048
    constants = _wgmma_constants(ctype(q), ctype(k_pages), head_dim, softcap is not None)
    module = compiler.load("prefill_hopper.cu", None, **constants)
    module.function("prefill_wgmma", shared_bytes)(
        (min(compiler.multiprocessors(), _tiles(step) * (heads // share)),),
        (_WGMMA_THREADS,),
        *(q_map, k_map, v_map, query_starts, seq_lens, block_table, out, ahead),
        *(counters("prefill", 2), box_rows, step),
        overlap=True,
    )


def _step(
    rows: int,
    q: Any,
    k_pages: Any,
    block_table: Any,
    scale: float,
    window: int | None,
    softcap: float | None,
    kv_scale: float,
) -> Any:
    """What a kernel with tiles of `rows` rows is told, a scalar of _STEP."""
    tokens, heads = q.shape[:2]
    kv_heads, block_size = k_pages.shape[1:3]
    share = _largest_divisor(heads // kv_heads, rows)
    values = (
        *(tokens, len(block_table), heads, kv_heads, share, rows // share),
        *(q.strides[0] // q.itemsize, block_size),
        block_table.strides[0] // block_table.itemsize,
        min(window or _NO_WINDOW, _NO_WINDOW),
        *(scale * kv_scale, softcap or 0.0, kv_scale),
    )
    return np.array(values, _STEP)[()]


def _tiles(step: Any) -> int:
    """Numbers enough for the tiles of any division of the tokens (prefill.cuh)."""
    return int(step["tokens"] // step["queries_per_tile"] + step["sequences"]) + 1


def _check(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    scale: float,
) -> None:
    heads, head_dim = q.shape[1:]
    if head_dim % 16 or head_dim > _MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of 16 up to {_MAX_HEAD_DIM}, not {head_dim}")
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"keys' and values' pages differ: {k_pages.shape} {k_pages.dtype} and "
            f"{v_pages.shape} {v_pages.dtype}"
        )
    if k_pages.shape[3] != head_dim or heads % k_pages.shape[1]:
        raise ValueError(f"queries {q.shape} don't fit pages {k_pages.shape}")
    if q.itemsize != 2 or (k_pages.dtype != q.dtype and k_pages.itemsize != 1):
        raise ValueError(
            f"queries must be float16 or bfloat16, and pages that or float8, not {q.dtype} and "
            f"{k_pages.dtype}"
        )
    if len(query_starts) != len(seq_lens) + 1 or len(block_table) != len(seq_lens):
        raise ValueError(
            f"{len(seq_lens)} sequences need {len(seq_lens) + 1} query_starts and as many rows of "
            f"the block table, not {len(query_starts)} and {len(block_table)}"
        )
    for name, x in (("query_starts", query_starts), ("seq_lens", seq_lens)):
        if x.dtype != np.int32 or not x.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous int32")
    if block_table.dtype != np.int32 or block_table.strides[1] != block_table.itemsize:
        raise ValueError("block_table must be int32 with contiguous rows")
    for name, x in (("a token of q", q[:1]), ("k_pages", k_pages), ("v_pages", v_pages)):
        if not x.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous")
    if q.strides[0] % 16 or q.data.ptr % 16:
        raise ValueError("each token of q must start at a multiple of 16 bytes")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive, not {scale}")


def _largest_divisor(n: int, most: int) -> int:
    return max(divisor for divisor in range(1, min(n, most) + 1) if n % divisor == 0)


def _mma_shared_bytes(head_dim: int, keys: int, cache_itemsize: int) -> int:
    """What prefill_mma lays out: keys, values, where their rows lie; float8 tiles; queries."""
    row = 2 * (head_dim + 8)
    narrow = 2 * keys * head_dim if cache_itemsize == 1 else 0
    queries = 0 if head_dim <= 128 else _MMA_ROWS * row
    return 2 * keys * row + 2 * 8 * keys + narrow + queries
