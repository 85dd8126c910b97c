"""How products of few rows are cut up on a GPU; needs none."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorray.kernels.cuda import compiler, linear
from tensorray.kernels.cuda.linear import Plan, choose

H200 = 132, 227 * 1024  # multiprocessors, shared memory that a block may have
#: The latter, in KiB: of compute capability 8.6, 8.9 and 12.x; of 8.0; of 9.0 and 10.0.
LIMITS = [99, 163, 227]
SPARE = 1024

# Outputs, inputs, and what comes with the product.
SHAPES = {
    "Llama 3.1 8B": [
        *((6144, 4096, "norm"), (4096, 4096, ""), (28672, 4096, "norm gate")),
        *((4096, 14336, ""), (128256, 4096, "norm")),
    ],
    "Qwen3 0.6B": [
        *((4096, 1024, "norm"), (1024, 2048, ""), (6144, 1024, "norm gate")),
        *((1024, 3072, ""), (151936, 1024, "norm")),
    ],
    "Gemma 3 270M": [
        *((1536, 640, "norm"), (640, 1024, ""), (4096, 640, "norm gate")),
        *((640, 2048, ""), (262144, 640, "norm")),
    ],
    "Gemma 3 4B": [
        *((4096, 2560, "norm"), (2560, 2048, ""), (20480, 2560, "norm gate")),
        *((2560, 10240, ""), (262144, 2560, "norm")),
    ],
    "Mixtral 8x7B": [
        *((6144, 4096, "norm"), (4096, 4096, ""), (8, 4096, "")),
        (32000, 4096, "norm"),
    ],
}


@given(
    outs=st.integers(1, 300_000),
    eighths=st.integers(1, 4096),
    rows=st.integers(1, linear.FEW_ROWS),
    wants_norm=st.booleans(),
    gated=st.booleans(),
    multiprocessors=st.sampled_from([20, 78, 108, 132, 188]),
    kib=st.sampled_from(LIMITS),
)
def test_any_shape_has_a_plan_that_fits(
    outs: int,
    eighths: int,
    rows: int,
    wants_norm: bool,
    gated: bool,
    multiprocessors: int,
    kib: int,
) -> None:
    inner = 8 * eighths
    normed = wants_norm and rows <= linear.FEW_NORMED_ROWS and inner <= linear.LONGEST_NORMED_ROW
    plan = choose(outs, inner, rows, normed, gated, multiprocessors, kib * 1024)
    if plan is None:  # of 99 KiB x takes too much of it
        assert kib == 99
        assert gated
        assert normed or rows > 8
        return
    assert plan.mtiles in ((2, 4) if gated else (1, 2, 4))
    assert plan.stages >= 2
    assert plan.shared_bytes(rows, inner, normed) <= kib * 1024 - SPARE


def mtiles(outs: int, inner: int, rows: int, normed: bool, gated: bool) -> int:
    plan = choose(outs, inner, rows, normed, gated, *H200)
    assert plan is not None
    return plan.mtiles


def test_the_plans_that_measured_best_on_an_h200() -> None:
    """Tiles of the fastest plans, or of ones within 2 % of them (kernels/cuda/NOTES.md)."""
    best = {
        # outs, in, rows, normed, gated: mtiles
        (6144, 4096, 1, True, False): 1,
        (4096, 4096, 1, False, False): 2,
        (28672, 4096, 1, True, True): 2,
        (4096, 14336, 1, False, False): 2,
        (128256, 4096, 1, True, False): 1,
        (6144, 4096, 16, False, False): 4,
        (4096, 4096, 16, False, False): 2,
        (28672, 4096, 16, False, True): 2,
        (4096, 14336, 16, False, False): 2,
        (128256, 4096, 16, False, False): 4,
        (4096, 1024, 1, True, False): 4,
        (1024, 2048, 1, False, False): 1,
        (6144, 1024, 1, True, True): 4,
        (1024, 3072, 1, False, False): 1,
        (151936, 1024, 1, True, False): 4,
        (151936, 1024, 16, False, False): 4,
    }
    chosen = {shape: mtiles(*shape) for shape in best}
    assert chosen == best


class Array:
    """What is asked of a CuPy array."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.ndim, self.dtype, self.itemsize = shape, len(shape), np.float16, 2
        self.strides = (2 * shape[-1], 2)[-len(shape) :]
        self.data, self.flags = SimpleNamespace(ptr=4096), SimpleNamespace(c_contiguous=True)

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, one: int, _: int) -> Array:
        return Array(one, self.shape[-1])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `linear` launches: names, and the plans of few rows' products."""
    calls: list[Any] = []

    def noted(name: str, result: Any) -> Any:
        return lambda *given, **named: calls.append(name) or result

    def few_rows(x: Any, weight: Any, bias: Any, norm: Any, *given: Any) -> None:
        plan, weight_ahead = given[-2:]
        assert weight_ahead
        used = plan.shared_bytes(len(x), x.shape[1], norm is not None)
        assert used <= compiler.most_shared_bytes() - SPARE
        calls.append(plan)

    def rms_norm(x: Any, weight: Any, eps: float) -> Any:
        calls.append("norm")
        return Array(*x.shape)

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setattr(linear.gated_hopper, "plan_for", lambda *given: None)
    monkeypatch.setattr(linear, "few_rows", few_rows)
    monkeypatch.setattr(linear, "rms_norm", rms_norm)
    monkeypatch.setattr(linear.cublas, "matmul", noted("cuBLAS", "y"))
    monkeypatch.setattr(linear, "finish", noted("finish", "y"))
    monkeypatch.setattr(compiler, "multiprocessors", lambda: 132)
    return calls


@pytest.mark.parametrize("kib", LIMITS)
@pytest.mark.parametrize("model", SHAPES)
def test_a_models_products_fit(
    model: str, kib: int, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1 to 64 rows, each by this kernel in memory that the GPU has, or else by cuBLAS."""
    monkeypatch.setattr(compiler, "most_shared_bytes", lambda: kib * 1024)
    for outs, inner, kind in SHAPES[model]:
        for rows in range(1, 65):
            made.clear()
            norm = Array(inner) if "norm" in kind else None
            gate = "silu" if "gate" in kind else None
            linear.linear(Array(rows, inner), Array(outs, inner), norm=norm, gate=gate)
            own = rows <= linear.FEW_ROWS and not (kib == 99 and gate and rows > 8)
            assert isinstance(made[-1], Plan) == own, (outs, inner, kind, rows)
            assert own or "cuBLAS" in made


@pytest.mark.parametrize(
    ("rows", "kib", "launches"),
    [
        (1, 99, [Plan(2, 2)]),
        (4, 99, ["norm", Plan(2, 2)]),  # four normed rows leave no room for two stages
        (16, 99, ["norm", "cuBLAS", "finish"]),
        (4, 163, [Plan(2, 3)]),
        (16, 163, ["norm", Plan(2, 3)]),
        (4, 227, [Plan(2, 5)]),
        (16, 227, ["norm", Plan(2, 4)]),
    ],
)
def test_what_takes_the_place_of_plans_that_do_not_fit(
    rows: int, kib: int, launches: list[Any], made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gated product of Llama 3.1 8B."""
    monkeypatch.setattr(compiler, "most_shared_bytes", lambda: kib * 1024)
    linear.linear(Array(rows, 4096), Array(28672, 4096), norm=Array(4096), gate="silu")
    assert made == launches


def test_a_device_is_asked_once_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a process's devices, which need not be alike."""
    here, asked = SimpleNamespace(device=0), []

    def device(index: int) -> Any:
        asked.append(index)
        most, count = {0: (99, 142), 1: (227, 132)}[index]
        found = {"MaxSharedMemoryPerBlockOptin": most * 1024, "MultiProcessorCount": count}
        return SimpleNamespace(attributes=found)

    runtime = SimpleNamespace(getDevice=lambda: here.device)
    cuda = SimpleNamespace(Device=device, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    compiler._attribute.cache_clear()
    try:
        for here.device in (0, 1, 0, 1):
            assert compiler.most_shared_bytes() == [99, 227][here.device] * 1024
        assert asked == [0, 1]
        for here.device in (0, 1, 0, 1):
            assert compiler.multiprocessors() == [142, 132][here.device]
        assert asked == [0, 1, 0, 1]
    finally:
        compiler._attribute.cache_clear()


def test_shared_memory_of_a_block() -> None:
    # Two chunks of 8 warps: 8 units of the weight and 2 of x, 512 bytes each; then the sums.
    assert Plan(2, 2).shared_bytes(1, 1024, False) == 2 * 8 * 10 * 512 + 8 * 8 * 36 * 4
    # x's normed rows instead, each with 64 bytes to spare.
    assert Plan(2, 2).shared_bytes(3, 1024, True) == 2 * 8 * 8 * 512 + 8 * 8 * 36 * 4 + 3 * 2112
