"""Attention over a paged KV cache (Kwon et al., arXiv 2309.06180).

Pages are `[num_blocks, kv_heads, block_size, head_dim]`; a sequence's position p lies in block
`block_table[p // block_size]` at offset `p % block_size`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels import native

# Queries whose scores are held at once: bounds the memory of a long prefill chunk.
_QUERY_TILE = 128


def append_kv(k: Any, v: Any, k_pages: Any, v_pages: Any, slots: Any) -> None:
    """Write each token's key and value into its slot of the pages, in place.

    k and v `[T, kv_heads, head_dim]`; slots int `[T]`, `block * block_size + offset`, -1 to skip
    a token.
    """
    if not native.takes(k):
        append_kv_numpy(k, v, k_pages, v_pages, slots)
        return
    slots = np.ascontiguousarray(slots, np.int64)
    native.library.append_kv(k, v, k_pages, v_pages, slots)


def append_kv_numpy(k: Any, v: Any, k_pages: Any, v_pages: Any, slots: Any) -> None:
    """The twin of `append_kv`."""
    kept = slots >= 0
    blocks, offsets = np.divmod(slots[kept], k_pages.shape[2])
    k_pages[blocks, :, offsets] = k[kept]
    v_pages[blocks, :, offsets] = v[kept]


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
) -> Any:
    """Causal softmax attention of packed queries over their sequences' cached keys and values.

    q `[T, heads, head_dim]` -> new `[T, heads, head_dim]`. Sequence s owns the packed queries
    `query_starts[s]` to `query_starts[s + 1]` (n of them) and has `seq_lens[s]` tokens in the
    cache, those queries' own included: query i sits at position `seq_lens[s] - n + i` and sees
    keys at positions up to its own and, with a window, greater than its own minus `window`.
    block_table int `[S, max_blocks]`. Query head h reads KV head `h * kv_heads // heads`
    (GQA, arXiv 2305.13245). Scores are `scale * q.k`, soft-capped to `cap * tanh(score / cap)`
    if asked. Nothing outside the visible positions is read.
    """
    if not native.takes(q):
        return paged_attention_numpy(
            q,
            k_pages,
            v_pages,
            query_starts,
            seq_lens,
            block_table,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    out = np.empty(q.shape, np.float32)
    native.library.paged_attention(
        q,
        k_pages,
        v_pages,
        np.ascontiguousarray(query_starts, np.int32),
        np.ascontiguousarray(seq_lens, np.int32),
        np.asarray(block_table, np.int32),
        out,
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
) -> Any:
    """The twin of `paged_attention`."""
    heads, head_dim = q.shape[1:]
    kv_heads, block_size = k_pages.shape[1:3]
    group = heads // kv_heads
    out = np.empty_like(q, order="C")
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
                pages[blocks].swapaxes(0, 1).reshape(kv_heads, -1, head_dim)[:, cut]
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
