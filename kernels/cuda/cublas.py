"""Matrix products by cuBLAS, which CuPy does not call while a stream is being captured.

A handle a device keeps its own workspace: the one that cuBLAS would allocate by itself becomes part
of every captured graph. A handle is made on first use, which must come before a capture.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

# cudaDataType_t and cublasComputeType_t.
_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
_COMPUTE_FLOAT32 = 68
_TRANSPOSED, _AS_IS = 1, 0
_DEFAULT_ALGORITHM = -1
_NO_REDUCED_PRECISION_SUMS = 16  # partial sums stay in float32, too
_WORKSPACE_BYTES = 32 << 20  # what NVIDIA recommends for Hopper


class CublasError(RuntimeError):
    """cuBLAS refused a call."""


def matmul(x: Any, weight: Any) -> Any:
    """`x @ weight.T`, summed in float32: x `[T, in]`, weight `[out, in]` of one dtype, each row
    contiguous -> new `[T, out]`. Raises CublasError."""
    import cupy

    (rows, inner), out = x.shape, len(weight)
    y = cupy.empty((rows, out), x.dtype)
    if not y.size:
        return y
    if not inner:
        y.fill(0)
        return y
    library, handle, workspace = _handle(cupy.cuda.runtime.getDevice())
    kind = _TYPES[x.dtype.name]
    stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)
    _check(library.cublasSetStream_v2(handle, stream))
    address, size = ctypes.c_void_p(workspace.ptr), ctypes.c_size_t(_WORKSPACE_BYTES)
    # Setting a stream resets the workspace.
    _check(library.cublasSetWorkspace_v2(handle, address, size))
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    # cuBLAS counts by columns: to it these are weight [in, out], x [in, T] and y [out, T].
    _check(
        library.cublasGemmEx(
            *(handle, _TRANSPOSED, _AS_IS, out, rows, inner, ctypes.byref(one)),
            *(_pointer(weight), kind, _pitch(weight), _pointer(x), kind, _pitch(x)),
            *(ctypes.byref(zero), _pointer(y), kind, out, _COMPUTE_FLOAT32, _DEFAULT_ALGORITHM),
        )
    )
    return y


@functools.cache
def _handle(device: int) -> tuple[ctypes.CDLL, ctypes.c_void_p, Any]:
    """The library, a handle and its workspace."""
    import cupy
    from cuda import pathfinder

    library = ctypes.CDLL(pathfinder.load_nvidia_dynamic_lib("cublas").abs_path)
    handle = ctypes.c_void_p()
    _check(library.cublasCreate_v2(ctypes.byref(handle)))
    _check(library.cublasSetMathMode(handle, _NO_REDUCED_PRECISION_SUMS))
    # Outside of CuPy's pools: it lives as long as the process.
    return library, handle, cupy.cuda.Memory(_WORKSPACE_BYTES)


def _pointer(x: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data.ptr)


def _pitch(x: Any) -> int:
    """Elements from one row to the next."""
    pitch: int = x.strides[0] // x.itemsize if len(x) > 1 else x.shape[1]
    return pitch


def _check(status: int) -> None:
    if status:
        raise CublasError(f"cuBLAS: status {status} (cublasStatus_t)")
