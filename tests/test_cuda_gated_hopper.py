"""Gated products on Hopper: the kernel on an emulated GPU, and how shapes are cut up."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.emulated_gated import TYPES, EmulatedGated, Variant

from tensorray.kernels.cuda import compiler, gated_hopper, linear
from tensorray.kernels.cuda.gated_hopper import Plan, choose, pays, plans
from tensorray.kernels.linear import linear_numpy

H200 = 132  # multiprocessors

SMALL = Variant(Plan(64, 32, stages=2))
PAIR = Variant(Plan(128, 48, stages=3), "__nv_bfloat16")
BANDS = Variant(Plan(256, 32, stages=2))
# What would go wrong on a GPU now and then.
MISTAKES = [
    Variant(Plan(128, 32, stages=2), edit=edit)
    for edit in (
        ("wait_for_products<1>();  // of", "// slots are let go before they are read"),
        ("CONSUMING_THREADS / 32);", "/* one warpgroup's word is enough */ 4);"),
        ("      wait_for_previous_kernel();\n      const", "// x is read too early\n const"),
        ("(k * STEP >> 4)", "/* a wrong column */ (k * 2 * STEP >> 4)"),
        (
            "  synchronize_threads<1, CONSUMING_THREADS>();  // nobody",
            "// the ring is written while it is read",
        ),
        (
            "    synchronize_threads<1, CONSUMING_THREADS>();\n    store",
            "// results are stored before they are there\n store",
        ),
    )
]
VARIANTS = (SMALL, PAIR, BANDS, *MISTAKES)


def has_compiler() -> bool:
    if not shutil.which("g++"):
        return False
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True)
    machine = subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True, check=True)
    return int(version.stdout.split(".")[0]) >= 12 and machine.stdout.startswith("x86_64")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGated:
    if not has_compiler():
        pytest.skip("emulating a GPU needs g++ 12 or later")
    return EmulatedGated(VARIANTS, tmp_path_factory.mktemp("emulated"))


def check(
    emulated: EmulatedGated,
    variant: Variant,
    rows: int,
    results: int,
    inner: int,
    gate: Any = "silu",
    *,
    ahead: bool = True,
    seed: int = 0,
) -> None:
    rng = np.random.default_rng([rows, results, inner])
    dtype = TYPES[variant.element]
    x = rng.standard_normal((rows, inner)).astype(dtype)
    weight = (rng.standard_normal((2 * results, inner)) * inner**-0.5).astype(dtype)
    found = emulated.run(variant, x, weight, gate, weight_ahead=ahead, seed=seed)
    expected = linear_numpy(x.astype(np.float64), weight.astype(np.float64), gate=gate)
    epsilon = {np.float16: 2**-11, ml_dtypes.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(
        found.astype(np.float64), expected, rtol=1.01 * epsilon, atol=2e-5 + epsilon / 64
    )


def test_one_warpgroup(emulated: EmulatedGated) -> None:
    # Fewer chunks than stages, rows and results that fill no tile, a chunk that is not full.
    check(emulated, SMALL, 17, 24, 64)
    check(emulated, SMALL, 64, 16, 64 * 6 + 8, "gelu_tanh")
    check(emulated, SMALL, 70, 24, 200, ahead=False)


def test_two_warpgroups(emulated: EmulatedGated) -> None:
    check(emulated, PAIR, 100, 24, 64 * 5 + 16, "gelu_tanh")
    check(emulated, PAIR, 140, 32, 64 * 2, ahead=False)


def test_two_bands_of_rows_a_warpgroup(emulated: EmulatedGated) -> None:
    check(emulated, BANDS, 250, 16, 64 * 4)


def test_any_order_of_events_gives_the_same_bits(emulated: EmulatedGated) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 64 * 6)).astype(np.float16)
    weight = rng.standard_normal((32, 64 * 6)).astype(np.float16)
    found = [emulated.run(SMALL, x, weight, "silu", seed=seed) for seed in range(3)]
    assert all(np.array_equal(each, found[0]) for each in found)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.edit[1][3:])
def test_the_emulation_notices_mistakes(emulated: EmulatedGated, mistake: Variant) -> None:
    def try_orders() -> None:
        for seed in range(8):
            check(emulated, mistake, 128, 16, 64 * 5, seed=seed)

    with pytest.raises(AssertionError):
        try_orders()


def test_every_plan_is_one_that_the_kernel_takes() -> None:
    header = (compiler.SOURCES / "hopper.cuh").read_text()
    instructions = {int(each) for each in re.findall(r"constexpr \(N == (\d+)\)", header)}
    assert len(plans()) > 6
    for plan in plans():
        assert plan.outs in instructions
        assert plan.outs % 16 == 0
        assert plan.stages >= 2
        assert plan.shared_bytes <= 227 * 1024
        # Registers of a thread for sums.
        assert plan.outs / 2 * (2 if plan.rows == 256 else 1) <= 192


MEASURED = [  # microseconds on an H200; what cuBLAS and a kernel for the gate took
    (17, 14336, 4096, Plan(64, 224, 6), 58.2, 62.0),
    (64, 14336, 4096, Plan(64, 224, 6), 58.6, 65.0),
    (96, 14336, 4096, Plan(128, 224, 5), 60.9, 66.0),
    (128, 14336, 4096, Plan(128, 224, 5), 62.2, 71.4),
    (256, 14336, 4096, Plan(128, 224, 5), 88.8, 99.5),
    (384, 14336, 4096, Plan(128, 224, 5), 132.9, 142.0),
    (512, 14336, 4096, Plan(128, 176, 5), 167.7, 184.5),
    (1024, 14336, 4096, Plan(256, 176, 4), 323.5, 345.0),
    (2048, 14336, 4096, Plan(256, 176, 4), 641.6, 695.0),
    (64, 7168, 4096, Plan(64, 112, 8), 31.4, 34.5),
    (128, 7168, 4096, Plan(128, 112, 7), 33.2, 37.2),
    (256, 7168, 4096, Plan(128, 224, 5), 45.3, 52.6),
    (64, 14336, 8192, Plan(64, 224, 6), 112.4, 119.3),
]


@pytest.mark.parametrize(("rows", "results", "inner", "plan", "took", "theirs"), MEASURED)
def test_plans_are_those_that_were_measured_best(
    rows: int, results: int, inner: int, plan: Plan, took: float, theirs: float
) -> None:
    assert choose(rows, results, inner, H200) == plan
    predicted = gated_hopper.microseconds(plan, rows, results, inner, H200)
    assert predicted == pytest.approx(took, rel=0.08)
    assert pays(plan, rows, results, inner, H200)
    assert took < theirs


def test_where_it_does_not_pay() -> None:
    def serves(rows: int, results: int, inner: int) -> bool:
        return pays(choose(rows, results, inner, H200), rows, results, inner, H200)

    # 192 rows of 8B: cuBLAS and the gate took 79 to 87 us, the best plan 89.
    assert not serves(192, 14336, 4096)
    assert serves(256, 3072, 1024)  # 7.7 us, 9.6 by cuBLAS


class Array:
    """What is asked of a CuPy array."""

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.float16, start: int = 4096) -> None:
        self.shape, self.dtype, self.ndim = shape, np.dtype(dtype), len(shape)
        self.itemsize = self.dtype.itemsize
        self.strides = (self.itemsize * shape[-1], self.itemsize)[-len(shape) :]
        self.data = SimpleNamespace(ptr=start)
        self.device = SimpleNamespace(id=0)
        self.flags = SimpleNamespace(c_contiguous=True)

    def __len__(self) -> int:
        return self.shape[0]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_hopper, "is_hopper", lambda device: True)


@pytest.mark.usefixtures("hopper")
def test_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = Array((64, 4096)), Array((28672, 4096))
    assert gated_hopper.plan_for(x, weight, H200) == Plan(64, 224, 6)
    for rows, of in [
        (Array((192, 4096)), weight),
        (Array((0, 4096)), weight),
        (x, Array((28672, 4096), ml_dtypes.bfloat16)),
        (Array((64, 4096), np.float32), Array((28672, 4096), np.float32)),
        (Array((64, 4096), start=4098), weight),
        (x, Array((28672, 4096), start=4098)),
        (Array((64, 4100)), Array((28672, 4100))),
        (x, Array((28680, 4096))),
    ]:
        assert gated_hopper.plan_for(rows, of, H200) is None
    monkeypatch.setattr(gated_hopper, "is_hopper", lambda device: False)
    assert gated_hopper.plan_for(x, weight, H200) is None


@pytest.mark.usefixtures("hopper")
def test_linears_use_it_where_there_is_a_gate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else cuBLAS and a kernel for the rest."""

    def by_own(x: Any, weight: Any, gate: str, plan: Plan, *, weight_ahead: bool) -> Any:
        assert weight_ahead
        return gate, plan

    monkeypatch.setattr(linear.gated_hopper, "gated_product", by_own)
    monkeypatch.setattr(linear.compiler, "multiprocessors", lambda: H200)
    monkeypatch.setattr(linear, "_capturing", lambda: True)
    monkeypatch.setattr(linear, "as_rows", lambda array: array)
    monkeypatch.setattr(linear.cublas, "matmul", lambda x, weight: "cuBLAS")
    monkeypatch.setattr(linear, "finish", lambda y, bias, **given: (y, given["kind"]))
    x, weight = Array((64, 4096)), Array((28672, 4096))
    assert linear.linear(x, weight, gate="silu") == ("silu", Plan(64, 224, 6))
    assert linear.linear(x, weight, Array((28672,)), gate="silu") == ("cuBLAS", "silu")
    assert linear.linear(x, weight) == "cuBLAS"
    uneven = Array((192, 4096)), weight
    assert linear.linear(*uneven, gate="gelu_tanh") == ("cuBLAS", "gelu_tanh")


@pytest.mark.usefixtures("hopper")
def test_what_a_start_needs_is_compiled_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def record(source: str, arch: str, **constants: int | str) -> bytes:
        compiled.append((source, arch, constants))
        return b""

    monkeypatch.setattr(gated_hopper.compiler, "compile", record)
    monkeypatch.setattr(gated_hopper.compiler, "device_arch", lambda: "sm_90a")
    monkeypatch.setattr(gated_hopper.compiler, "multiprocessors", lambda: H200)
    weight = Array((28672, 4096))
    needed = [(rows, plan) for rows, *shape, plan, _, _ in MEASURED if shape == [14336, 4096]]
    gated_hopper.compile_ahead([(weight, rows) for rows, _ in needed] * 2)
    assert len({str(each) for each in compiled}) == len(compiled)
    for _, plan in needed:
        assert ("gated_hopper.cu", "sm_90a", plan.constants("__half")) in compiled
    compiled.clear()
    gated_hopper.compile_ahead([(Array((28672, 4096), np.float32), 64), (weight, 192)])
    assert not compiled


def test_a_launch_gives_the_kernel_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, ...]] = []

    def function(name: str, shared_bytes: int) -> Any:
        assert name == "gated_product"
        assert 48 * 1024 < shared_bytes <= 227 * 1024
        return lambda grid, block, *given, **named: launched.append((grid, block, given, named))

    maps: list[tuple[Any, ...]] = []

    def tensor_map(*description: Any) -> Any:
        maps.append(description)
        return np.zeros((), "V128")[()]

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(empty=Array))
    monkeypatch.setattr(gated_hopper, "tensor_map", tensor_map)
    module = SimpleNamespace(function=function)
    monkeypatch.setattr(gated_hopper.compiler, "load", lambda *source, **constants: module)
    x, weight = Array((140, 512)), Array((400, 512))
    y = gated_hopper.gated_product(x, weight, "silu", Plan(128, 96, 4), weight_ahead=True)
    assert y.shape == (140, 200)

    source = (compiler.SOURCES / "gated_hopper.cu").read_text()
    declared = re.search(r" gated_product\((.*?)\) \{", source, re.DOTALL)
    assert declared
    names = [re.split(r"[ *]+", parameter.strip())[-1] for parameter in declared[1].split(",")]
    ((grid, block, given, named),) = launched
    assert dict(zip(names[2:], given[2:], strict=True)) == {
        **{"y": y, "inner": 512, "results": 200, "rows": 140, "gate": 1, "weight_ahead": True},
    }
    assert names[:2] == ["x_map", "weight_map"]
    # Two tiles of rows by five of 48 results.
    assert (grid, block, named) == ((10,), (384,), {"overlap": True})
    x_map, weight_map = maps
    assert x_map[2:] == ((512, 140), (1024,), (64, 128))
    assert weight_map[2:] == ((512, 400), (1024,), (64, 48))
