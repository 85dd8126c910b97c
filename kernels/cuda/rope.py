"""Rotary embedding and the append to the paged cache, alone and in one pass."""

from __future__ import annotations

from typing import Any

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.dtypes import ctype, expect
from tensorray.kernels.cuda.layout import row_stride

_THREADS = 128


def _constants(
    dtype: str, kv: str, head_dim: int, rotary: int, vec: int, norm: bool
) -> dict[str, int | str]:
    chunks = max(rotary // 2, head_dim - rotary) // vec
    lanes = min(32, 1 << max(0, chunks - 1).bit_length())
    return {
        **{"DTYPE": dtype, "KV_DTYPE": kv, "HEAD_DIM": head_dim, "ROTARY": rotary},
        **{"VEC": vec, "LANES": lanes, "NORM": int(norm)},
    }


CONSTANT_SETS = {
    "rope.cu": [
        _constants("__half", "__half", 128, 128, 8, False),
        _constants("__nv_bfloat16", "__nv_fp8_e4m3", 80, 32, 8, True),
        _constants("float", "float", 256, 256, 4, True),
        _constants("__half", "__half", 24, 0, 8, False),
    ]
}


def rope_append(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    positions: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    *,
    kv_scale: float = 1.0,
    q_norm: Any | None = None,
    k_norm: Any | None = None,
    eps: float = 0.0,
) -> Any:
    """See `tensorray.kernels.rope.rope_append`."""
    import cupy

    out = cupy.empty(q.shape, q.dtype)
    expect(q.dtype.name, k=k, v=v, q_norm=q_norm, k_norm=k_norm)
    norms = None if q_norm is None else (q_norm, k_norm, eps)
    _launch(q, k, v, table, positions, norms, out, k_pages, v_pages, slots, 1.0 / kv_scale)
    return out


def rope(q: Any, k: Any, table: Any, positions: Any) -> tuple[Any, Any]:
    """See `tensorray.kernels.rope.rope`."""
    import cupy

    q_out, k_out = cupy.empty(q.shape, q.dtype), cupy.empty(k.shape, k.dtype)
    # Rows of k_out are blocks of one slot each.
    pages = k_out[:, :, None, :]
    _launch(q, k, None, table, positions, None, q_out, pages, None, None, 1.0)
    return q_out, k_out


def append_kv(
    k: Any, v: Any, k_pages: Any, v_pages: Any, slots: Any, *, kv_scale: float = 1.0
) -> None:
    """See `tensorray.kernels.attention.append_kv`."""
    _launch(None, k, v, None, None, None, None, k_pages, v_pages, slots, 1.0 / kv_scale)


def _launch(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    positions: Any,
    norms: tuple[Any, Any, float] | None,
    q_out: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    inverse_scale: float,
) -> None:
    expect("float32", table=table)
    expect("int32", positions=positions)
    expect("int64", slots=slots)
    tokens, kv_heads, head_dim = k.shape
    heads = 0 if q is None else q.shape[1]
    rotary = 0 if table is None else table.shape[1]
    strides = [0 if x is None else row_stride(x) for x in (q, k, v)]
    vec = 16 // k.itemsize
    while head_dim % vec or (rotary // 2) % vec or any(stride % vec for stride in strides):
        vec //= 2
    if any(x is not None and x.data.ptr % (vec * x.itemsize) for x in (q, k, v)):
        vec = 1
    constants = _constants(ctype(k), ctype(k_pages), head_dim, rotary, vec, norms is not None)
    groups = tokens * (heads + kv_heads * (1 if v is None else 2))
    per_block = _THREADS // int(constants["LANES"])
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    compiler.load("rope.cu", None, **constants).function("rope_append")(
        (-(-groups // per_block),),
        (_THREADS,),
        *(q, k, v, table, positions, q_norm, k_norm, q_out, k_pages, v_pages, slots),
        *(groups, heads, kv_heads, *strides, k_pages.shape[2], inverse_scale, eps),
        overlap=True,
    )
