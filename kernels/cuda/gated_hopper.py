"""Gated products of more than few rows on Hopper: gated_hopper.cu, cut up to suit their shapes.

cuBLAS writes twice as many outputs as there are results, and a kernel for the gate reads them; here
both are one launch, which starts on its weight before the kernel ahead has ended.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.activation import KINDS
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.hopper import MMA_TYPES, is_hopper, tensor_map
from tensorray.kernels.cuda.layout import aligned
from tensorray.kernels.threads import cores

# As in gated_hopper.cu.
_CHUNK = 64
_LINE = 2 * _CHUNK
_WARPGROUP = 128
_PACK = 8
_SHARED_BYTES = 227 * 1024
_MOST_STAGES = 8


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
        Plan(64, 112, stages=8).constants("__half"),
    ]
}


def plan_for(x: Any, weight: Any, multiprocessors: int) -> Plan | None:
    """How to make a gated product of two CuPy arrays; None if that is not for this kernel."""
    if not (len(x) > 0 and x.dtype == weight.dtype and aligned(x) and _takes(weight)):
        return None
    return _plan(len(x), weight, multiprocessors)


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


def compile_ahead(products: Iterable[tuple[Any, int]]) -> None:
    """Compile what products with these weights, of so many rows each, need, on all cores: a start
    would wait for one after another."""
    wanted: dict[tuple[tuple[str, int | str], ...], None] = {}
    for weight, rows in products:
        plan = _plan(rows, weight, compiler.multiprocessors()) if _takes(weight) else None
        if plan is not None:
            wanted[tuple(plan.constants(ctype(weight)).items())] = None
    if not wanted:
        return
    arch = compiler.device_arch()

    def compile_one(constants: tuple[tuple[str, int | str], ...]) -> None:
        compiler.compile("gated_hopper.cu", arch, **dict(constants))

    with ThreadPoolExecutor(min(len(wanted), cores())) as pool:
        list(pool.map(compile_one, wanted))


def _plan(rows: int, weight: Any, multiprocessors: int) -> Plan | None:
    shape = len(weight) // 2, weight.shape[1], multiprocessors
    plan = choose(rows, *shape)
    return plan if pays(plan, rows, *shape) else None


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


# Microseconds that a tile of so many rows and outputs takes for a chunk of 64 columns, on an H200.
# With tiles of other shapes no product that was measured took less.
_CHUNK_MICROSECONDS = {
    **{(64, 112): 0.25, (64, 224): 0.48},
    **{(128, 96): 0.30, (128, 112): 0.45, (128, 176): 0.49, (128, 224): 0.66},
    **{(256, 160): 0.92, (256, 176): 0.98, (256, 192): 1.10},
}
_BEGIN_AND_END = 3.0  # of a tile
_MEMORY_BYTES = 32.3e3  # a microsecond, a multiprocessor's share
_OWN_BYTES = 42e3  # what one takes in where others are idle
_CYCLES = 1330  # a microsecond, of a large product
# What cuBLAS takes beyond work that comes out even, in tiles of 64 rows, and a kernel for the gate.
_CUBLAS, _LAUNCHES = 1.05, 5.0


def pays(plan: Plan, rows: int, results: int, inner: int, multiprocessors: int) -> bool:
    """Whether cuBLAS and a kernel for the gate would take longer."""
    cycles = -(-inner // _CHUNK) * -(-rows // 64) * 64 * 2 * results / 32
    even = max(cycles / _CYCLES, _bytes(results, inner) / _MEMORY_BYTES) / multiprocessors
    theirs = _CUBLAS * (even + _LAUNCHES)
    return microseconds(plan, rows, results, inner, multiprocessors) < theirs


def microseconds(plan: Plan, rows: int, results: int, inner: int, multiprocessors: int) -> float:
    """About what a product takes: so many waves of a tile's time, or reading its weight."""
    chunk = max(
        _CHUNK_MICROSECONDS[plan.rows, plan.outs],
        _LINE * plan.outs / -(-rows // plan.rows) / _OWN_BYTES,
    )
    waves = -(-plan.blocks(rows, results) // multiprocessors)
    return max(
        waves * (-(-inner // _CHUNK) * chunk + _BEGIN_AND_END),
        _bytes(results, inner) / _MEMORY_BYTES / multiprocessors + _BEGIN_AND_END,
    )


def _bytes(results: int, inner: int) -> int:
    return 2 * 2 * results * inner


@functools.cache
def choose(rows: int, results: int, inner: int, multiprocessors: int) -> Plan:
    """The plan that takes least; of those that take the same, the one with the fewest tiles."""

    def cost(plan: Plan) -> tuple[float, int]:
        taken = microseconds(plan, rows, results, inner, multiprocessors)
        return round(taken, 3), plan.blocks(rows, results)

    return min(plans(), key=cost)


@functools.cache
def plans() -> tuple[Plan, ...]:
    """All there are, with as many stages as fit."""
    found = []
    for rows, outs in _CHUNK_MICROSECONDS:
        stage = Plan(rows, outs, stages=1).shared_bytes - 1024
        found.append(Plan(rows, outs, min((_SHARED_BYTES - 1024) // stage, _MOST_STAGES)))
    return tuple(found)
