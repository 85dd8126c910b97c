"""Rows of a table by index: token embedding, learned positions, rows whose logits are wanted."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels.device import is_cuda


def gather_rows(table: Any, index: Any, first_row: int = 0, *, dtype: Any = None) -> Any:
    """`table[index - first_row]`, zeros where that is no row of the table.

    table `[rows, width]`; index int32 `[T]` -> a new `[T, width]` of the given dtype (the table's
    by default).
    """
    if is_cuda(table):
        from tensorray.kernels.cuda import rows as cuda

        return cuda.gather_rows(table, index, first_row, dtype=dtype)
    return gather_rows_numpy(table, index, first_row, dtype=dtype)


def gather_rows_numpy(table: Any, index: Any, first_row: int = 0, *, dtype: Any = None) -> Any:
    """The twin of `gather_rows`."""
    own = index - first_row
    inside = (own >= 0) & (own < len(table))
    found = table[np.where(inside, own, 0)]
    found[~inside] = 0
    return found if dtype is None else found.astype(dtype, copy=False)
