"""Gated products on Hopper against float64, by every plan, on odd sizes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from helpers.gpu_arrays import DTYPES, normal, poison_new_arrays, relative_error, wide

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from tensorray.kernels import linear as linears  # noqa: E402
from tensorray.kernels.cuda import gated_hopper  # noqa: E402
from tensorray.kernels.cuda.gated_hopper import Plan, gated_product, plans  # noqa: E402
from tensorray.kernels.cuda.hopper import is_hopper  # noqa: E402

if not is_hopper(0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

# Of the difference's norm to the result's.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_arrays(monkeypatch)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("plan", plans(), ids=lambda plan: f"{plan.rows}x{plan.outs}")
def test_every_plan(plan: Plan, dtype: str) -> None:
    sizes = [
        *((17, 40, 64), (plan.rows, 512, 1024), (plan.rows + 3, 1032, 2056)),
        (3 * plan.rows - 1, 264, 4096),
    ]
    for (rows, results, inner), gate in zip(sizes, ("silu", "gelu_tanh") * 2, strict=True):
        rng = np.random.default_rng([rows, results, inner])
        x = normal(rng, rows, inner + 8, dtype=dtype)[:, :inner]
        weight = normal(rng, 2 * results, inner, dtype=dtype, scale=inner**-0.5)
        expected = linears.linear_numpy(wide(x), wide(weight), gate=gate)  # type: ignore[arg-type]
        found = [
            gated_product(x, weight, gate, plan, weight_ahead=ahead)
            for ahead in (False, True, True)
        ]
        assert found[0].dtype == DTYPES[dtype]
        assert relative_error(found[0], expected) < TOLERANCE[dtype], (rows, results, inner)
        for again in found[1:]:
            assert cupy.array_equal(again.view(np.uint16), found[0].view(np.uint16))


def test_linears_of_a_large_weight_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And give what cuBLAS and a kernel for the gate do, nearly."""
    rng = np.random.default_rng(0)
    weight = normal(rng, 14336, 4096, dtype="float16", scale=4096**-0.5)
    for rows in (17, 64, 100, 256):
        x = normal(rng, rows, 4096, dtype="float16")
        own = linears.linear(x, weight, gate="silu")
        with monkeypatch.context() as patched:
            patched.setattr(gated_hopper, "plan_for", lambda *given: None)
            other = linears.linear(x, weight, gate="silu")
        assert own.shape == other.shape == (rows, 7168)
        error = relative_error(own, wide(other))
        assert 0 < error < TOLERANCE["float16"]  # this one rounds once


def test_a_captured_chain_equals_the_same_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel may start before the one whose result it reads has ended: it must still wait."""
    monkeypatch.setattr(gated_hopper, "pays", lambda *given: True)
    rng = np.random.default_rng(0)
    hidden, inner, layers = 1024, 3072, 24
    for rows, dtype in itertools.product((20, 64, 100, 256), ("float16", "bfloat16")):
        weights = [
            (
                normal(rng, hidden, dtype=dtype),
                normal(rng, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5),
                normal(rng, hidden, inner, dtype=dtype, scale=inner**-0.5),
            )
            for _ in range(layers)
        ]

        def model(x: Any, weights: Any = weights) -> Any:
            for norm, gate_up, down in weights:
                y = linears.linear(x, gate_up, norm=norm, eps=1e-5, gate="silu")
                x = linears.linear(y, down, residual=x)
            return x

        x = normal(rng, rows, hidden, dtype=dtype)
        model(x)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            out = model(x)
            graph = stream.end_capture()
        for _ in range(5):
            x[...] = normal(rng, rows, hidden, dtype=dtype)
            cupy.cuda.Device().synchronize()
            out.view(np.uint8).fill(0xFF)
            cupy.cuda.Device().synchronize()
            for _ in range(3):
                graph.launch(stream)
            stream.synchronize()
            assert cupy.array_equal(out.view(np.uint16), model(x).view(np.uint16))
