"""Mixture of experts on a GPU against its NumPy twins in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.gpu_arrays import DTYPES, normal, poison_new_arrays, relative_error, wide

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from tensorray.kernels import moe  # noqa: E402
from tensorray.kernels.cuda import compiler  # noqa: E402

TOLERANCE = {"float16": 1.5e-3, "bfloat16": 1.2e-2, "float32": 3e-6}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_arrays(monkeypatch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 4), (8, 2), (100, 7), (128, 8), (256, 40)])
def test_route(dtype: str, renormalize: bool, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(experts)
    for rows in (1, 5, 300):
        logits = normal(rng, rows, experts, dtype=dtype)
        weights, ids = moe.route(logits, top_k, renormalize)
        expected, expected_ids = moe.route_numpy(wide(logits), top_k, renormalize)
        assert np.array_equal(cupy.asnumpy(ids), expected_ids)
        assert ids.dtype == np.int32
        assert weights.dtype == np.float32
        assert relative_error(weights, expected) < 1e-5


def test_equal_logits_choose_the_lower_expert() -> None:
    weights, ids = moe.route(cupy.zeros((3, 70), np.float16), 40, True)
    assert np.array_equal(cupy.asnumpy(ids), np.tile(np.arange(40), (3, 1)))
    assert relative_error(weights, np.full((3, 40), 1 / 40)) < 1e-6


class Layer:
    def __init__(self, experts: int, hidden: int, inner: int, dtype: str) -> None:
        rng = np.random.default_rng([experts, hidden, inner])
        self.gate_up = normal(rng, experts, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5)
        self.down = normal(rng, experts, hidden, inner, dtype=dtype, scale=inner**-0.5)
        self.dtype, self.rng = dtype, rng

    def check(self, rows: int, top_k: int, ids: Any = None) -> None:
        experts, hidden, _ = self.down.shape
        x = normal(self.rng, rows, hidden, dtype=self.dtype)
        weights, drawn = moe.route(normal(self.rng, rows, experts, dtype="float32"), top_k, True)
        ids = drawn if ids is None else ids
        y = moe.experts(x, weights, ids, self.gate_up, self.down)
        expected = moe.experts_numpy(
            wide(x), wide(weights), cupy.asnumpy(ids), wide(self.gate_up), wide(self.down)
        )
        assert y.dtype == DTYPES[self.dtype]
        assert relative_error(y, expected) < TOLERANCE[self.dtype], (rows, top_k)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("experts", "top_k", "hidden", "inner"),
    [(8, 2, 256, 512), (16, 8, 136, 72), (40, 3, 512, 200), (4, 1, 64, 56)],
)
def test_experts(dtype: str, experts: int, top_k: int, hidden: int, inner: int) -> None:
    layer = Layer(experts, hidden, inner, dtype)
    for rows in (1, 2, 7, 16, 33, 100, 257, 700):
        layer.check(rows, top_k)


@pytest.mark.parametrize("kib", [99, 163])
def test_as_on_a_gpu_of_less_shared_memory(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "most_shared_bytes", lambda: kib * 1024)
    layer = Layer(8, 256, 512, "float16")
    for rows in (1, 16, 33, 64):
        layer.check(rows, 2)


@pytest.mark.parametrize("rows", [1, 9, 40, 150, 500])
def test_all_rows_choose_the_same_experts(rows: int) -> None:
    """The fullest groups there can be, among empty ones."""
    layer = Layer(12, 128, 96, "float16")
    for chosen in ([3, 9], [11, 0], [0, 1]):
        layer.check(rows, 2, cupy.asarray(np.tile(np.array(chosen, np.int32), (rows, 1))))


def test_sizes_that_no_wide_access_fits() -> None:
    Layer(4, 100, 30, "float16").check(5, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", [1, 7, 20, 40, 300])
def test_ranks_with_some_of_the_experts(dtype: str, rows: int) -> None:
    """A rank leaves choices of others' experts out, be they none, some or all; so the ranks' sum
    is the whole."""
    layer = Layer(12, 256, 200, dtype)
    x = normal(layer.rng, rows, 256, dtype=dtype)
    weights, anywhere = moe.route(normal(layer.rng, rows, 12, dtype="float32"), 3, True)
    _, first_rank = moe.route(normal(layer.rng, rows, 4, dtype="float32"), 3, True)
    for ids in (anywhere, first_rank, first_rank + 4, first_rank + 8):
        given = wide(x), wide(weights), cupy.asnumpy(ids)
        total = 0.0
        for first in (0, 4, 8):
            gate_up, down = (each[first : first + 4] for each in (layer.gate_up, layer.down))
            part = moe.experts(x, weights, ids, gate_up, down, first)
            expected = moe.experts_numpy(*given, wide(gate_up), wide(down), first)
            assert relative_error(part, expected) < TOLERANCE[dtype], first
            total = total + wide(part)
        expected = moe.experts_numpy(*given, wide(layer.gate_up), wide(layer.down))
        assert relative_error(cupy.asarray(total), expected) < TOLERANCE[dtype]
        whole = moe.experts(x, weights, ids, layer.gate_up, layer.down)
        only_rank = moe.experts(x, weights, ids, layer.gate_up, layer.down, 0)
        assert np.array_equal(wide(only_rank), wide(whole))


@pytest.mark.parametrize(("all_experts", "first"), [(8, None), (16, 4)])
def test_a_captured_layer_follows_its_inputs(all_experts: int, first: int | None) -> None:
    """What a replay computes depends on what rows and choices are then, not at the capture."""
    layer = Layer(8, 256, 128, "float16")
    for rows in (3, 400):
        x = normal(layer.rng, rows, 256, dtype="float16")
        logits = normal(layer.rng, rows, all_experts, dtype="float16")

        def model(x: Any = x, logits: Any = logits) -> Any:
            return moe.experts(x, *moe.route(logits, 2, True), layer.gate_up, layer.down, first)

        model()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            out = model()
            graph = stream.end_capture()
        for lead in (0, 100, 0):  # of expert 0 and 1, which a rank may not have
            x[...] = normal(layer.rng, rows, 256, dtype="float16")
            logits[...] = normal(layer.rng, rows, all_experts, dtype="float16")
            logits[:, :2] += lead
            cupy.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            assert cupy.array_equal(out.view(np.uint16), model().view(np.uint16))


def test_no_rows() -> None:
    layer = Layer(4, 64, 64, "float16")
    x = cupy.empty((0, 64), np.float16)
    weights, ids = moe.route(cupy.empty((0, 4), np.float16), 2, True)
    assert moe.experts(x, weights, ids, layer.gate_up, layer.down).shape == (0, 64)
