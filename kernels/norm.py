"""Norms over the last axis, statistics in float32.

A result has its weight's dtype: products take what a norm makes, while what it reads may be a
residual stream of a wider dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels import native
from tensorray.kernels.device import is_cuda


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """`x / sqrt(mean(x * x) + eps) * weight` over the last axis (arXiv 1910.07467).

    x `[..., n]` of any leading shape, weight `[n]` -> a new array of x's shape.
    """
    if is_cuda(x):
        from tensorray.kernels.cuda import norm as cuda

        return cuda.rms_norm(x, weight, eps)
    if not (native.takes(x) and weight.dtype == x.dtype and x.ndim <= 3):
        return rms_norm_numpy(x, weight, eps)
    y = np.empty(x.shape, np.float32)
    native.library.rms_norm(x, weight, eps, y)
    return y


def rms_norm_numpy(x: Any, weight: Any, eps: float) -> Any:
    """The twin of `rms_norm`."""
    wide = x.astype(np.float32, copy=False)
    scale = 1.0 / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps))
    return (wide * scale * weight).astype(weight.dtype, copy=False)


def add_rms_norm(
    x: Any, delta: Any, weight: Any, eps: float, *, delta_weight: Any | None = None
) -> tuple[Any, Any]:
    """A residual stream's next value and its norm: `x + delta` in x's dtype, `rms_norm` of that.

    With `delta_weight` it is `x + rms_norm(delta, delta_weight, eps)`. x and delta `[..., n]`,
    weights `[n]`; the norm is taken of the sum as it was rounded.
    """
    if is_cuda(x):
        from tensorray.kernels.cuda import norm as cuda

        return cuda.add_rms_norm(x, delta, weight, eps, delta_weight=delta_weight)
    if delta_weight is not None:
        delta = rms_norm(delta, delta_weight, eps)
    total = (x + delta).astype(x.dtype, copy=False)
    return total, rms_norm(total, weight, eps)


def add_rms_norm_numpy(
    x: Any, delta: Any, weight: Any, eps: float, *, delta_weight: Any | None = None
) -> tuple[Any, Any]:
    """The twin of `add_rms_norm`."""
    if delta_weight is not None:
        delta = rms_norm_numpy(delta, delta_weight, eps)
    total = (x + delta).astype(x.dtype, copy=False)
    return total, rms_norm_numpy(total, weight, eps)


def qk_norm(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float) -> tuple[Any, Any]:
    """`rms_norm` of each head of q and of k, in one launch on a GPU.

    q `[T, heads, head_dim]` and k `[T, kv_heads, head_dim]`, which may be views of one packed row;
    weights `[head_dim]` -> new arrays of the same shapes.
    """
    if is_cuda(q):
        from tensorray.kernels.cuda import norm as cuda

        return cuda.qk_norm(q, k, q_weight, k_weight, eps)
    return rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)


def qk_norm_numpy(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float) -> tuple[Any, Any]:
    """The twin of `qk_norm`."""
    return rms_norm_numpy(q, q_weight, eps), rms_norm_numpy(k, k_weight, eps)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last axis (arXiv 1607.06450).

    x `[..., n]` of any leading shape, weight and bias `[n]` -> a new array of x's shape.
    """
    if is_cuda(x):
        from tensorray.kernels.cuda import norm as cuda

        return cuda.layer_norm(x, weight, bias, eps)
    return layer_norm_numpy(x, weight, bias, eps)


def layer_norm_numpy(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """The twin of `layer_norm`."""
    wide = x.astype(np.float32, copy=False)
    centred = wide - np.mean(wide, axis=-1, keepdims=True)
    scale = 1.0 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + np.float32(eps))
    return (centred * scale * weight + bias).astype(weight.dtype, copy=False)
