"""How arrays lie in memory, as kernels need to know it."""

from __future__ import annotations

from typing import Any

import numpy as np

_WIDEST = 16  # bytes that a thread moves at once


def as_rows(x: Any) -> Any:
    """x as `[rows, n]`, each row contiguous: a view if x allows one, else a copy."""
    import cupy

    if x.ndim != 2:
        x = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    if x.shape[1] > 1 and x.strides[1] != x.itemsize:
        x = cupy.ascontiguousarray(x)
    return x


def stride(rows: Any | None) -> np.int64:
    """Elements from a row of `as_rows` to the next; 0 for None."""
    elements: np.int64 = np.int64(0 if rows is None else rows.strides[0] // rows.itemsize)
    return elements


def row_stride(x: Any) -> int:
    """Elements between rows of `[T, ...]`, each contiguous; 0 where there is but one row.

    Axes of one element may have any stride: a slice of a single KV head has its row's. Raises
    ValueError.
    """
    expected = x.itemsize
    for extent, bytes_apart in zip(reversed(x.shape[1:]), reversed(x.strides[1:]), strict=True):
        if extent > 1 and bytes_apart != expected:
            raise ValueError(f"rows must be contiguous, got strides {x.strides} in bytes")
        expected *= extent
    return int(x.strides[0] // x.itemsize) if len(x) > 1 else 0


def aligned(rows: Any) -> bool:
    """Whether every row of `as_rows` starts at a multiple of 16 bytes."""
    start: int = rows.data.ptr
    return start % _WIDEST == 0 and (len(rows) < 2 or rows.strides[0] % _WIDEST == 0)


def vector(columns: int, *arrays: Any | None) -> int:
    """How many elements of each of the arrays a thread can move at once: 8 or 1."""
    fits = all(a is None or aligned(a if a.ndim == 2 else a.reshape(1, -1)) for a in arrays)
    return 8 if columns % 8 == 0 and fits else 1
