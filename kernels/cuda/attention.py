"""Paged attention: which kernel takes a step, and the launches of two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tensorray.kernels.cuda import compiler, rope
from tensorray.kernels.cuda.dtypes import ctype, expect
from tensorray.kernels.cuda.layout import row_stride
from tensorray.kernels.cuda.scratch import counters

_TILE = 16  # positions
_HEADS = 8  # of a KV head's group that a block takes
# Blocks that many sequences are split into, in multiples of what the GPU holds at once: more even
# out sequences of unequal lengths, and cost a start each.
_WAVES = 4
# The same where it is not known how many sequences there are: few long ones are not to wait for one
# block each, and blocks without work cost little.
_SPLITS_OF_SOME = 4
# With more tokens in a step, and 16-bit pages, one kernel for both decodes and prefill is faster.
_SPLIT_TOKENS = 640
# Of what is split, a sequence's KV head each: more than `_WAVES` times what any GPU holds.
_MOST_ITEMS = 1 << 14
_SIMPLE_WARPS = 4
# Static shared memory of a block, at most.
_SHARED_BYTES = 48 * 1024


def _decode_constants(
    dtype: str,
    kv: str,
    head_dim: int,
    group: int,
    block_size: int,
    *,
    few: bool = False,
    softcap: bool = False,
    rope: bool = False,
    norm: bool = False,
) -> dict[str, int | str]:
    """`few`: there are no more blocks than multiprocessors, so each had better be large."""
    if few:
        row_bytes = min(group, _HEADS) * (head_dim + 2) * 4
        warps, held, split_tiles = (8 if 8 * row_bytes < _SHARED_BYTES else 4), 1, 8
    else:  # registers bound how many blocks a multiprocessor holds
        warps, held, split_tiles = 4, (4 if head_dim <= 64 else 3 if head_dim <= 128 else 2), 16
    return {
        **{"DTYPE": dtype, "KV_DTYPE": kv, "HEAD_DIM": head_dim, "GROUP": group},
        **{"BLOCK_SIZE": block_size, "SOFTCAP": int(softcap)},
        **{"WARPS": warps, "MIN_BLOCKS": held, "SPLIT_TILES": split_tiles},
        **{"ROPE": int(rope), "NORM": int(norm)},
    }


def _simple_constants(
    dtype: str, kv: str, head_dim: int, block_size: int, softcap: bool
) -> dict[str, int | str]:
    return {
        **{"DTYPE": dtype, "KV_DTYPE": kv, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size},
        **{"WARPS": _SIMPLE_WARPS, "SOFTCAP": int(softcap)},
    }


CONSTANT_SETS = {
    "decode_attention.cu": [
        _decode_constants("__half", "__half", 128, 4, 16, few=True, rope=True, norm=True),
        _decode_constants("__nv_bfloat16", "__nv_fp8_e4m3", 80, 9, 8, softcap=True),
        _decode_constants("__nv_bfloat16", "__nv_bfloat16", 256, 2, 32, rope=True),
    ],
    "simple_attention.cu": [
        _simple_constants("float", "float", 64, 16, False),
        _simple_constants("__half", "__nv_fp8_e4m3", 20, 4, True),
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
    max_query: int | None = None,
    singles: Any | None = None,
) -> Any:
    """See `tensorray.kernels.attention.paged_attention`.

    With `max_query` 1 row i is sequence i, or a padded one of length 0. Where that is faster,
    sequences of one query that come first, `singles` of them, go to the kernel for decodes, and
    only the others to that for prefill.
    """
    head_dim = q.shape[2]
    one_each = max_query == 1 and len(q) == len(seq_lens)
    odd = head_dim % (8 if one_each else 16) or head_dim > 256
    if ctype(q) == "float" or ctype(k_pages) == "float" or odd:
        return simple(
            q,
            *(k_pages, v_pages, query_starts, seq_lens, block_table),
            scale=scale,
            window=window,
            softcap=softcap,
            kv_scale=kv_scale,
        )
    if one_each:
        return decode(
            q,
            *(k_pages, v_pages, seq_lens, block_table),
            scale=scale,
            window=window,
            softcap=softcap,
            kv_scale=kv_scale,
        )
    import cupy

    from tensorray.kernels.cuda import prefill

    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    options["kv_scale"] = kv_scale
    out = cupy.empty(q.shape, q.dtype)
    rows = min(len(q), len(seq_lens))
    if k_pages.itemsize > 1 and len(q) > _SPLIT_TOKENS:
        singles = None
    if singles is not None and rows:
        decode(
            q[:rows],
            *(k_pages, v_pages, seq_lens[:rows], block_table[:rows]),
            **options,
            count=singles,
            out=out[:rows],
        )
    return prefill.paged_attention(
        q,
        *(k_pages, v_pages, query_starts, seq_lens, block_table),
        **options,
        ahead=singles,
        out=out,
    )


def rope_attention(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    positions: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scale: float = 1.0,
    q_norm: Any | None = None,
    k_norm: Any | None = None,
    eps: float = 0.0,
    max_query: int | None = None,
) -> Any:
    """See `tensorray.kernels.rope.rope_attention`: one kernel in a decode step.

    That one reads older keys and values before the kernel ahead has finished: it must not be one
    that wrote them.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    options["kv_scale"] = kv_scale
    head_dim = q.shape[2]
    fits = (
        max_query == 1
        and q.itemsize == 2
        and ctype(k_pages) != "float"
        and head_dim % 64 == 0
        and head_dim <= 256
        and table.shape[1] == head_dim
        and all(row_stride(x) % 8 == 0 and x.data.ptr % 16 == 0 for x in (q, k, v))
    )
    if fits:
        newest = Newest(k, v, table, positions, slots, q_norm, k_norm, eps)
        return decode(q, k_pages, v_pages, seq_lens, block_table, **options, newest=newest)
    q = rope.rope_append(
        *(q, k, v, table, positions, k_pages, v_pages, slots),
        kv_scale=kv_scale,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )
    return paged_attention(
        *(q, k_pages, v_pages, query_starts, seq_lens, block_table), **options, max_query=max_query
    )


@dataclass(frozen=True)
class Newest:
    """What one decode kernel rotates and appends before it attends."""

    k: Any  # [S, kv_heads, head_dim]; rows may be strided, as v's
    v: Any
    table: Any
    positions: Any
    slots: Any
    q_norm: Any | None = None
    k_norm: Any | None = None
    eps: float = 0.0


def decode(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    seq_lens: Any,
    block_table: Any,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scale: float = 1.0,
    newest: Newest | None = None,
    count: Any | None = None,
    out: Any | None = None,
    splits: int | None = None,
    constants: dict[str, int | str] | None = None,
) -> Any:
    """One query a sequence, float16 or bfloat16: q `[S, heads, head_dim]` -> the same shape.

    With `newest`, q is yet to be rotated, and the newest key and value are yet to be appended.
    With `count`, int32 [1] on the device, only so many first sequences are there, and the others'
    rows of `out`, an array like q to write to, are left alone. `splits`, how many blocks share a
    sequence at most, and `constants`, in place of some of the kernel's own, are chosen here unless
    given (to measure others).
    """
    import cupy

    expect("int32", seq_lens=seq_lens, block_table=block_table)
    sequences, heads, head_dim = q.shape
    kv_heads, block_size = k_pages.shape[1:3]
    if sequences != len(seq_lens):
        raise ValueError(f"{sequences} queries for {len(seq_lens)} sequences in a decode step")
    if row_stride(q) % 8 or q.data.ptr % 16:
        q = cupy.array(q, order="C")
    group = heads // kv_heads
    head_tiles = -(-group // _HEADS)
    items = sequences * kv_heads * head_tiles
    few = items <= compiler.multiprocessors()
    chosen = _decode_constants(
        *(ctype(q), ctype(k_pages), head_dim, group, block_size),
        few=few,
        softcap=softcap is not None,
        rope=newest is not None,
        norm=newest is not None and newest.q_norm is not None,
    ) | (constants or {})
    if splits is None:
        tiles = -(-block_table.shape[1] * block_size // _TILE)
        if window is not None:
            tiles = min(tiles, window // _TILE + 2)
        # Few fill the GPU once, since a second round would take as long as the first.
        slots = compiler.multiprocessors() * int(chosen["MIN_BLOCKS"])
        wanted = slots // items if few else -(-_WAVES * slots // items)
        if count is not None and items <= _MOST_ITEMS:
            wanted = max(wanted, _SPLITS_OF_SOME)
        splits = max(1, min(wanted, tiles // int(chosen["SPLIT_TILES"])))
    if out is None:
        out = cupy.empty(q.shape, q.dtype)
    partials = arrivals = None
    if splits > 1:
        partials = cupy.empty(items * splits * min(group, _HEADS) * (head_dim + 2), "float32")
        if items > _MOST_ITEMS:
            raise ValueError(f"{items} KV heads of sequences can't be split: {_MOST_ITEMS} can")
        arrivals = counters("decode_attention", _MOST_ITEMS)
    score_scale = scale * kv_scale
    cap = 0.0
    if softcap is None:
        score_scale *= math.log2(math.e)
    else:
        score_scale /= softcap
        cap = softcap * math.log2(math.e)
    kernel = compiler.load("decode_attention.cu", None, **chosen).function("decode_attention")
    kernel(
        (kv_heads * head_tiles, splits, sequences),
        (32 * int(chosen["WARPS"]),),
        *(q, k_pages, v_pages, seq_lens, block_table, out, partials, arrivals),
        *(row_stride(q), kv_heads, row_stride(block_table), window or 0),
        *(score_scale, cap, kv_scale, *_newest_arguments(newest), count),
        overlap=True,
    )
    return out


def _newest_arguments(newest: Newest | None) -> tuple[Any, ...]:
    if newest is None:
        return (*[None] * 7, 0, 0, 0.0)
    expect("float32", table=newest.table)
    expect("int32", positions=newest.positions)
    expect("int64", slots=newest.slots)
    expect(newest.k.dtype.name, v=newest.v, q_norm=newest.q_norm, k_norm=newest.k_norm)
    return (
        *(newest.k, newest.v, newest.table, newest.positions, newest.slots),
        *(newest.q_norm, newest.k_norm, row_stride(newest.k), row_stride(newest.v), newest.eps),
    )


def simple(
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
) -> Any:
    """Any dtype, head size and number of queries, slowly."""
    import cupy

    expect("int32", query_starts=query_starts, seq_lens=seq_lens, block_table=block_table)
    rows, heads, head_dim = q.shape
    kv_heads, block_size = k_pages.shape[1:3]
    out = cupy.empty(q.shape, q.dtype)
    constants = _simple_constants(
        ctype(q), ctype(k_pages), head_dim, block_size, softcap is not None
    )
    kernel = compiler.load("simple_attention.cu", None, **constants).function("simple_attention")
    kernel(
        (heads, -(-rows // _SIMPLE_WARPS)),
        (32 * _SIMPLE_WARPS,),
        *(q, k_pages, v_pages, query_starts, seq_lens, block_table, out),
        *(rows, len(seq_lens), row_stride(q), kv_heads, row_stride(block_table), window or 0),
        *(scale * kv_scale, softcap or 0.0, kv_scale),
        overlap=True,
    )
    return out
