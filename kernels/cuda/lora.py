"""Low-rank additions by each row's own adapter: what kernels/lora.py says, on CuPy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.dtypes import ctype, expect
from tensorray.kernels.cuda.layout import aligned, as_rows, stride

if TYPE_CHECKING:
    from tensorray.kernels.lora import Stack

_FEW: dict[str, int | str] = {"ROWS": 1, "RANKS": 2, "THREADS": 256}
_MANY: dict[str, int | str] = {"ROWS": 8, "RANKS": 8, "THREADS": 128}
CONSTANT_SETS = {
    "lora.cu": [
        {"ELEMENT": "__half", "VEC": 8, "OUTS": 1, **_FEW},
        {"ELEMENT": "__nv_bfloat16", "VEC": 8, "OUTS": 4, **_MANY},
        {"ELEMENT": "float", "VEC": 1, "OUTS": 1, **_MANY},
        {"ELEMENT": "float", "VEC": 8, "OUTS": 4, **_MANY},
    ]
}

# Up to here, every row has blocks of its own: decodes have different adapters, and few blocks.
_FEW_ROWS = 64
_OUTS = 4


def shrink(x: Any, stack: Stack, slots: Any) -> Any:
    """See `tensorray.kernels.lora.shrink`."""
    import cupy

    x = as_rows(x)
    rows, inner = x.shape
    _check(x, stack, slots)
    most = stack.b.shape[2]
    width = stack.a.shape[1]
    made = cupy.empty((rows, width), "float32")
    wide = inner % 8 == 0 and aligned(x) and aligned(stack.a[:, 0])
    constants = _constants(rows)
    _load(x, 8 if wide else 1, constants).function("shrink")(
        (-(-rows // int(constants["ROWS"])), width // int(constants["RANKS"])),
        (int(constants["THREADS"]),),
        *(x, stack.a, stack.ranks, slots, made, rows, inner, width // most, most),
        *(stride(x), stride(stack.a), stride(stack.ranks)),
        overlap=True,
    )
    return made


def expand(y: Any, inner: Any, stack: Stack, slots: Any) -> None:
    """See `tensorray.kernels.lora.expand`; y's rows must be dense."""
    rows, outs = y.shape
    _check(y, stack, slots)
    expect("float32", inner=inner)
    most = stack.b.shape[2]
    constants = _constants(rows)
    threads = int(constants["THREADS"])
    # Few rows need all the blocks there can be.
    several = rows > _FEW_ROWS and stack.grain % _OUTS == 0 and aligned(y[:, :1])
    each = _OUTS if several else 1
    _load(y, 8, constants, each).function("expand")(
        (-(-outs // (threads * each)), -(-rows // int(constants["ROWS"]))),
        (threads,),
        *(y, inner, stack.b, stack.ranks, slots, stack.starts, rows, outs),
        *(stack.a.shape[1] // most, most, stride(y), stride(stack.b), stride(stack.ranks)),
        overlap=True,
    )


def _constants(rows: int) -> dict[str, int | str]:
    return _FEW if rows <= _FEW_ROWS else _MANY


def _load(x: Any, vec: int, constants: dict[str, int | str], outs: int = 1) -> compiler.Module:
    return compiler.load("lora.cu", None, ELEMENT=ctype(x), VEC=vec, OUTS=outs, **constants)


def _check(rows: Any, stack: Stack, slots: Any) -> None:
    expect(rows.dtype, a=stack.a, b=stack.b)
    expect("int32", slots=slots, ranks=stack.ranks, starts=stack.starts)
    if len(slots) != len(rows):
        raise ValueError(f"{len(slots)} slots for {len(rows)} rows")
