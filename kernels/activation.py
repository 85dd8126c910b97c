"""Elementwise activations. Each returns a new array of x's shape and dtype, finite for finite x."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tensorray.kernels import native


def silu(x: Any) -> Any:
    """`x * sigmoid(x)`."""
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
    if not _native_takes(x):
        return softcap_numpy(x, cap)
    y = np.empty(x.shape, np.float32)
    native.library.softcap(x, cap, y)
    return y


def softcap_numpy(x: Any, cap: float) -> Any:
    """The twin of `softcap`."""
    return cap * np.tanh(x / cap)


def _native_takes(x: Any) -> bool:
    return native.takes(x) and 1 <= x.ndim <= 3
