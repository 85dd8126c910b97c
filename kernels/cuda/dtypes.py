"""Array dtypes as CUDA C++ types."""

from __future__ import annotations

from typing import Any

# Pages of 8 bits hold float8_e4m3fn; CuPy has no such dtype, so uint8 stands for it as well.
_TYPES = {
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float8_e4m3fn": "__nv_fp8_e4m3",
    "uint8": "__nv_fp8_e4m3",
}


def ctype(x: Any) -> str:
    """The C++ type of an array's elements. Raises TypeError for one that no kernel takes."""
    name: str = x.dtype.name
    known = _TYPES.get(name)
    if known is None:
        raise TypeError(f"CUDA kernels take {', '.join(_TYPES)} arrays, not {name}")
    return known


def expect(dtype: str, **arrays: Any) -> None:
    """Raise TypeError for an array of another dtype, which a kernel would misread; None is fine."""
    for name, x in arrays.items():
        if x is not None and x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, not {x.dtype}")
