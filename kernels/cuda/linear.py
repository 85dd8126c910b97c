"""Linear layers: a kernel that streams the weight once for few rows, cuBLAS for many, and on Hopper
a kernel of our own for gated products where it is faster (gated_hopper.py)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from tensorray.kernels.cuda import compiler, cublas, gated_hopper
from tensorray.kernels.cuda.activation import KINDS, finish
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.layout import aligned, as_rows, stride
from tensorray.kernels.cuda.norm import rms_norm

_HALF = {"WEIGHT": "__half", "INPUT": "__half", "OUTPUT": "__half", "MTILES": 2, "STAGES": 5}
_WIDE = {"WEIGHT": "__nv_bfloat16", "INPUT": "float", "OUTPUT": "float", "MTILES": 1, "STAGES": 8}
CONSTANT_SETS = {
    "linear.cu": [
        dict(_HALF, NTILES=1, NORM=1, GATED=1, GROUPED=0),
        dict(_HALF, NTILES=2, NORM=0, GATED=0, GROUPED=0),
        dict(_WIDE, NTILES=1, NORM=1, GATED=0, GROUPED=0),
        dict(_HALF, NTILES=1, NORM=0, GATED=1, GROUPED=1),
        dict(_HALF, NTILES=4, NORM=0, GATED=0, GROUPED=2),
        dict(_HALF, NTILES=1, NORM=1, GATED=1, GROUPED=0, STAGES=2),
    ]
}

#: With more rows cuBLAS is faster, or nearly so.
FEW_ROWS = 16
#: With more rows, or longer ones, a norm is a launch of its own: each block would repeat it.
FEW_NORMED_ROWS = 4
LONGEST_NORMED_ROW = 8192

# As in linear.cu.
_WARPS, _UNIT = 8, 512
_SPARE_BYTES = 1024  # of the shared memory a block may have, what plans leave
# Weights that the blocks of one launch hold in flight all at once.
_SMALL_WEIGHT = 16 << 20
_SMALL_TILE = 128 << 10


@dataclass(frozen=True)
class Plan:
    """How a product of few rows is cut up."""

    mtiles: int  # sixteens of outputs made at a time
    stages: int  # chunks of 64 elements of a weight's rows on their way to a warp at once

    def shared_bytes(self, rows: int, inner: int, normed: bool) -> int:
        """Shared memory of a block."""
        units = 4 * self.mtiles + (0 if normed else 2 * ntiles(rows))
        ring = self.stages * units * _UNIT * _WARPS
        sums = _WARPS * 8 * ntiles(rows) * (16 * self.mtiles + 4) * 4
        pitch = -(-inner // 64) * 128 + 64
        return ring + sums + (rows * pitch if normed else 0)

    def fits(self, most_shared_bytes: int, rows: int, inner: int, normed: bool) -> bool:
        """Whether a block may have its shared memory, where it may have so much."""
        return self.shared_bytes(rows, inner, normed) <= most_shared_bytes - _SPARE_BYTES


def ntiles(rows: int) -> int:
    """Eights of rows of x that a kernel is compiled for."""
    return 1 if rows <= 8 else 2 if rows <= 16 else 4


def linear(
    x: Any,
    weight: Any,
    bias: Any | None = None,
    *,
    norm: Any | None = None,
    eps: float = 0.0,
    gate: str | None = None,
    residual: Any | None = None,
    weight_ahead: bool = True,
) -> Any:
    """See `tensorray.kernels.linear.linear`. Without `weight_ahead` a captured launch waits for the
    kernels before it, which may be what writes the weight."""
    rows = as_rows(x)
    weight = as_rows(weight)
    few = 0 < len(rows) <= FEW_ROWS and _streams(weight) and aligned(rows)
    inner = weight.shape[1]
    if norm is not None and not (
        few
        and len(rows) <= FEW_NORMED_ROWS
        and inner <= LONGEST_NORMED_ROW
        and aligned(norm.reshape(1, -1))
    ):
        rows, norm = rms_norm(rows, norm, eps), None
    if few:
        shape = len(weight), inner, len(rows)
        gpu = compiler.multiprocessors(), compiler.most_shared_bytes()
        plan = choose(*shape, norm is not None, gate is not None, *gpu)
        if plan is None and norm is not None:  # normed rows fill the memory of a small GPU's block
            rows, norm = rms_norm(rows, norm, eps), None
            plan = choose(*shape, False, gate is not None, *gpu)
        if plan is not None:
            return few_rows(rows, weight, bias, norm, eps, gate, residual, plan, weight_ahead)
    if gate is not None and bias is None and residual is None:
        own = gated_hopper.plan_for(rows, weight, compiler.multiprocessors())
        if own is not None:
            ahead = weight_ahead and _capturing()
            return gated_hopper.gated_product(rows, weight, gate, own, weight_ahead=ahead)
    y = cublas.matmul(rows, weight)
    if bias is None and gate is None and residual is None:
        return y
    return finish(y, bias, kind=gate, gate=gate is not None, residual=residual)


def few_rows(
    x: Any,
    weight: Any,
    bias: Any | None,
    norm: Any | None,
    eps: float,
    gate: str | None,
    residual: Any | None,
    plan: Plan,
    weight_ahead: bool = True,
) -> Any:
    """`linear` by linear.cu: of up to 32 rows, a 16-bit weight and `in` a multiple of 8."""
    import cupy

    rows, inner = x.shape
    outs = len(weight)
    results = outs // 2 if gate else outs
    base = None if residual is None else as_rows(residual)
    y = cupy.empty((rows, results), weight.dtype if base is None else base.dtype)
    shared_bytes = plan.shared_bytes(rows, inner, norm is not None)
    tile = 16 * plan.mtiles // (2 if gate else 1)
    kernel(x, weight, y, plan, rows, norm is not None, gate is not None, 0, shared_bytes)(
        (min(-(-results // tile), compiler.multiprocessors()),),
        (32 * _WARPS,),
        *(weight, x, norm, bias, base, y, inner, outs, rows, stride(x), stride(base)),
        *(float(eps), KINDS[gate] if gate else 0, weight_ahead and _capturing()),
        *(None, None, 1),
        overlap=True,
    )
    return y


def kernel(
    x: Any,
    weight: Any,
    y: Any,
    plan: Plan,
    rows: int,
    norm: bool,
    gated: bool,
    grouped: int,
    shared_bytes: int,
) -> compiler.Function:
    """linear.cu for a plan and arrays of these dtypes."""
    return compiler.load(
        "linear.cu",
        WEIGHT=ctype(weight),
        INPUT=ctype(x),
        OUTPUT=ctype(y),
        NTILES=ntiles(rows),
        MTILES=plan.mtiles,
        STAGES=plan.stages,
        NORM=norm,
        GATED=gated,
        GROUPED=grouped,
    ).function("few_rows", shared_bytes)


@functools.cache
def choose(
    outs: int,
    inner: int,
    rows: int,
    normed: bool,
    gated: bool,
    multiprocessors: int,
    most_shared_bytes: int,
) -> Plan | None:
    """A plan for a product's shape, on a GPU whose blocks may have so much shared memory; None
    where no plan fits into it. NOTES.md has the times behind the choice."""

    def fits(plan: Plan) -> bool:
        return plan.fits(most_shared_bytes, rows, inner, normed)

    sizes = [m for m in ((4, 2) if gated else (4, 2, 1)) if fits(Plan(m, 2))]
    if not sizes:
        return None
    deepest = 8

    def tiles(mtiles: int) -> int:
        return -(-outs // (16 * mtiles))

    def cost(mtiles: int) -> float:
        """About the time over the weight's own: x is read again for each tile, and the last tiles
        leave some multiprocessors idle."""
        idle = -(-tiles(mtiles) // multiprocessors) * multiprocessors / tiles(mtiles) - 1
        return (1 + 0.25 * rows / (16 * mtiles)) * (1 + 0.3 * math.sqrt(idle))

    if 2 * outs * inner <= _SMALL_WEIGHT:
        # A block has all of its weights on the way at once, and blocks are few: the next launch's
        # find multiprocessors free, and do the same while these compute.
        fitting = [
            m for m in sizes if 32 * m * inner <= _SMALL_TILE and 3 * tiles(m) >= multiprocessors
        ]
        mtiles = fitting[0] if fitting else sizes[-1]
        deepest = max(-(-inner // (64 * _WARPS)), 2)
    else:
        mtiles = min(sizes, key=cost)
    return [p for p in (Plan(mtiles, stages) for stages in range(2, deepest + 1)) if fits(p)][-1]


def _streams(weight: Any) -> bool:
    """Whether linear.cu takes a weight."""
    inner = weight.shape[1]
    contiguous: bool = weight.flags.c_contiguous
    return weight.itemsize == 2 and inner % 8 == 0 and inner > 0 and contiguous and aligned(weight)


def _capturing() -> bool:
    """Whether CuPy's current stream is being captured."""
    import cupy

    capturing: bool = cupy.cuda.get_current_stream().is_capturing()
    return capturing
