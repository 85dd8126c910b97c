"""Mixture of experts without a word to the host: rows are sorted by expert where they are.

A group's rows and its expert's weights meet in linear.cu where groups are small (each weight is
read once, and only those of experts that were chosen), else in tiles of moe.cu.
"""

from __future__ import annotations

import functools
from typing import Any

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.activation import KINDS
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.layout import aligned, as_rows, stride
from tensorray.kernels.cuda.linear import Plan, kernel, ntiles
from tensorray.kernels.linear import linear
from tensorray.kernels.quantized import QuantizedWeight

CONSTANT_SETS = {
    "moe.cu": [
        {"ELEMENT": "__half", "ITEMS": 1, "GATED": 1, "SCATTERED": 0},
        {"ELEMENT": "__nv_bfloat16", "ITEMS": 4, "GATED": 0, "SCATTERED": 1},
        {"ELEMENT": "float", "ITEMS": 8},
        {"ELEMENT": "__half", "ITEMS": 1, "PARTIAL": 1},
    ]
}

#: Groups of more rows than these, on the average, are multiplied in tiles of moe.cu; so are all
#: groups of so many rows that most of the blocks for what a group might have would find nothing.
FEW_ROWS_A_GROUP = 24
FEW_ROWS = 64

# Of groups of few rows. A gate takes two sixteens at least, a pipeline two stages.
_PLAN = Plan(mtiles=2, stages=2)
_WARPS = 8
_ROUTE_THREADS = 128
_THREADS = 256
_MOST_BLOCKS = 8192
_TILE = 128  # as in moe.cu
_TILE_SHARED_BYTES = 3 * 2 * _TILE * 64 * 2


def route(logits: Any, top_k: int, renormalize: bool) -> tuple[Any, Any]:
    """See `tensorray.kernels.moe.route`."""
    import cupy

    logits = as_rows(logits)
    rows, experts = logits.shape
    weights = cupy.empty((rows, top_k), "float32")
    ids = cupy.empty((rows, top_k), "int32")
    items = 1 << (-(-experts // 32) - 1).bit_length()
    compiler.load("moe.cu", ELEMENT=ctype(logits), ITEMS=items).function("route")(
        (-(-rows * 32 // _ROUTE_THREADS),),
        (_ROUTE_THREADS,),
        *(logits, weights, ids, rows, experts, top_k, stride(logits), renormalize),
        overlap=True,
    )
    return weights, ids


def experts(
    x: Any, weights: Any, ids: Any, gate_up: Any, down: Any, first_expert: int | None = None
) -> Any:
    """See `tensorray.kernels.moe.experts`."""
    import cupy

    first = first_expert or 0
    count, hidden, inner = down.shape
    rows = as_rows(x)
    if isinstance(gate_up, QuantizedWeight) or isinstance(down, QuantizedWeight):
        return _every_expert(rows, weights, ids, gate_up, down, first)
    fits = gate_up.itemsize == 2 and hidden % 8 == 0 and inner % 8 == 0
    if not (fits and all(each.flags.c_contiguous for each in (gate_up, down)) and aligned(rows)):
        return _every_expert(rows, weights, ids, gate_up, down, first)
    top_k = ids.shape[1]
    choices = len(rows) * top_k
    out = cupy.empty((len(rows), hidden), x.dtype)
    if not choices:
        return out
    slots = min(count, choices)
    groups, order = cupy.empty((slots, 4), "int32"), cupy.empty(choices, "int32")
    module = compiler.load("moe.cu", ELEMENT=ctype(x), ITEMS=1)
    module.function("group_rows", 4 * count)(
        (count,), (_THREADS,), *(ids, choices, first, count, order, groups, slots), overlap=True
    )
    grouped = (groups, order, top_k, len(rows))
    taken = rows_a_block(choices, count, len(rows), compiler.most_shared_bytes())
    product = functools.partial(_few_rows, taken=taken) if taken else _many_rows
    gated = product(rows, gate_up, choices, inner, *grouped, gated=True)
    y = product(gated, down, choices, hidden, *grouped, gated=False)
    packs = out.size // 8
    if first_expert is not None:
        module = compiler.load("moe.cu", ELEMENT=ctype(x), ITEMS=1, PARTIAL=1)
    module.function("combine")(
        (min(-(-packs // _THREADS), _MOST_BLOCKS),),
        (_THREADS,),
        *(y, weights, ids, first, count, out, hidden, top_k, packs),
        overlap=True,
    )
    return out


def rows_a_block(choices: int, experts: int, rows: int, most_shared_bytes: int) -> int | None:
    """How many rows of a group a block of linear.cu takes; None: groups are for moe.cu, being
    large, or too large for the shared memory that a block may have. `choices` are of all experts,
    `experts` those that are here: with some elsewhere, groups are taken for larger than they are,
    which costs time alone."""
    if choices > FEW_ROWS_A_GROUP * experts or rows > FEW_ROWS:
        return None
    average = -(-choices // experts)
    wanted = min(rows, 8 if average <= 4 else 16 if average <= 8 else 32)
    taken = 8 * ntiles(wanted)
    # Without a norm the length of rows does not matter.
    return taken if _PLAN.fits(most_shared_bytes, taken, 0, normed=False) else None


def _few_rows(
    x: Any,
    weight: Any,
    choices: int,
    results: int,
    groups: Any,
    order: Any,
    top_k: int,
    most_rows: int,
    *,
    gated: bool,
    taken: int,
) -> Any:
    """Each group's rows, at most `most_rows`, times its expert's weight, by linear.cu, whose blocks
    take `taken` of them.

    A gate comes first: it gathers x's rows, and its results lie in group order, from which the
    product after it scatters them.
    """
    import cupy

    y = cupy.empty((choices, results), x.dtype)
    inner = x.shape[1]
    shared_bytes = _PLAN.shared_bytes(taken, inner, normed=False)
    tile = 8 * _PLAN.mtiles if gated else 16 * _PLAN.mtiles
    kernel(x, weight, y, _PLAN, taken, False, gated, 1 if gated else 2, shared_bytes)(
        (-(-results // tile), len(groups), -(-most_rows // taken)),
        (32 * _WARPS,),
        *(weight, x, None, None, None, y, inner, weight.shape[1], 0, stride(x), stride(None)),
        *(0.0, KINDS["silu"] if gated else 0, False, groups, order, top_k),
        overlap=True,
    )
    return y


def _many_rows(
    x: Any,
    weight: Any,
    choices: int,
    results: int,
    groups: Any,
    order: Any,
    top_k: int,
    most_rows: int,
    *,
    gated: bool,
) -> Any:
    """`_few_rows` by moe.cu, for groups of any size."""
    import cupy

    y = cupy.empty((choices, results), x.dtype)
    module = compiler.load("moe.cu", ELEMENT=ctype(x), ITEMS=1, GATED=gated, SCATTERED=not gated)
    across = -(-results // (_TILE // 2 if gated else _TILE))
    # Each group may leave one tile of rows unfilled.
    along = choices // _TILE + len(groups)
    module.function("many_rows", _TILE_SHARED_BYTES)(
        (across, along),
        (_THREADS,),
        *(weight, x, y, x.shape[1], weight.shape[1], stride(x), groups, order),
        *(len(groups), top_k),
        overlap=True,
    )
    return y


def _every_expert(x: Any, weights: Any, ids: Any, gate_up: Any, down: Any, first: int) -> Any:
    """All rows through all experts, for dtypes and sizes that the kernels don't take."""
    import cupy

    out = cupy.zeros(x.shape, "float32")
    for expert in range(len(down)):
        share = (weights * (ids == first + expert)).sum(axis=1, keepdims=True)
        out += share * linear(linear(x, gate_up[expert], gate="silu"), down[expert])
    return out.astype(x.dtype)
