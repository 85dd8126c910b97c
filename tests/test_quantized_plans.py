"""Plans for quantized weights: which a real TensorRT makes, what their layers compute, and what
becomes of segments that it has nothing for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import tiny_models
from helpers.network_eval import evaluate
from helpers.published_configs import PUBLISHED
from helpers.quantized_files import float8_compressed, gptq, packed

from tensorray.actors.fused_segment import FusedSegment
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.build import (
    LocalWorkers,
    PlanRequest,
    compile_plan,
    fill,
    find_segments,
    look_up,
    plan_for,
)
from tensorray.builder.graph import ROWS, DTypes, Node, Segment, Spec, trace_segment
from tensorray.builder.model import ModelConfigError
from tensorray.builder.plan import (
    Profile,
    ProfileSet,
    build_plan,
    default_profiles,
    what_lacks,
)
from tensorray.builder.quantization import Form
from tensorray.builder.quantized_segment import (
    Product,
    flat,
    form_of,
    products,
    quantized_segment,
)
from tensorray.builder.registry import resolve
from tensorray.builder.store import DirectoryStore
from tensorray.builder.tensorrt_flavour import Flavour, NeedsKernels, TensorRTError, load_flavour
from tensorray.builder.tensorrt_ops import TensorRTOps
from tensorray.kernels.quantized import Kind, QuantizedWeight, dequantize, pack_int4

ONE_PROFILE = ProfileSet((Profile(1, 8, 64),))
KINDS: tuple[Kind, ...] = ("int4", "int8", "float8")

needs_rtx = pytest.mark.usefixtures("flavour")


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'tensorray[rtx]'")
    return load_flavour("tensorrt_rtx")


def random_weight(form: Form, seed: int = 0) -> QuantizedWeight:
    generator = np.random.default_rng(seed)
    codes = generator.integers(-8 if form.kind == "int4" else -128, 8, form.shape).astype(np.int8)
    values: dict[str, Any] = {"int4": pack_int4(codes), "int8": codes}
    values["float8"] = codes.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    by_group = (*form.shape[:-1], form.count)
    inputs = form.shape[-1]
    return QuantizedWeight(
        form.kind,
        form.group,
        values[form.kind],
        generator.uniform(0.01, 0.02, by_group).astype(np.float32),
        generator.integers(-8, 8, by_group).astype(np.int8) if form.zeros else None,
        generator.permutation(inputs).astype(np.int32) if form.ordered else None,
        generator.integers(0, form.count, inputs).astype(np.int32) if form.scattered else None,
    )


def mlp(op: Any, x: Any, norm: Any, gate_up: Any, bias: Any, down: Any) -> Any:
    gate, up = op.split(op.linear(op.rms_norm(x, norm, 1e-6), gate_up, bias), [96, 96])
    return op.linear(op.silu(gate) * up, down)


MLP = trace_segment(
    mlp,
    [Spec((ROWS, 64), "compute")],
    [Spec(shape, "compute") for shape in ((64,), (192, 64), (192,), (64, 96))],
)


def mlp_forms(product: Product) -> list[Form | None]:
    """Of the weights of MLP, in groups of 32 or by rows."""

    def form(rows: int, columns: int) -> Form:
        group = 32 if product.group else columns
        extras = (product.zeros, product.ordered, product.scattered)
        return Form(product.kind, (rows, columns), group, columns // group, *extras)

    return [None, form(192, 64), None, form(64, 96)]


def mlp_arrays(forms: list[Form | None]) -> tuple[list[Any], list[Any]]:
    generator = np.random.default_rng(1)
    x = generator.standard_normal((5, 64)).astype(np.float32)
    dense = [generator.standard_normal(shape).astype(np.float32) for shape in ((64,), (192,))]
    assert forms[1] is not None
    assert forms[3] is not None
    return [x], [dense[0], random_weight(forms[1]), dense[1], random_weight(forms[3], 2)]


ALL = [
    Product(kind, group, zeros, ordered, False)
    for kind in KINDS
    for group in (None, 32)
    for zeros in ([False] if kind == "float8" else [False, True])
    for ordered in ([False] if group is None else [False, True])
]


@pytest.mark.parametrize("product", ALL, ids=str)
def test_quantized_segments_are_the_same_math(product: Product) -> None:
    forms = mlp_forms(product)
    inputs, weights = mlp_arrays(forms)
    segment = quantized_segment(MLP, forms)
    assert [form_of(weight) for weight in weights] == forms
    arrays = flat(weights)
    assert [tuple(spec.shape) for spec in segment.weights if spec.dtype != "int4"] == [
        array.shape
        for array, spec in zip(arrays, segment.weights, strict=True)
        if spec.dtype != "int4"
    ]
    ops = ArrayOps(np, {})
    (found,) = segment.run(ops, inputs, arrays)
    (expected,) = MLP.run(ops, inputs, weights)
    np.testing.assert_array_equal(found, expected)
    assert products(segment) == [replace(product, group=32 if product.group else None)]
    assert products(MLP) == []


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_fused_segments_run_on_quantized_weights(rows: int) -> None:
    """What own kernels run is the segment as it was traced, whatever its weights are."""
    forms = mlp_forms(Product("int4", 32, True, True, False))
    _, weights = mlp_arrays(forms)
    x = np.random.default_rng(3).standard_normal((rows, 64)).astype(np.float32)
    (found,) = FusedSegment(MLP, rows, np).run([x], weights)
    dense = [dequantize(w) if isinstance(w, QuantizedWeight) else w for w in weights]
    (expected,) = MLP.run(ArrayOps(np, {}), [x], dense)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


# --- what TensorRT makes of them -----------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["sm_89", "sm_120"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_tensorrt_rtx_multiplies_by(flavour: Flavour, dtype: str, architecture: str) -> None:
    """With weights, scales and zeros as inputs: everything but a cut act-order."""
    target = flavour.target(architecture)
    for product in ALL:
        assert what_lacks(flavour, target, dtype, product) == "", product
    cut = Product("int4", 32, True, True, True)
    assert "groups of any number of columns" in what_lacks(flavour, target, dtype, cut)


@pytest.mark.parametrize("product", ALL, ids=str)
def test_layers_compute_the_product(flavour: Flavour, product: Product) -> None:
    forms = mlp_forms(product)
    inputs, weights = mlp_arrays(forms)
    segment = quantized_segment(MLP, forms)
    network = flavour.create_network()
    ops = TensorRTOps(flavour, network, DTypes("float32", "float32"))
    arrays: dict[str, Any] = {}
    symbols: list[list[Any]] = [[], []]
    codes = {"int4": np.int8, "int8": np.int8, "float8": ml_dtypes.float8_e4m3fn}
    groups = ((inputs, segment.inputs), (flat(weights), segment.weights))
    for some, (values, specs) in zip(symbols, groups, strict=True):
        for value, spec in zip(values, specs, strict=True):
            name = f"i{len(arrays)}"
            some.append(ops.input(name, spec))
            if spec.dtype == "int4":  # two a byte, the first in the low bits
                low, high = (value << 4).view(np.int8) >> 4, value.view(np.int8) >> 4
                value = np.stack([low, high], axis=-1).reshape(spec.shape)
            elif spec.dtype in codes:
                value = value.view(codes[spec.dtype])
            arrays[name] = value
    for index, value in enumerate(segment.run(ops, *symbols)):
        ops.output(f"y{index}", value)
    (found,) = evaluate(flavour.trt, network, arrays).values()
    (expected,) = segment.run(ArrayOps(np, {}), inputs, flat(weights))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


LLAMA = json.loads((tiny_models.directory("llama3") / "config.json").read_text())
PUBLISHED_QUANTIZED = {
    "gptq": gptq(group=128).config,
    "packed, asymmetric": packed(group=128, symmetric=False).config,
    "float8 channel": float8_compressed("channel").config,
}


@pytest.mark.parametrize("name", PUBLISHED_QUANTIZED)
@pytest.mark.parametrize("ranks", [1, 8])
def test_published_models_compile_quantized(flavour: Flavour, name: str, ranks: int) -> None:
    """Llama 3.1 8B, from a config alone."""
    published = PUBLISHED["Llama-3.1-8B"]
    config = {**published.model().config, "quantization_config": PUBLISHED_QUANTIZED[name]}
    target = flavour.target("sm_120")
    segments = find_segments(type(published.model()), config, tp_size=ranks)
    assert sum(len(products(each.segment)) for each in segments) >= 3
    for each in segments:
        plan = build_plan(
            each.segment,
            dtypes=DTypes(),
            profiles=default_profiles(target),
            target=target,
            flavour=flavour,
        )
        assert len(plan.data) < 8 << 20
        assert [b.dtype for b in plan.weights] == [
            DTypes().of(s.dtype) for s in each.segment.weights
        ]


# --- what it has nothing for ---------------------------------------------------------------------


def requests(flavour: Flavour, tp_size: int = 1) -> list[PlanRequest]:
    """Of a tiny model with act-order, whose inputs two ranks have to split."""
    quantization = gptq(act_order=True).config
    config = {**LLAMA, "quantization_config": quantization}
    segments = find_segments(resolve(config), config, tp_size=tp_size)
    target = flavour.target("sm_89")
    return [
        PlanRequest(each.name, each.segment, DTypes(), ONE_PROFILE, target) for each in segments
    ]


def test_a_build_marks_what_own_kernels_run(flavour: Flavour, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    needed = requests(flavour, tp_size=2)
    outcomes = fill(needed, store, LocalWorkers())
    marked = [each for each in outcomes if each.state == "kernels"]
    cut = [each for each in needed if any(p.scattered for p in products(each.segment))]
    assert [each.request for each in marked] == cut != []
    assert {each.state for each in outcomes} == {"kernels", "compiled"}
    for each in marked:
        assert "can't multiply by int4 weights with groups of 16, act-order" in each.error

    def compile(request: PlanRequest) -> Any:
        raise AssertionError("everything is known")

    again = fill(needed, store, LocalWorkers(compile))
    assert {each.state for each in again} == {"reused", "kernels"}
    assert [each.error for each in again] == [each.error for each in outcomes]
    assert [each.state for each in look_up(needed, store)] == [each.state for each in again]


def test_without_cuts_everything_compiles(flavour: Flavour, tmp_path: Path) -> None:
    outcomes = fill(requests(flavour), DirectoryStore(tmp_path), LocalWorkers())
    assert {each.state for each in outcomes} == {"compiled"}


def test_a_shard_that_asks_for_such_a_plan_is_told(flavour: Flavour, tmp_path: Path) -> None:
    (request,) = [
        each
        for each in requests(flavour, tp_size=2)
        if any(product.scattered for product in products(each.segment))
    ][:1]
    with pytest.raises(NeedsKernels, match=r"tensorrt_rtx .* inputs split over ranks"):
        plan_for(request, DirectoryStore(tmp_path), compile_plan)


def test_a_broken_segment_is_not_one_for_kernels(flavour: Flavour) -> None:
    form = mlp_forms(Product("int8", None, False, False, False))
    segment = quantized_segment(MLP, form)
    broken = replace(segment, weights=(Spec((63,), "compute"), *segment.weights[1:]))
    with pytest.raises(TensorRTError) as caught:
        build_plan(
            broken,
            dtypes=DTypes(),
            profiles=ONE_PROFILE,
            target=flavour.target("sm_89"),
            flavour=flavour,
        )
    assert not isinstance(caught.value, NeedsKernels)


def test_a_config_whose_groups_would_be_cut() -> None:
    config = {**LLAMA, "quantization_config": gptq(group=32).config}
    with pytest.raises(ModelConfigError, match="groups of 32"):
        find_segments(resolve(config), config, tp_size=2)


def test_only_linears_take_quantized_weights() -> None:
    form = Form("int8", (8, 8), 8, 1, False, False, False)
    spec = Spec((8, 8), "compute")
    segment = Segment((), (spec,), (Node("silu", (0,), (), (spec,)),), (1,))
    with pytest.raises(ValueError, match="silu"):
        quantized_segment(segment, [form])
