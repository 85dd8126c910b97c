"""Norms: one pass over memory each."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.layout import as_rows, stride, vector

_HALF = {"INPUT": "__half", "DELTA": "__half", "WEIGHT": "__half"}
_WIDE = {"INPUT": "float", "DELTA": "__nv_bfloat16", "WEIGHT": "__nv_bfloat16"}
CONSTANT_SETS = {
    "norm.cu": [
        {**_HALF, "VEC": 8, "ITEMS": 1},
        {**_WIDE, "VEC": 8, "ITEMS": 2},
        {**_HALF, "VEC": 4, "ITEMS": 1},
        {"INPUT": "float", "DELTA": "float", "WEIGHT": "float", "VEC": 1, "ITEMS": 4},
    ]
}

_MOST_THREADS = 1024
_HEAD_THREADS = 128
#: Rows up to here are a warp's work, longer ones a block's.
_SHORT_ROW = 256
#: Longest row that a block's registers hold.
MOST_COLUMNS = 32 * _MOST_THREADS


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """See `tensorray.kernels.norm.rms_norm`."""
    import cupy

    if x.ndim == 3 and x.shape[-1] <= _SHORT_ROW:
        return _head_norms(x, None, weight, None, eps)[0]
    rows = as_rows(x)
    y = cupy.empty(x.shape, weight.dtype)
    module, threads = _module(rows, rows, weight)
    module.function("rms_norm")(
        (len(rows),),
        (threads,),
        *(rows, weight, y, rows.shape[1], stride(rows), float(eps)),
        overlap=True,
    )
    return y


def add_rms_norm(
    x: Any, delta: Any, weight: Any, eps: float, *, delta_weight: Any | None = None
) -> tuple[Any, Any]:
    """See `tensorray.kernels.norm.add_rms_norm`."""
    import cupy

    rows, added = as_rows(x), as_rows(delta)
    total, y = cupy.empty(x.shape, x.dtype), cupy.empty(x.shape, weight.dtype)
    module, threads = _module(rows, added, weight, delta_weight)
    module.function("add_rms_norm")(
        (len(rows),),
        (threads,),
        *(rows, added, delta_weight, weight, total, y, rows.shape[1]),
        *(stride(rows), stride(added), float(eps)),
        overlap=True,
    )
    return total, y


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """See `tensorray.kernels.norm.layer_norm`."""
    import cupy

    rows = as_rows(x)
    y = cupy.empty(x.shape, weight.dtype)
    module, threads = _module(rows, rows, weight, bias)
    module.function("layer_norm")(
        (len(rows),),
        (threads,),
        *(rows, weight, bias, y, rows.shape[1], stride(rows), float(eps)),
        overlap=True,
    )
    return y


def qk_norm(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float) -> tuple[Any, Any]:
    """See `tensorray.kernels.norm.qk_norm`."""
    if q.shape[-1] > _SHORT_ROW:
        return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return _head_norms(q, k, q_weight, k_weight, eps)


def _head_norms(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float) -> tuple[Any, Any]:
    """`rms_norm` of `[T, heads, head_dim]` arrays, of which k may be None, a warp a head."""
    import cupy

    arrays = [_heads(x) for x in (q, k) if x is not None]
    weights = [weight for weight in (q_weight, k_weight) if weight is not None]
    tokens, _, columns = q.shape
    outs = [cupy.empty(x.shape, weights[0].dtype) for x in arrays]
    vec = next(v for v in (8, 4, 2, 1) if columns % (32 * v) == 0 or v == 1)
    if not all(_fits(x, vec) for x in (*arrays, *weights)):
        vec = 1
    constants = {"INPUT": ctype(q), "DELTA": ctype(q), "WEIGHT": ctype(q_weight)}
    module = compiler.load("norm.cu", **constants, VEC=vec, ITEMS=_items(columns, vec, 32))
    strides = [np.int64(s // x.itemsize) for x in arrays for s in x.strides[:2]]
    heads = [x.shape[1] for x in arrays]
    if k is None:
        arrays, weights, outs = ([*pair, None] for pair in (arrays, weights, outs))
        heads, strides = [*heads, 0], [*strides, np.int64(0), np.int64(0)]
    warps = _HEAD_THREADS // 32
    module.function("head_norms")(
        (-(-tokens * sum(heads) // warps),),
        (_HEAD_THREADS,),
        *(*arrays, *weights, *outs, tokens, *heads, columns, *strides, float(eps)),
        overlap=True,
    )
    return outs[0], outs[1]


def _heads(x: Any) -> Any:
    """x with its last axis contiguous."""
    import cupy

    return x if x.shape[-1] == 1 or x.strides[-1] == x.itemsize else cupy.ascontiguousarray(x)


def _fits(x: Any, vec: int) -> bool:
    """Whether packs of `vec` elements lie where accesses of their size may."""
    size = min(vec * x.itemsize, 16)
    return x.data.ptr % size == 0 and all(s % size == 0 for s in x.strides[:-1])


def _module(x: Any, delta: Any, *weights: Any | None) -> tuple[compiler.Module, int]:
    """The kernels for rows of x, and how many threads take one."""
    columns = x.shape[1]
    if columns > MOST_COLUMNS:
        raise ValueError(
            f"a norm of rows of {columns} elements: at most {MOST_COLUMNS} are possible"
        )
    vec = vector(columns, x, delta, *weights)
    packs = -(-columns // vec)
    threads = min(-(-packs // 32) * 32, _MOST_THREADS)
    weight = ctype(weights[0])
    constants = {"INPUT": ctype(x), "DELTA": ctype(delta), "WEIGHT": weight}
    items = _items(columns, vec, threads)
    return compiler.load("norm.cu", **constants, VEC=vec, ITEMS=items), threads


def _items(columns: int, vec: int, threads: int) -> int:
    """Packs a thread holds, rounded up to a power of two so that few variants are compiled."""
    packs = -(-columns // (vec * threads))
    return 1 << (packs - 1).bit_length()
