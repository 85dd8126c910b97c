"""Linear layers on a GPU against the same math in float64, on shapes that fit no tile."""

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
from tensorray.kernels.cuda import compiler, cublas  # noqa: E402
from tensorray.kernels.cuda import linear as cuda  # noqa: E402
from tensorray.kernels.cuda.linear import Plan  # noqa: E402

# Of the difference's norm to the result's: rounded results (and normed inputs), float32 sums.
TOLERANCE = {"float16": 1.5e-3, "bfloat16": 1.2e-2, "float32": 3e-6}
EPS = 1e-5


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_arrays(monkeypatch)


class Case:
    """Inputs of one linear, some of them, by `options`: norm, silu, gelu_tanh, bias, residual,
    wide (residual stream in float32), strided."""

    def __init__(self, rows: int, outs: int, inner: int, dtype: str, *options: str) -> None:
        rng = np.random.default_rng([rows, outs, inner, len(options)])
        self.gate = next((o for o in options if o in ("silu", "gelu_tanh")), None)
        stream = "float32" if "wide" in options else dtype
        results = outs // 2 if self.gate else outs
        normed = "norm" in options
        self.x = self._rows(rng, rows, inner, stream if normed else dtype, "strided" in options)
        if normed and stream == "float32":
            self.x *= np.float32(3e4)  # beyond what float16 holds
        self.weight = normal(rng, outs, inner, dtype=dtype, scale=inner**-0.5)
        self.bias = normal(rng, outs, dtype=dtype) if "bias" in options else None
        self.norm = normal(rng, inner, dtype=dtype) if normed else None
        self.residual = (
            self._rows(rng, rows, results, stream, "strided" in options)
            if "residual" in options
            else None
        )
        self.dtype = dtype

    @staticmethod
    def _rows(rng: np.random.Generator, rows: int, n: int, dtype: str, strided: bool) -> Any:
        return (
            normal(rng, rows, n + 24, dtype=dtype)[:, 8 : 8 + n]
            if strided
            else (normal(rng, rows, n, dtype=dtype))
        )

    def run(self, plan: Plan | None = None) -> Any:
        if plan is None:
            return linears.linear(
                self.x,
                self.weight,
                self.bias,
                norm=self.norm,
                eps=EPS,
                gate=self.gate,
                residual=self.residual,
            )
        return cuda.few_rows(
            self.x, self.weight, self.bias, self.norm, EPS, self.gate, self.residual, plan
        )

    def error(self, y: Any) -> float:
        expected = linears.linear_numpy(
            wide(self.x),
            wide(self.weight),
            None if self.bias is None else wide(self.bias),
            norm=None if self.norm is None else wide(self.norm),
            eps=EPS,
            gate=self.gate,
            residual=None if self.residual is None else wide(self.residual),
        )
        assert y.shape == expected.shape
        assert y.dtype == (DTYPES[self.dtype] if self.residual is None else self.residual.dtype)
        return relative_error(y, expected)


OPTIONS = [
    (),
    ("bias",),
    ("norm",),
    ("norm", "silu"),
    ("norm", "gelu_tanh", "bias", "wide"),
    ("norm", "bias", "wide"),
    ("residual",),
    ("residual", "wide", "bias", "strided"),
    ("norm", "silu", "strided", "residual"),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_few_and_many_rows(dtype: str, options: tuple[str, ...]) -> None:
    errors = {}
    shapes = [(64, 64), (48, 72), (1026, 640), (6, 8), (250, 2056), (512, 4096)]
    for rows, (outs, inner) in itertools.product([1, 2, 5, 8, 9, 16, 17, 33, 130], shapes):
        case = Case(rows, outs, inner, dtype, *options)
        errors[rows, outs, inner] = case.error(case.run())
    # A handful of results may happen to cancel out.
    worst = {shape: error / (4 if shape[1] < 10 else 1) for shape, error in errors.items()}
    assert max(worst.values()) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("kib", [99, 163])
def test_as_on_a_gpu_of_less_shared_memory(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "most_shared_bytes", lambda: kib * 1024)
    for options in ((), ("norm",), ("norm", "silu"), ("residual", "bias")):
        for rows, (outs, inner) in itertools.product([1, 4, 9, 16], [(250, 2056), (512, 8192)]):
            case = Case(rows, outs, inner, "float16", *options)
            assert case.error(case.run()) < TOLERANCE["float16"], (rows, outs, inner, options)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sizes_that_no_wide_access_fits(dtype: str) -> None:
    for rows, outs, inner in [(1, 5, 7), (3, 33, 100), (2, 10, 1), (20, 9, 63)]:
        for options in ((), ("norm", "bias", "residual")):
            case = Case(rows, outs, inner, dtype, *options)
            assert case.error(case.run()) < TOLERANCE[dtype]


PLANS = [Plan(mtiles, stages) for mtiles, stages in itertools.product([1, 2, 4], [2, 3, 6])]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("options", [(), ("norm", "silu", "bias"), ("residual", "wide")])
def test_every_plan(plan: Plan, options: tuple[str, ...]) -> None:
    if "silu" in options and plan.mtiles == 1:
        pytest.skip("a gate needs pairs of tiles")
    for rows, outs, inner in [(1, 256, 8192), (7, 100, 640), (16, 8200, 2056), (32, 72, 4096)]:
        if plan.fits(compiler.most_shared_bytes(), rows, inner, "norm" in options):
            case = Case(rows, outs, inner, "float16", *options)
            assert case.error(case.run(plan)) < TOLERANCE["float16"]


def test_a_captured_chain_equals_the_same_calls() -> None:
    """Each kernel may start before the one whose result it reads has ended: it must still wait."""
    rng = np.random.default_rng(0)
    hidden, inner, layers = 1024, 3072, 24
    for rows in (1, 3, 16, 40):
        weights = [
            (
                normal(rng, hidden, dtype="float16"),
                normal(rng, 2 * inner, hidden, dtype="float16", scale=hidden**-0.5),
                normal(rng, hidden, inner, dtype="float16", scale=inner**-0.5),
            )
            for _ in range(layers)
        ]

        def model(x: Any, weights: Any = weights) -> Any:
            for norm, gate_up, down in weights:
                y = linears.linear(x, gate_up, norm=norm, eps=EPS, gate="silu")
                x = linears.linear(y, down, residual=x)
            return x

        x = normal(rng, rows, hidden, dtype="float16")
        model(x)  # compiles, makes handles
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            out = model(x)
            graph = stream.end_capture()
        for _ in range(5):
            x[...] = normal(rng, rows, hidden, dtype="float16")
            cupy.cuda.Device().synchronize()
            out.view(np.uint8).fill(0xFF)
            cupy.cuda.Device().synchronize()
            for _ in range(3):
                graph.launch(stream)
            stream.synchronize()
            assert cupy.array_equal(out.view(np.uint16), model(x).view(np.uint16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_cublas_sums_in_float32(dtype: str) -> None:
    rng = np.random.default_rng(1)
    for rows, outs, inner in [(64, 128, 8192), (1, 8, 65536), (300, 40, 16)]:
        x, weight = normal(rng, rows, inner, dtype=dtype), normal(rng, outs, inner, dtype=dtype)
        expected = wide(x) @ wide(weight).T
        assert relative_error(cublas.matmul(x, weight), expected) < TOLERANCE[dtype]
    ones = cupy.ones((2, 1 << 16), np.float16)
    # In float16, sums of ones stop at 2048.
    assert float(cublas.matmul(ones, ones * np.float16(0.5))[0, 0]) == 32768.0
