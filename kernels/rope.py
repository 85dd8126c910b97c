"""Rotary position embedding (Su et al., arXiv 2104.09864), rotate-half layout.

Alone, and in one pass with what comes next: the append of keys and values to the paged cache, and
attention over it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels import attention, native, norm
from tensorray.kernels.device import is_cuda


def rope(q: Any, k: Any, table: Any, positions: Any) -> tuple[Any, Any]:
    """Rotate queries and keys by their positions; returns new arrays, the inputs are untouched.

    q `[T, heads, head_dim]`, k `[T, kv_heads, head_dim]`; table `[max_positions, rotary_dim]`,
    cosines in the first half of a row and sines after; positions int `[T]`. Dim i of the first
    rotary half pairs with dim i of the second; dims past `rotary_dim` pass through.
    """
    if is_cuda(q):
        from tensorray.kernels.cuda import rope as cuda_rope

        return cuda_rope.rope(q, k, table, positions)
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


def rope_append(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    positions: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    *,
    kv_scale: float = 1.0,
    q_norm: Any | None = None,
    k_norm: Any | None = None,
    eps: float = 0.0,
) -> Any:
    """`rope`, then `attention.append_kv` of the rotated keys and of v; returns the rotated queries.

    Arguments as theirs; v `[T, kv_heads, head_dim]`. With `q_norm` and `k_norm` `[head_dim]`, each
    head of q and k is RMS-normalised first (`norm.rms_norm`). On a GPU one kernel does all of it,
    without rounding in between, and rows of q, k and v may be strided (views of a packed QKV row).
    """
    if is_cuda(q):
        from tensorray.kernels.cuda import rope as cuda_rope

        return cuda_rope.rope_append(
            *(q, k, v, table, positions, k_pages, v_pages, slots),
            kv_scale=kv_scale,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
        )
    if q_norm is not None:
        q, k = norm.rms_norm(q, q_norm, eps), norm.rms_norm(k, k_norm, eps)
    q, k = rope(q, k, table, positions)
    attention.append_kv(k, v, k_pages, v_pages, slots, kv_scale=kv_scale)
    return q


def rope_append_numpy(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    positions: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    *,
    kv_scale: float = 1.0,
    q_norm: Any | None = None,
    k_norm: Any | None = None,
    eps: float = 0.0,
) -> Any:
    """The twin of `rope_append`."""
    if q_norm is not None:
        q, k = norm.rms_norm_numpy(q, q_norm, eps), norm.rms_norm_numpy(k, k_norm, eps)
    q, k = rope_numpy(q, k, table, positions)
    attention.append_kv_numpy(k, v, k_pages, v_pages, slots, kv_scale=kv_scale)
    return q


def rope_attention(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    positions: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scale: float = 1.0,
    q_norm: Any | None = None,
    k_norm: Any | None = None,
    eps: float = 0.0,
    max_query: int | None = None,
) -> Any:
    """`rope_append`, then `attention.paged_attention` of the rotated queries; arguments as theirs.

    On a GPU one kernel does all of it where `max_query` is 1: a decode step.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    options |= {"kv_scale": kv_scale, "max_query": max_query}
    norms: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
    new = (q, k, v, table, positions, k_pages, v_pages, slots)
    if is_cuda(q):
        from tensorray.kernels.cuda import attention as cuda_attention

        arrays = (*new, query_starts, seq_lens, block_table)
        return cuda_attention.rope_attention(*arrays, **(norms | options))
    q = rope_append(*new, kv_scale=kv_scale, **norms)
    return attention.paged_attention(
        q, k_pages, v_pages, query_starts, seq_lens, block_table, **options
    )


def rope_attention_numpy(
    q: Any,
    k: Any,
    v: Any,
    table: Any,
    positions: Any,
    k_pages: Any,
    v_pages: Any,
    slots: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scale: float = 1.0,
    q_norm: Any | None = None,
    k_norm: Any | None = None,
    eps: float = 0.0,
) -> Any:
    """The twin of `rope_attention`."""
    q = rope_append_numpy(
        *(q, k, v, table, positions, k_pages, v_pages, slots),
        kv_scale=kv_scale,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )
    return attention.paged_attention_numpy(
        *(q, k_pages, v_pages, query_starts, seq_lens, block_table),
        scale=scale,
        window=window,
        softcap=softcap,
        kv_scale=kv_scale,
    )


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = np.empty_like(x, order="C")
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
