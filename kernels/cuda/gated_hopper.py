"""Gated products of some rows on Hopper: gated_hopper.cu, cut up to suit a product's shape.

cuBLAS writes twice as many outputs as there are results, and a kernel for the gate reads them; here
both are one launch, which starts on its weight before the kernel ahead has ended.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.activation import KINDS
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.hopper import MMA_TYPES, is_hopper, tensor_map
from tensorray.kernels.cuda.layout import aligned

#: More rows are cuBLAS's: not measured yet.
MOST_ROWS = 256

# As in gated_hopper.cu.
_CHUNK = 64
_LINE = 2 * _CHUNK
_WARPGROUP = 128
_PACK = 8
_SHARED_BYTES = 227 * 1024
_MOST_STAGES = 8
# Outputs of a tile, by its rows: what there are instructions for, and registers.
_OUTS = {64: range(96, 225, 16), 128: range(96, 225, 16), 256: range(96, 193, 16)}


@dataclass(frozen=True)
class Plan:
    """How a product is cut up: tiles, of which a block makes one."""

    rows: int
    outs: int  # results, and as many outputs that gate them
    stages: int  # chunks of 64 columns that are on their way at once

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the ring, its barriers, room to align them."""
        return self.stages * ((self.rows + self.outs) * _LINE + 16) + 1024

    def blocks(self, rows: int, results: int) -> int:
        return -(-rows // self.rows) * -(-2 * results // self.outs)

    def constants(self, element: str) -> dict[str, int | str]:
        """Of gated_hopper.cu, for a C++ type."""
        return {
            **{"ELEMENT": element, "MMA_TYPE": MMA_TYPES[element]},
            **{"ROWS": self.rows, "OUTS": self.outs, "STAGES": self.stages},
        }


CONSTANT_SETS = {
    "gated_hopper.cu": [
        Plan(256, 192, stages=3).constants("__half"),
        Plan(128, 224, stages=5).constants("__nv_bfloat16"),
        Plan(64, 144, stages=8).constants("__half"),
    ]
}


def plan_for(x: Any, weight: Any, multiprocessors: int) -> Plan | None:
    """How to make a gated product of two CuPy arrays; None if that is not for this kernel."""
    if not (0 < len(x) <= MOST_ROWS and x.dtype == weight.dtype and aligned(x) and _takes(weight)):
        return None
    plan = choose(len(x), len(weight) // 2, weight.shape[1], multiprocessors)
    return plan if pays(plan, len(x), len(weight) // 2, weight.shape[1], multiprocessors) else None


def gated_product(x: Any, weight: Any, gate: str, plan: Plan, *, weight_ahead: bool) -> Any:
    """`gated(x @ weight.T, gate)`, rounded once: x `[T, in]`, weight `[2 * results, in]`, the
    gate's rows first -> new `[T, results]`. With `weight_ahead` the weight is read before the
    kernel ahead has ended."""
    import cupy

    (rows, inner), results = x.shape, len(weight) // 2
    y = cupy.empty((rows, results), x.dtype)
    pitch = x.strides[0] if rows > 1 else inner * x.itemsize
    x_map = tensor_map(x.data.ptr, 2, (inner, rows), (pitch,), (_CHUNK, plan.rows))
    weight_map = tensor_map(
        weight.data.ptr, 2, (inner, 2 * results), (2 * inner,), (_CHUNK, plan.outs // 2)
    )
    module = compiler.load("gated_hopper.cu", None, **plan.constants(ctype(x)))
    module.function("gated_product", plan.shared_bytes)(
        (plan.blocks(rows, results),),
        (_WARPGROUP * (2 if plan.rows == 64 else 3),),
        *(x_map, weight_map, y, inner, results, rows, KINDS[gate], weight_ahead),
        overlap=True,
    )
    return y


def compile_ahead(weights: Iterable[Any]) -> None:
    """Compile what products with these weights need, on all cores: a start would wait for one
    after another."""
    wanted: dict[tuple[tuple[str, int | str], ...], None] = {}
    for weight in filter(_takes, weights):
        shape = len(weight) // 2, weight.shape[1], compiler.multiprocessors()
        for rows in range(_CHUNK, MOST_ROWS + 1, _CHUNK):
            plan = choose(rows, *shape)
            if pays(plan, rows, *shape):
                wanted[tuple(plan.constants(ctype(weight)).items())] = None
    if not wanted:
        return
    arch = compiler.device_arch()

    def compile_one(constants: tuple[tuple[str, int | str], ...]) -> None:
        compiler.compile("gated_hopper.cu", arch, **dict(constants))

    with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, wanted))


def _takes(weight: Any) -> bool:
    """Whether the kernel can read a weight, a CuPy array."""
    return (
        is_hopper(weight.device.id)
        and weight.itemsize == 2
        and weight.shape[1] > 0
        and weight.shape[1] % _PACK == 0
        and len(weight) > 0
        and len(weight) % (2 * _PACK) == 0
        and bool(weight.flags.c_contiguous)
        and aligned(weight)
    )


# Microseconds and an H200's multiprocessor, from products of 4096 columns, weights not in the L2
# cache: 28672 outputs take 59.0 in one wave of 64 x 224, 62.5 of 128 x 224 and 90.6 in two of
# 256 x 112; 6144 take 32.5 in half a wave of 256 x 96. Cycles are what is left of them at the rate
# of a large product.
_CYCLES = 1330
_MEMORY_BYTES = 32.6e3  # its share
_INTO_BYTES = 72e3  # from the L2 cache
_BEGIN_AND_END = 3.0
# cuBLAS and a kernel for the gate take 1.19 (64 rows), 1.34 (128) and 1.30 (256) times what work
# that comes out even would take for 28672 x 4096, and 2.1 for 6144 x 1024 at 256 rows, where this
# kernel takes 2.5.
_PAYS = 1.2


def pays(plan: Plan, rows: int, results: int, inner: int, multiprocessors: int) -> bool:
    """Whether cuBLAS and a kernel for the gate would take longer.

    cuBLAS's tiles have 128 rows or so: fewer in the last one are no less work for it, either.
    """
    outs, chunks = 2 * results, -(-inner // _CHUNK)
    cycles = chunks * _products(-(-rows // 128) * 128, outs)
    even = max(cycles / _CYCLES, chunks * _LINE * outs / _MEMORY_BYTES) / multiprocessors
    return microseconds(plan, rows, results, inner, multiprocessors) <= _PAYS * even


def microseconds(plan: Plan, rows: int, results: int, inner: int, multiprocessors: int) -> float:
    """About what a product takes: so many waves of a tile's time."""
    chunks = -(-inner // _CHUNK)
    ways = (
        _products(plan.rows, plan.outs) / _CYCLES,
        _LINE * (plan.rows + plan.outs) / _INTO_BYTES,
        _LINE * plan.outs / -(-rows // plan.rows) / _MEMORY_BYTES,
    )
    waves = -(-plan.blocks(rows, results) // multiprocessors)
    return waves * (chunks * max(ways) + _BEGIN_AND_END)


def _products(rows: int, outs: int) -> float:
    """Cycles of a multiprocessor's tensor cores for a chunk of 64 columns."""
    return rows * outs / 32


@functools.cache
def choose(rows: int, results: int, inner: int, multiprocessors: int) -> Plan:
    """The plan that takes least; of those that take the same, the one that reads least."""

    def cost(plan: Plan) -> tuple[float, int, int]:
        taken = microseconds(plan, rows, results, inner, multiprocessors)
        return round(taken, 3), -(-rows // plan.rows), plan.rows + plan.outs

    return min(plans(), key=cost)


@functools.cache
def plans() -> tuple[Plan, ...]:
    """All there are, with as many stages as fit."""
    found = []
    for rows, widths in _OUTS.items():
        for outs in widths:
            stage = Plan(rows, outs, stages=1).shared_bytes - 1024
            stages = min((_SHARED_BYTES - 1024) // stage, _MOST_STAGES)
            found.append(Plan(rows, outs, stages))
    return tuple(found)
