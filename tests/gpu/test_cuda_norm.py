"""Norms and elementwise functions on a GPU against their NumPy twins in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.gpu_arrays import DTYPES, normal, poison_new_arrays, relative_error, wide

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from tensorray.kernels import activation, norm  # noqa: E402

TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6}
EPS = 1e-6
# Rows of one warp, of part of a block, of many packs a thread, of odd lengths.
WIDTHS = [1, 7, 64, 128, 640, 1000, 1024, 4096, 8192, 10000, 20480]
DTYPE_PAIRS = [
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("float32", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_arrays(monkeypatch)


def check(actual: Any, expected: Any, dtype: str) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == DTYPES[dtype]
    assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("stream", "dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_of_rows(stream: str, dtype: str, width: int) -> None:
    rng = np.random.default_rng(width)
    weight, other, bias = (normal(rng, width, dtype=dtype) for _ in range(3))
    for rows in (1, 3, 70):
        packed = normal(rng, rows, width + 16, dtype=stream, mean=0.5)
        for x in (packed[:, 8 : 8 + width], normal(rng, rows, width, dtype=stream, mean=0.5)):
            delta = normal(rng, rows, width, dtype=dtype)
            check(
                norm.rms_norm(x, weight, EPS),
                norm.rms_norm_numpy(wide(x), wide(weight), EPS),
                dtype,
            )
            expected = norm.layer_norm_numpy(wide(x), wide(weight), wide(bias), EPS)
            check(norm.layer_norm(x, weight, bias, EPS), expected, dtype)
            for delta_weight in (None, other):
                total, normed = norm.add_rms_norm(x, delta, weight, EPS, delta_weight=delta_weight)
                expected_total, _ = norm.add_rms_norm_numpy(
                    wide(x),
                    wide(delta),
                    wide(weight),
                    EPS,
                    delta_weight=None if delta_weight is None else wide(delta_weight),
                )
                check(total, expected_total, stream)
                expected = norm.rms_norm_numpy(wide(total), wide(weight), EPS)
                check(normed, expected, dtype)


def test_a_residual_stream_beyond_float16() -> None:
    rng = np.random.default_rng(0)
    x = normal(rng, 5, 640, dtype="float32", scale=1e5)
    delta, weight = (normal(rng, *s, dtype="float16") for s in ((5, 640), (640,)))
    total, normed = norm.add_rms_norm(x, delta, weight, EPS)
    check(total, wide(x) + wide(delta), "float32")
    check(normed, norm.rms_norm_numpy(wide(total), wide(weight), EPS), "float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256, 320])
def test_norms_of_heads(dtype: str, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    for tokens, heads, kv_heads in [(1, 16, 8), (7, 4, 1), (33, 3, 3)]:
        packed = normal(rng, tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        q = packed[:, : heads * head_dim].reshape(tokens, heads, head_dim)
        k = packed[:, heads * head_dim : (heads + kv_heads) * head_dim]
        k = k.reshape(tokens, kv_heads, head_dim)
        weights = [normal(rng, head_dim, dtype=dtype) for _ in "qk"]
        expected = norm.qk_norm_numpy(wide(q), wide(k), wide(weights[0]), wide(weights[1]), EPS)
        for actual, wanted in zip(norm.qk_norm(q, k, *weights, EPS), expected, strict=True):
            check(actual, wanted, dtype)
        check(norm.rms_norm(q, weights[0], EPS), expected[0], dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (5, 1280), (1, 6144), (300, 2050), (2, 3, 32)])
def test_elementwise(dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(shape[-1])
    x = normal(rng, *shape, dtype=dtype, scale=4.0)
    half = x[..., : shape[-1] // 2]
    for values in (x, half):
        check(activation.silu(values), activation.silu_numpy(wide(values)), dtype)
        check(activation.gelu_tanh(values), activation.gelu_tanh_numpy(wide(values)), dtype)
        check(activation.softcap(values, 3.0), activation.softcap_numpy(wide(values), 3.0), dtype)
    for kind in ("silu", "gelu_tanh"):
        check(activation.gated(x, kind), activation.gated_numpy(wide(x), kind), dtype)
    for stream in (dtype, "float32"):
        base = normal(rng, *shape, dtype=stream)
        check(activation.add(base, x), wide(base) + wide(x), stream)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_activations_stay_finite(dtype: str) -> None:
    extremes = np.array([[-6e4, -100.0, -20.0, 0.0, 20.0, 100.0, 6e4, 1.0]])
    x = cupy.asarray(extremes.astype(DTYPES[dtype]))
    for y, expected in (
        (activation.silu(x), activation.silu_numpy(wide(x))),
        (activation.gelu_tanh(x), activation.gelu_tanh_numpy(wide(x))),
        (activation.softcap(x, 30.0), activation.softcap_numpy(wide(x), 30.0)),
    ):
        check(y, expected, dtype)


def test_empty_arrays() -> None:
    x, weight = cupy.empty((0, 64), np.float16), cupy.ones(64, np.float16)
    assert norm.rms_norm(x, weight, EPS).shape == (0, 64)
    assert activation.gated(x, "silu").shape == (0, 32)
    assert norm.qk_norm(x.reshape(0, 1, 64), x.reshape(0, 1, 64), weight, weight, EPS)[0].size == 0
