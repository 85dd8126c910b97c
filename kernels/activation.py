"""Elementwise functions. Each returns a new array of x's dtype, finite for finite x."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from tensorray.kernels import native
from tensorray.kernels.device import is_cuda

#: The activations that a gate may have.
Gate = Literal["silu", "gelu_tanh"]


def silu(x: Any) -> Any:
    """`x * sigmoid(x)`."""
    if is_cuda(x):
        from tensorray.kernels.cuda import activation as cuda

        return cuda.silu(x)
    if not _native_takes(x):
        return silu_numpy(x)
    y = np.empty(x.shape, np.float32)
    native.library.silu(x, y)
    return y


def silu_numpy(x: Any) -> Any:
    """The twin of `silu`."""
    small = np.exp(-np.abs(x))  # in (0, 1]: no overflow on either side
    return x * np.where(x >= 0, 1.0, small).astype(x.dtype, copy=False) / (1.0 + small)


def gelu_tanh(x: Any) -> Any:
    """GELU, tanh approximation (Hendrycks & Gimpel, arXiv 1606.08415)."""
    if is_cuda(x):
        from tensorray.kernels.cuda import activation as cuda

        return cuda.gelu_tanh(x)
    if not _native_takes(x):
        return gelu_tanh_numpy(x)
    y = np.empty(x.shape, np.float32)
    native.library.gelu_tanh(x, y)
    return y


def gelu_tanh_numpy(x: Any) -> Any:
    """The twin of `gelu_tanh`."""
    with np.errstate(over="ignore"):  # an infinite argument still has a tanh of one
        inner = math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x)
    return 0.5 * x * (1.0 + np.tanh(inner))


def softcap(x: Any, cap: float) -> Any:
    """`cap * tanh(x / cap)` (Gemma 2, arXiv 2408.00118)."""
    if is_cuda(x):
        from tensorray.kernels.cuda import activation as cuda

        return cuda.softcap(x, cap)
    if not _native_takes(x):
        return softcap_numpy(x, cap)
    y = np.empty(x.shape, np.float32)
    native.library.softcap(x, cap, y)
    return y


def softcap_numpy(x: Any, cap: float) -> Any:
    """The twin of `softcap`."""
    return cap * np.tanh(x / cap)


def gated(gate_up: Any, kind: Gate) -> Any:
    """`kind(gate) * up` (Shazeer, arXiv 2002.05202): `[T, 2 * inner]`, gate columns first, to
    `[T, inner]`."""
    if is_cuda(gate_up):
        from tensorray.kernels.cuda import activation as cuda

        return cuda.gated(gate_up, kind)
    inner = gate_up.shape[-1] // 2
    activate = silu if kind == "silu" else gelu_tanh
    return activate(gate_up[..., :inner]) * gate_up[..., inner:]


def gated_numpy(gate_up: Any, kind: Gate) -> Any:
    """The twin of `gated`."""
    inner = gate_up.shape[-1] // 2
    activate = silu_numpy if kind == "silu" else gelu_tanh_numpy
    return activate(gate_up[..., :inner]) * gate_up[..., inner:]


def add(x: Any, delta: Any) -> Any:
    """`x + delta`, of one shape `[..., n]`, in x's dtype, which may be the wider one."""
    if is_cuda(x):
        from tensorray.kernels.cuda import activation as cuda

        return cuda.add(x, delta)
    return add_numpy(x, delta)


def add_numpy(x: Any, delta: Any) -> Any:
    """The twin of `add`."""
    return (x + delta).astype(x.dtype, copy=False)


def _native_takes(x: Any) -> bool:
    return native.takes(x) and 1 <= x.ndim <= 3
