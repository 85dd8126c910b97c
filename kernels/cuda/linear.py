"""Linear layers: a kernel that streams the weight once for few rows, cuBLAS for many."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from tensorray.kernels.cuda import compiler, cublas
from tensorray.kernels.cuda.activation import KINDS, finish
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.layout import aligned, as_rows, stride
from tensorray.kernels.cuda.norm import rms_norm

_HALF = {"WEIGHT": "__half", "INPUT": "__half", "OUTPUT": "__half", "MTILES": 2, "STAGES": 2}
_WIDE = {"WEIGHT": "__nv_bfloat16", "INPUT": "float", "OUTPUT": "float", "MTILES": 1, "STAGES": 4}
CONSTANT_SETS = {
    "linear.cu": [
        dict(_HALF, NTILES=1, TEAM=8, RESIDENT=1, NORM=1, GATED=1, GROUPED=0),
        dict(_HALF, NTILES=2, TEAM=4, RESIDENT=0, NORM=0, GATED=0, GROUPED=0),
        dict(_WIDE, NTILES=1, TEAM=1, RESIDENT=1, NORM=1, GATED=0, GROUPED=0),
        dict(_HALF, NTILES=1, TEAM=8, RESIDENT=0, NORM=0, GATED=1, GROUPED=1),
        dict(_HALF, NTILES=4, TEAM=8, RESIDENT=0, NORM=0, GATED=0, GROUPED=2),
    ]
}

#: With more rows cuBLAS is faster, or nearly so.
FEW_ROWS = 16
#: With more rows a norm is a launch of its own: each block of the product would repeat it.
FEW_NORMED_ROWS = 4

# As in linear.cu.
_WARPS, _CHUNK, _UNIT = 8, 64, 512
_SHARED_BYTES = 227 * 1024  # of a multiprocessor, all of its blocks together
_RESERVED_BYTES = 1024  # what the driver adds to each block's


@dataclass(frozen=True)
class Plan:
    """How a product of few rows is cut up."""

    mtiles: int  # sixteens of outputs made at a time
    team: int  # warps that share the sum over `in`
    stages: int  # chunks on their way at once
    blocks: int  # at most so many on a multiprocessor
    resident: bool  # whether all of x lies in shared memory

    def shared_bytes(self, rows: int, inner: int) -> int:
        """Shared memory of a block."""
        units = 4 * self.mtiles + (0 if self.resident else 2 * ntiles(rows))
        ring = self.stages * units * _UNIT * _WARPS
        sums = _WARPS * 8 * ntiles(rows) * (16 * self.mtiles + 4) * 4
        pitch = -(-inner // _CHUNK) * 2 * _CHUNK + 64
        return ring + sums + (rows * pitch if self.resident else 0)


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
) -> Any:
    """See `tensorray.kernels.linear.linear`."""
    rows = as_rows(x)
    weight = as_rows(weight)
    plan = None
    if 0 < len(rows) <= FEW_ROWS and _streams(weight) and aligned(rows):
        plan = choose(*weight.shape, len(rows), gate is not None)
    if norm is not None and not (
        plan is not None
        and plan.resident
        and len(rows) <= FEW_NORMED_ROWS
        and aligned(norm.reshape(1, -1))
    ):
        rows, norm = rms_norm(rows, norm, eps), None
    if plan is not None:
        return few_rows(rows, weight, bias, norm, eps, gate, residual, plan)
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
) -> Any:
    """`linear` by linear.cu: of up to 32 rows, a 16-bit weight and `in` a multiple of 8."""
    import cupy

    rows, inner = x.shape
    outs = len(weight)
    results = outs // 2 if gate else outs
    base = None if residual is None else as_rows(residual)
    y = cupy.empty((rows, results), weight.dtype if base is None else base.dtype)
    shared_bytes = plan.shared_bytes(rows, inner)
    tile = 16 * plan.mtiles // (2 if gate else 1) * (_WARPS // plan.team)
    kernel(x, weight, y, plan, rows, norm is not None, gate is not None, 0, shared_bytes)(
        (min(-(-results // tile), multiprocessors(y.device.id) * plan.blocks),),
        (32 * _WARPS,),
        *(weight, x, norm, bias, base, y, inner, outs, rows, stride(x), stride(base)),
        *(float(eps), KINDS[gate] if gate else 0, _capturing(), None, None, 1),
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
        TEAM=plan.team,
        STAGES=plan.stages,
        RESIDENT=plan.resident,
        NORM=norm,
        GATED=gated,
        GROUPED=grouped,
    ).function("few_rows", shared_bytes)


def choose(outs: int, inner: int, rows: int, gated: bool) -> Plan:
    """A plan for a product's shape."""
    mtiles = 2 if gated or outs >= 4096 else 1
    plan = Plan(mtiles, team=8, stages=4 // mtiles, blocks=2, resident=False)
    resident = replace(plan, resident=True)
    return resident if resident.shared_bytes(rows, inner) <= _SHARED_BYTES // 2 else plan


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


@functools.cache
def multiprocessors(device: int) -> int:
    import cupy

    count: int = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
    return count
