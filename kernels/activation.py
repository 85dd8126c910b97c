"""Elementwise activations. Each returns a new array of x's shape and dtype, finite for finite x."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def silu(x: Any) -> Any:
    """`x * sigmoid(x)`."""
    small = np.exp(-np.abs(x))  # in (0, 1]: no overflow on either side
    return x * np.where(x >= 0, 1.0, small).astype(x.dtype, copy=False) / (1.0 + small)


def gelu_tanh(x: Any) -> Any:
    """GELU, tanh approximation (Hendrycks & Gimpel, arXiv 1606.08415)."""
    with np.errstate(over="ignore"):  # an infinite argument still has a tanh of one
        inner = math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x)
    return 0.5 * x * (1.0 + np.tanh(inner))


def softcap(x: Any, cap: float) -> Any:
    """`cap * tanh(x / cap)` (Gemma 2, arXiv 2408.00118)."""
    return cap * np.tanh(x / cap)
