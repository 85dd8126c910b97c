"""Linear layers: a kernel that streams the weight once for few rows, cuBLAS for many."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tensorray.kernels.cuda import compiler, cublas
from tensorray.kernels.cuda.activation import KINDS, finish
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.layout import aligned, as_rows, stride
from tensorray.kernels.cuda.norm import rms_norm

_HALF = {"WEIGHT": "__half", "INPUT": "__half", "OUTPUT": "__half"}
_WIDE = {"WEIGHT": "__nv_bfloat16", "INPUT": "float", "OUTPUT": "float"}
CONSTANT_SETS = {
    "linear.cu": [
        {**_HALF, "NTILES": 1, "MTILES": 2, "STAGES": 2, "NORM": 1, "GATED": 1},
        {**_HALF, "NTILES": 2, "MTILES": 2, "STAGES": 2, "NORM": 0, "GATED": 0},
        {**_WIDE, "NTILES": 1, "MTILES": 1, "STAGES": 4, "NORM": 1, "GATED": 0},
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

    mtiles: int  # sixteens of outputs a block makes at a time
    splits: int  # blocks (a cluster) that share the sum over `in`
    stages: int  # chunks on their way at once


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
    few = 0 < len(rows) <= FEW_ROWS and _streams(weight)
    if norm is not None and not (
        few and len(rows) <= FEW_NORMED_ROWS and aligned(rows) and aligned(norm.reshape(1, -1))
    ):
        rows, norm = rms_norm(rows, norm, eps), None
    if few and aligned(rows):
        plan = choose(len(weight), weight.shape[1], len(rows), gate is not None)
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
    ntiles = 1 if rows <= 8 else 2 if rows <= 16 else 4
    units = 4 * plan.mtiles + ntiles * x.itemsize + (0 if norm is None else 2)
    ring = plan.stages * units * _UNIT * _WARPS
    sums = _WARPS * 8 * ntiles * (16 * plan.mtiles + 4) * 4
    shared_bytes = ring + sums
    function = compiler.load(
        "linear.cu",
        WEIGHT=ctype(weight),
        INPUT=ctype(x),
        OUTPUT=ctype(y),
        NTILES=ntiles,
        MTILES=plan.mtiles,
        STAGES=plan.stages,
        NORM=norm is not None,
        GATED=gate is not None,
    ).function("few_rows", shared_bytes)
    tiles = -(-results // (16 * plan.mtiles // (2 if gate else 1)))
    at_once = _multiprocessors(y.device.id) * (_SHARED_BYTES // (shared_bytes + _RESERVED_BYTES))
    function(
        (min(tiles, max(at_once // plan.splits, 1)) * plan.splits,),
        (32 * _WARPS,),
        *(weight, x, norm, bias, base, y, inner, outs, rows, stride(x), stride(base)),
        *(float(eps), KINDS[gate] if gate else 0, _capturing()),
        cluster=(plan.splits,) if plan.splits > 1 else None,
        overlap=True,
    )
    return y


def choose(outs: int, inner: int, rows: int, gated: bool) -> Plan:
    """A plan for a product's shape."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    mtiles = 2 if gated or outs >= 32 * _multiprocessors(device) // 2 else 1
    tiles = -(-outs // (16 * mtiles))
    splits = 1
    if _clusters(device):
        rounds = -(-inner // (_CHUNK * _WARPS))
        while splits < 8 and tiles * splits < _multiprocessors(device) and rounds > splits:
            splits *= 2
    return Plan(mtiles, splits, stages=2 if mtiles == 2 else 4)


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
def _multiprocessors(device: int) -> int:
    import cupy

    count: int = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
    return count


@functools.cache
def _clusters(device: int) -> bool:
    import cupy

    return int(cupy.cuda.Device(device).compute_capability) >= 90
