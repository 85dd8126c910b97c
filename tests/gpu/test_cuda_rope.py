"""RoPE, the append to the paged cache, and row gathers on a GPU against their NumPy twins."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.gpu_arrays import DTYPES, normal, poison_new_arrays, relative_error, wide

from tensorray.kernels import attention, rope, rows

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

E4M3 = ml_dtypes.float8_e4m3fn
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_arrays(monkeypatch)


def unsigned(x: Any) -> Any:
    """The bits of an array, to compare exactly."""
    return cupy.asnumpy(x).view(f"uint{8 * x.itemsize}")


class Inputs:
    def __init__(
        self, tokens: int, heads: int, kv_heads: int, head_dim: int, rotary: int, dtype: str
    ) -> None:
        rng = np.random.default_rng([tokens, heads, head_dim, rotary])
        # Views of one packed row, as a QKV projection leaves them.
        packed = normal(rng, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
        self.q, self.k, self.v = (
            packed[:, :heads],
            packed[:, heads : heads + kv_heads],
            packed[:, heads + kv_heads :],
        )
        angles = rng.uniform(0, 6, (50, rotary // 2))
        self.table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        self.positions = rng.integers(0, 50, tokens).astype(np.int32)
        self.blocks, self.block_size = tokens // 4 + 3, 8
        self.slots = rng.permutation(self.blocks * self.block_size)[:tokens].astype(np.int64)
        self.slots[rng.random(tokens) < 0.2] = -1
        self.q_norm = normal(rng, head_dim, dtype=dtype)
        self.k_norm = normal(rng, head_dim, dtype=dtype)
        self.shape = (self.blocks, kv_heads, self.block_size, head_dim)

    def metadata(self) -> tuple[Any, Any, Any]:
        return cupy.asarray(self.table), cupy.asarray(self.positions), cupy.asarray(self.slots)

    def expected(self, **options: Any) -> tuple[Any, Any, Any]:
        """q, and the pages (NaN where nothing is stored), in float64."""
        k_pages, v_pages = (np.full(self.shape, np.nan) for _ in range(2))
        q = rope.rope_append_numpy(
            *(wide(x) for x in (self.q, self.k, self.v)),
            self.table.astype(np.float64),
            self.positions,
            *(k_pages, v_pages, self.slots),
            **options,
        )
        return q, k_pages, v_pages


def check_pages(pages: Any, expected: Any, dtype: str) -> None:
    """The same slots hold something, and the same values."""
    written = ~np.isnan(expected)
    assert (np.isnan(wide(pages)) == ~written).all()
    assert relative_error(pages[cupy.asarray(written)], expected[written]) < TOLERANCE[dtype]


SHAPES = [
    *((tokens, 32, 8, 128, 128) for tokens in (1, 2, 7, 300)),
    (5, 16, 8, 128, 64),
    (5, 4, 1, 256, 256),
    (9, 14, 2, 64, 64),
    (9, 3, 3, 80, 32),
    (3, 4, 4, 96, 96),
    (3, 2, 1, 72, 72),
    (3, 2, 1, 20, 12),
    (3, 2, 1, 10, 6),
]


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_append(shape: tuple[int, int, int, int, int], dtype: str) -> None:
    given = Inputs(*shape, dtype)
    table, positions, slots = given.metadata()
    for norms in ({}, {"q_norm": given.q_norm, "k_norm": given.k_norm, "eps": 1e-5}):
        pages = [cupy.full(given.shape, cupy.nan, given.q.dtype) for _ in range(2)]
        q = rope.rope_append(given.q, given.k, given.v, table, positions, *pages, slots, **norms)
        options = {name: wide(x) if name != "eps" else x for name, x in norms.items()}
        expected = given.expected(**options)
        assert relative_error(q, expected[0]) < TOLERANCE[dtype]
        for page, wanted in zip(pages, expected[1:], strict=True):
            check_pages(page, wanted, dtype)
        kept = given.slots >= 0
        where = given.slots[kept] // 8, slice(None), given.slots[kept] % 8
        np.testing.assert_array_equal(unsigned(pages[1][where]), unsigned(given.v)[kept])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(7, 32, 8, 128, 128), (5, 4, 1, 256, 256), (9, 3, 3, 80, 32)])
def test_cache_of_8_bits(shape: tuple[int, int, int, int, int], dtype: str) -> None:
    given = Inputs(*shape, dtype)
    table, positions, slots = given.metadata()
    pages = [cupy.full(given.shape, 0x7F, "uint8") for _ in range(2)]
    rope.rope_append(given.q, given.k, given.v, table, positions, *pages, slots, kv_scale=0.25)
    _, k_pages, v_pages = given.expected()
    for page, wanted in zip(pages, (k_pages, v_pages), strict=True):
        kept = cupy.asnumpy(page).view(E4M3).astype(np.float64) * 0.25
        written = ~np.isnan(wanted)
        assert (np.isnan(kept) == ~written).all()
        np.testing.assert_allclose(kept[written], wanted[written], rtol=0.07, atol=2e-3)
    # Values are rounded once: exactly what NumPy makes of them.
    exact = np.full(given.shape, 0x7F, np.uint8)
    flat = np.asarray(wide(given.v), np.float32)
    attention.append_kv_numpy(flat, flat, exact.copy(), exact, given.slots, kv_scale=0.25)
    np.testing.assert_array_equal(cupy.asnumpy(pages[1]), exact)


def test_too_large_for_8_bits_saturates() -> None:
    k = cupy.asarray(np.array([[[1e4, -1e4, 448, 460, 1, -1, 0, 3]]], np.float32))
    pages = [cupy.zeros((1, 1, 4, 8), "uint8") for _ in range(2)]
    attention.append_kv(k, k, *pages, cupy.zeros(1, "int64"))
    kept = cupy.asnumpy(pages[0])[0, 0, 0].view(E4M3).astype(np.float32)
    np.testing.assert_array_equal(kept, [448, -448, 448, 448, 1, -1, 0, 3])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(7, 32, 8, 128, 128), (9, 3, 3, 80, 32), (300, 4, 1, 256, 256)])
def test_rope_alone(shape: tuple[int, int, int, int, int], dtype: str) -> None:
    given = Inputs(*shape, dtype)
    table, positions, _ = given.metadata()
    before = unsigned(given.k).copy()
    q, k = rope.rope(given.q, given.k, table, positions)
    wanted = rope.rope_numpy(wide(given.q), wide(given.k), given.table, given.positions)
    assert relative_error(q, wanted[0]) < TOLERANCE[dtype]
    assert relative_error(k, wanted[1]) < TOLERANCE[dtype]
    np.testing.assert_array_equal(unsigned(given.k), before)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("head_dim", [64, 72, 10, 256])
def test_append_alone(head_dim: int, dtype: str) -> None:
    given = Inputs(33, 2, 3, head_dim, 2, dtype)
    pages = [cupy.full(given.shape, cupy.nan, given.q.dtype) for _ in range(2)]
    attention.append_kv(given.k, given.v, *pages, cupy.asarray(given.slots))
    wanted = [np.full(given.shape, np.nan) for _ in range(2)]
    attention.append_kv_numpy(wide(given.k), wide(given.v), *wanted, given.slots)
    for page, want in zip(pages, wanted, strict=True):
        np.testing.assert_array_equal(wide(page), want)


def test_heads_out_of_order_are_refused() -> None:
    given = Inputs(3, 4, 2, 64, 64, "float16")
    table, positions, slots = given.metadata()
    pages = [cupy.zeros(given.shape, "float16") for _ in range(2)]
    q = cupy.ascontiguousarray(given.q.transpose(1, 0, 2)).transpose(1, 0, 2)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        rope.rope_append(q, given.k, given.v, table, positions, *pages, slots)


@pytest.mark.parametrize("out", [None, "float32", "float16"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("width", [1, 7, 8, 640, 4096, 5000])
def test_gather_rows(width: int, dtype: str, out: str | None) -> None:
    rng = np.random.default_rng(width)
    table = normal(rng, 70, width, dtype=dtype)
    index = np.concatenate([rng.integers(10, 80, 40), [9, 80, -1, 10, 79]]).astype(np.int32)
    found = rows.gather_rows(table, cupy.asarray(index), 10, dtype=out)
    assert found.dtype == (out or table.dtype)
    wanted = rows.gather_rows_numpy(cupy.asnumpy(table), index, 10, dtype=out)
    np.testing.assert_array_equal(wide(found), wanted.astype(np.float64))
