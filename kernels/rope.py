"""Rotary position embedding (Su et al., arXiv 2104.09864), rotate-half layout."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels import native


def rope(q: Any, k: Any, table: Any, positions: Any) -> tuple[Any, Any]:
    """Rotate queries and keys by their positions; returns new arrays, the inputs are untouched.

    q `[T, heads, head_dim]`, k `[T, kv_heads, head_dim]`; table `[max_positions, rotary_dim]`,
    cosines in the first half of a row and sines after; positions int `[T]`. Dim i of the first
    rotary half pairs with dim i of the second; dims past `rotary_dim` pass through.
    """
    if not native.takes(q):
        return rope_numpy(q, k, table, positions)
    positions = np.ascontiguousarray(positions, np.int32)
    rotated_q, rotated_k = np.empty(q.shape, np.float32), np.empty(k.shape, np.float32)
    native.library.rope(q, table, positions, rotated_q)
    native.library.rope(k, table, positions, rotated_k)
    return rotated_q, rotated_k


def rope_numpy(q: Any, k: Any, table: Any, positions: Any) -> tuple[Any, Any]:
    """The twin of `rope`."""
    rows = table[positions][:, None, :]
    half = table.shape[1] // 2
    cos, sin = rows[..., :half], rows[..., half:]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = np.empty_like(x, order="C")
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
