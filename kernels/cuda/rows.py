"""Rows of a table by index: token embedding, learned positions, rows whose logits are wanted."""

from __future__ import annotations

from typing import Any

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.dtypes import ctype, expect

CONSTANT_SETS = {
    "rows.cu": [
        {"IN": "__half", "OUT": "__half", "VEC": 8},
        {"IN": "__nv_bfloat16", "OUT": "float", "VEC": 1},
    ]
}

_THREADS = 128


def gather_rows(table: Any, index: Any, first_row: int = 0, *, dtype: Any = None) -> Any:
    """See `tensorray.kernels.rows.gather_rows`; the table must be contiguous."""
    import cupy

    expect("int32", index=index)
    rows, width = table.shape
    out = cupy.empty((len(index), width), dtype or table.dtype)
    widest = 16 // max(table.itemsize, out.itemsize)
    vec = widest if width % widest == 0 and table.data.ptr % 16 == 0 else 1
    module = compiler.load("rows.cu", IN=ctype(table), OUT=ctype(out), VEC=vec)
    spans = -(-width // (_THREADS * vec))
    module.function("gather_rows")(
        (len(index), min(spans, 8)),
        (_THREADS,),
        *(table, index, out, width, rows, first_row),
        overlap=True,
    )
    return out
