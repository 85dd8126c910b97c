"""A step's metadata on the device: what kernels/step.py says, on CuPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tensorray.kernels.cuda import compiler

if TYPE_CHECKING:
    from tensorray.kernels.step import StepLayout

# Words of the header, as kernels/step.py numbers them.
_HEADER: dict[str, int | str] = {"TOKENS": 0, "UPDATES": 1, "UPDATES_AT": 2, "TOKENS_AT": 3}
CONSTANT_SETS = {"step.cu": [_HEADER]}

_THREADS = 128
_MAX_PADDING_BLOCKS = 16


def _function(name: str) -> compiler.Function:
    return compiler.load("step.cu", None, **_HEADER).function(name)


def update_tables(packed: Any, tables: Any) -> None:
    """See `tensorray.kernels.step.update_tables`."""
    # Not overlapped: it writes what the step before reads.
    _function("update_tables")((8,), (_THREADS,), packed, tables)


def unpack_step(
    packed: Any,
    layout: StepLayout,
    tables: Any,
    last_tokens: Any,
    tokens: Any,
    positions: Any,
    slots: Any,
    block_tables: Any,
    block_size: int,
) -> None:
    """See `tensorray.kernels.step.unpack_step`."""
    groups, rows, width = tables.shape
    seqs, total = block_tables.shape[1], len(tokens)
    padding = min(-(-total // _THREADS), _MAX_PADDING_BLOCKS)
    _function("unpack_step")(
        (seqs + padding,),
        (_THREADS,),
        *(packed, tables, last_tokens, tokens, positions, slots, block_tables),
        *(layout.rows, layout.starts, layout.lens, groups, rows, width, total, seqs),
        np.int64(slots.strides[0] // slots.itemsize),
        np.int64(block_tables.strides[0] // block_tables.itemsize),
        block_size,
        overlap=True,
    )
