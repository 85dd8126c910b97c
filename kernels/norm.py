"""Norms over the last axis, statistics in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels import native


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """`x / sqrt(mean(x * x) + eps) * weight` over the last axis (arXiv 1910.07467).

    x `[..., n]` of any leading shape, weight `[n]` -> a new array of x's shape and dtype.
    """
    if not (native.takes(x) and x.ndim <= 3):
        return rms_norm_numpy(x, weight, eps)
    y = np.empty(x.shape, np.float32)
    native.library.rms_norm(x, weight, eps, y)
    return y


def rms_norm_numpy(x: Any, weight: Any, eps: float) -> Any:
    """The twin of `rms_norm`."""
    wide = x.astype(np.float32, copy=False)
    scale = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps))
    return (wide * scale * weight).astype(x.dtype, copy=False)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis (arXiv 1607.06450).

    x `[..., n]` of any leading shape, weight and bias `[n]` -> a new array of x's shape and dtype.
    """
    wide = x.astype(np.float32, copy=False)
    centred = wide - np.mean(wide, axis=-1, keepdims=True)
    scale = 1.0 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + np.float32(eps))
    return (centred * scale * weight + bias).astype(x.dtype, copy=False)
