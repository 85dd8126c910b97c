"""Elementwise functions, in one pass over memory each."""

from __future__ import annotations

from typing import Any

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.layout import as_rows, stride, vector

#: Activations as activation.cuh numbers them.
KINDS = {"silu": 1, "gelu_tanh": 2, "softcap": 3}

_HALF = {"INPUT": "__half", "OUTPUT": "__half", "VEC": 8}
CONSTANT_SETS = {
    "activation.cu": [
        {**_HALF, "KIND": 1, "GATED": 1},
        {**_HALF, "KIND": 3, "GATED": 0},
        {"INPUT": "__nv_bfloat16", "OUTPUT": "float", "VEC": 8, "KIND": 0, "GATED": 0},
        {"INPUT": "float", "OUTPUT": "float", "VEC": 1, "KIND": 2, "GATED": 1},
    ]
}

_THREADS = 256
# As many as it holds at once; each goes on to further elements.
_BLOCKS_PER_PROCESSOR = 4


def silu(x: Any) -> Any:
    """See `tensorray.kernels.activation.silu`."""
    return finish(x, kind="silu")


def gelu_tanh(x: Any) -> Any:
    """See `tensorray.kernels.activation.gelu_tanh`."""
    return finish(x, kind="gelu_tanh")


def softcap(x: Any, cap: float) -> Any:
    """See `tensorray.kernels.activation.softcap`."""
    return finish(x, kind="softcap", cap=cap)


def gated(gate_up: Any, kind: str) -> Any:
    """See `tensorray.kernels.activation.gated`."""
    return finish(gate_up, kind=kind, gate=True)


def add(x: Any, delta: Any) -> Any:
    """See `tensorray.kernels.activation.add`."""
    return finish(delta, residual=x)


def finish(
    x: Any,
    bias: Any | None = None,
    *,
    kind: str | None = None,
    gate: bool = False,
    cap: float = 0.0,
    residual: Any | None = None,
) -> Any:
    """`residual + f(x + bias)` over the last axis, in the residual's dtype, else x's.

    f is the activation `kind`; with `gate` it acts on the first half of the columns, and the second
    half is multiplied by that.
    """
    import cupy

    rows = as_rows(x)
    columns = rows.shape[1]
    columns //= 2 if gate else 1
    base = None if residual is None else as_rows(residual)
    out = cupy.empty((*x.shape[:-1], columns), x.dtype if base is None else base.dtype)
    vec = vector(columns, rows, base, bias)
    module = compiler.load(
        "activation.cu",
        INPUT=ctype(x),
        OUTPUT=ctype(out),
        KIND=KINDS.get(kind or "", 0),
        GATED=gate,
        VEC=vec,
    )
    packs = out.size // vec
    module.function("elementwise")(
        (min(-(-packs // _THREADS), _most_blocks()),),
        (_THREADS,),
        *(rows, bias, base, out, columns, packs),
        *(stride(rows), stride(base), float(cap)),
        overlap=True,
    )
    return out


def _most_blocks() -> int:
    return _BLOCKS_PER_PROCESSOR * compiler.multiprocessors()
