"""Appending to the paged cache, alone and fused with RoPE; caches of 8 bits; rows by index."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tensorray.kernels import attention, norm, rope, rows

E4M3 = ml_dtypes.float8_e4m3fn


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("twin", [False, True])
def test_rope_append_is_norm_then_rope_then_append(twin: bool, normed: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 5, 4, 16), normal(rng, 5, 2, 16), normal(rng, 5, 2, 16)
    table, positions = normal(rng, 9, 8), np.array([3, 0, 8, 1, 2], np.int32)
    slots = np.array([7, -1, 0, 11, 4])
    pages = [np.zeros((3, 2, 4, 16), np.float32) for _ in range(4)]
    weights = {"q_norm": normal(rng, 16), "k_norm": normal(rng, 16), "eps": 1e-6} if normed else {}
    function = rope.rope_append_numpy if twin else rope.rope_append
    given = [x.copy() for x in (q, k, v)]
    out = function(q, k, v, table, positions, pages[0], pages[1], slots, **weights)
    for before, after in zip(given, (q, k, v), strict=True):
        np.testing.assert_array_equal(before, after)
    if normed:
        q = norm.rms_norm(q, weights["q_norm"], 1e-6)
        k = norm.rms_norm(k, weights["k_norm"], 1e-6)
    q, k = rope.rope(q, k, table, positions)
    attention.append_kv(k, v, pages[2], pages[3], slots)
    np.testing.assert_allclose(out, q, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pages[0], pages[2], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(pages[1], pages[3])
    assert not pages[1][0, :, 1].any()  # no token has slot 1
    np.testing.assert_array_equal(pages[1][2, :, 3], v[3])


@pytest.mark.parametrize("dtype", [E4M3, np.uint8])
def test_a_cache_of_8_bits_keeps_values_to_three_bits(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    q, k, v = normal(rng, 6, 2, 32), 40 * normal(rng, 6, 2, 32), 900 * normal(rng, 6, 2, 32)
    pages = [np.zeros((4, 2, 2, 32), dtype) for _ in range(2)]
    exact = [np.zeros((4, 2, 2, 32), np.float32) for _ in range(2)]
    slots, scale = np.arange(2, 8), 8.0
    attention.append_kv(k, v, *pages, slots, kv_scale=scale)
    attention.append_kv(k, v, *exact, slots)
    kept = [page.view(E4M3).astype(np.float32) * scale for page in pages]
    np.testing.assert_allclose(kept[0], exact[0], rtol=1 / 16, atol=scale / 512)
    np.testing.assert_allclose(kept[1], np.clip(exact[1], -3584, 3584), rtol=1 / 16, atol=0.02)
    starts, lens = np.array([0, 6], np.int32), np.array([6], np.int32)
    blocks = np.array([[1, 2, 3]], np.int32)
    out = attention.paged_attention(
        q, *pages, starts, lens, blocks, scale=0.01, kv_scale=scale, max_query=6
    )
    wanted = attention.paged_attention(q, *kept, starts, lens, blocks, scale=0.01)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-6 * np.abs(kept[1]).max())


def test_a_scale_holds_for_wide_pages_too() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (normal(rng, 1, 2, 8) for _ in range(3))
    pages = [np.zeros((1, 2, 4, 8), np.float32) for _ in range(2)]
    attention.append_kv(k, v, *pages, np.array([0]), kv_scale=4.0)
    np.testing.assert_array_equal(pages[0][0, :, 0], k[0] / 4)
    starts, lens = np.array([0, 1], np.int32), np.array([1], np.int32)
    out = attention.paged_attention(
        q, *pages, starts, lens, np.zeros((1, 1), np.int32), scale=1.0, kv_scale=4.0
    )
    np.testing.assert_allclose(out, v, rtol=1e-6)


def test_rows_outside_the_table_are_zeros() -> None:
    table = np.arange(12, dtype=np.float16).reshape(4, 3)
    index = np.array([11, 10, 9, 14, 13, -1], np.int32)
    found = rows.gather_rows(table, index, 10, dtype=np.float32)
    assert found.dtype == np.float32
    wanted = [[3, 4, 5], [0, 1, 2], [0, 0, 0], [0, 0, 0], [9, 10, 11], [0, 0, 0]]
    np.testing.assert_array_equal(found, wanted)
    found[:] = 1
    np.testing.assert_array_equal(table, np.arange(12).reshape(4, 3))
