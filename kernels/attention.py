"""Attention over a paged KV cache (Kwon et al., arXiv 2309.06180).

Pages are `[num_blocks, kv_heads, block_size, head_dim]`; a sequence's position p lies in block
`block_table[p // block_size]` at offset `p % block_size`. Pages of 8 bits (float8_e4m3fn, or uint8
holding its bits) keep what is appended divided by the layer's `kv_scale`.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tensorray.kernels import native
from tensorray.kernels.device import is_cuda

# Queries whose scores are held at once: bounds the memory of a long prefill chunk.
_QUERY_TILE = 128
# The largest float8_e4m3fn.
_E4M3_MAX = 448.0


def append_kv(
    k: Any, v: Any, k_pages: Any, v_pages: Any, slots: Any, *, kv_scale: float = 1.0
) -> None:
    """Write each token's key and value into its slot of the pages, in place.

    k and v `[T, kv_heads, head_dim]`; slots int64 `[T]`, `block * block_size + offset`, -1 to skip
    a token. On a GPU rows may be strided (views of a packed QKV row).
    """
    if is_cuda(k):
        from tensorray.kernels.cuda import rope

        rope.append_kv(k, v, k_pages, v_pages, slots, kv_scale=kv_scale)
    elif not _native_takes(k, k_pages, kv_scale):
        append_kv_numpy(k, v, k_pages, v_pages, slots, kv_scale=kv_scale)
    else:
        slots = np.ascontiguousarray(slots, np.int64)
        native.library.append_kv(k, v, k_pages, v_pages, slots)


def append_kv_numpy(
    k: Any, v: Any, k_pages: Any, v_pages: Any, slots: Any, *, kv_scale: float = 1.0
) -> None:
    """The twin of `append_kv`."""
    kept = slots >= 0
    blocks, offsets = np.divmod(slots[kept], k_pages.shape[2])
    k_pages[blocks, :, offsets] = _stored(k[kept], k_pages.dtype, kv_scale)
    v_pages[blocks, :, offsets] = _stored(v[kept], v_pages.dtype, kv_scale)


def _native_takes(x: Any, pages: Any, kv_scale: float) -> bool:
    return bool(native.takes(x) and pages.dtype == np.float32 and kv_scale == 1.0)


def _stored(x: Any, dtype: Any, kv_scale: float) -> Any:
    """x as pages of a dtype keep it."""
    if dtype.itemsize > 1:
        return x if kv_scale == 1.0 else x / kv_scale
    scaled = np.clip(x.astype(np.float32) * np.float32(1.0 / kv_scale), -_E4M3_MAX, _E4M3_MAX)
    return scaled.astype(ml_dtypes.float8_e4m3fn).view(dtype)


def _loaded(pages: Any, kv_scale: float) -> Any:
    """What pages keep, for computing with."""
    if pages.dtype.itemsize > 1:
        return pages if kv_scale == 1.0 else pages * pages.dtype.type(kv_scale)
    return pages.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(kv_scale)


def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scale: float = 1.0,
    max_query: int | None = None,
    singles: Any | None = None,
) -> Any:
    """Causal softmax attention of packed queries over their sequences' cached keys and values.

    q `[T, heads, head_dim]` -> new `[T, heads, head_dim]`. Sequence s owns the packed queries
    `query_starts[s]` to `query_starts[s + 1]` (n of them) and has `seq_lens[s]` tokens in the
    cache, those queries' own included: query i sits at position `seq_lens[s] - n + i` and sees
    keys at positions up to its own and, with a window, greater than its own minus `window`.
    block_table int `[S, max_blocks]`. Query head h reads KV head `h * kv_heads // heads`
    (GQA, arXiv 2305.13245). Scores are `scale * q.k`, soft-capped to `cap * tanh(score / cap)` if
    asked. Nothing outside the visible positions is read.

    `max_query` bounds the queries of a sequence where the host knows a bound; it only makes a GPU
    faster. With 1, row i must be sequence i's, or belong to none (`seq_lens[i]` 0). Rows that
    belong to no sequence are zeros. `singles`, int32 [1] where the other arrays are, is a hint as
    well: at least so many sequences come first that have one query each.
    """
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    options["kv_scale"] = kv_scale
    arrays = (q, k_pages, v_pages, query_starts, seq_lens, block_table)
    if is_cuda(q):
        from tensorray.kernels.cuda import attention

        options |= {"max_query": max_query, "singles": singles}
        return attention.paged_attention(*arrays, **options)
    if not _native_takes(q, k_pages, kv_scale):
        return paged_attention_numpy(*arrays, **options)
    out = np.zeros(q.shape, np.float32)
    own = int(query_starts[-1])
    native.library.paged_attention(
        q[:own],
        k_pages,
        v_pages,
        np.ascontiguousarray(query_starts, np.int32),
        np.ascontiguousarray(seq_lens, np.int32),
        np.asarray(block_table, np.int32),
        out[:own],
        scale,
        window or 0,
        softcap or 0.0,
    )
    return out


def paged_attention_numpy(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    query_starts: Any,
    seq_lens: Any,
    block_table: Any,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scale: float = 1.0,
) -> Any:
    """The twin of `paged_attention`."""
    heads, head_dim = q.shape[1:]
    kv_heads, block_size = k_pages.shape[1:3]
    group = heads // kv_heads
    out = np.zeros(q.shape, q.dtype)
    for s in range(len(seq_lens)):
        first, last = int(query_starts[s]), int(query_starts[s + 1])
        offset = int(seq_lens[s]) - last  # of a packed query's index to its position
        for begin in range(first, last, _QUERY_TILE):
            end = min(begin + _QUERY_TILE, last)
            high = end + offset
            low = 0 if window is None else max(0, begin + offset - window + 1)
            blocks = block_table[s, low // block_size : -(-high // block_size)]
            cut = slice(low % block_size, low % block_size + high - low)
            keys, values = (
                _loaded(
                    pages[blocks].swapaxes(0, 1).reshape(kv_heads, -1, head_dim)[:, cut], kv_scale
                )
                for pages in (k_pages, v_pages)
            )
            rows = q[begin:end].reshape(end - begin, kv_heads, group, head_dim)
            rows = rows.transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
            scores = (rows @ keys.swapaxes(1, 2)) * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            query_pos = np.arange(begin, end)[:, None] + offset
            key_pos = np.arange(low, high)[None, :]
            visible = key_pos <= query_pos
            if window is not None:
                visible &= key_pos > query_pos - window
            scores = scores.reshape(kv_heads, group, end - begin, high - low)
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            mixed = weights.reshape(kv_heads, -1, high - low).astype(q.dtype, copy=False) @ values
            mixed = mixed.reshape(kv_heads, group, end - begin, head_dim)
            out[begin:end] = mixed.transpose(2, 0, 1, 3).reshape(end - begin, heads, head_dim)
    return out
