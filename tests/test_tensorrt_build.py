"""Segments compiled by TensorRT-RTX, ahead of time and without a GPU: a real TensorRT checks
every definition at published sizes. What layers compute is checked on their definition."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import tiny_models
from helpers.network_eval import evaluate
from helpers.paged_run import PagedRun
from helpers.published_configs import PUBLISHED

from tensorray.builder.array_ops import ArrayOps, LayerKV
from tensorray.builder.checkpoint.config import read_config
from tensorray.builder.checkpoint.open import open_checkpoint
from tensorray.builder.graph import (
    ROWS,
    DTypes,
    KernelCall,
    Node,
    Segment,
    Spec,
    WeightRef,
    trace,
    trace_segment,
)
from tensorray.builder.joining import join
from tensorray.builder.load import load_weights
from tensorray.builder.model import Model, ModelConfigError, ShardWeights
from tensorray.builder.plan import (
    Binding,
    Plan,
    Profile,
    ProfileSet,
    build_plan,
    decode_profiles,
    default_profiles,
    plan_key,
    prefill_profiles,
)
from tensorray.builder.registry import resolve
from tensorray.builder.tensorrt_flavour import (
    Flavour,
    Target,
    TargetError,
    TensorRT8,
    TensorRTError,
    TimingCache,
    load_flavour,
)
from tensorray.builder.tensorrt_ops import TensorRTOps

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'tensorray[rtx]'")

Build = Callable[..., Plan]
BFLOAT16 = DTypes("bfloat16", "bfloat16")
ONE_PROFILE = ProfileSet((Profile(1, 8, 64),))


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return load_flavour("tensorrt_rtx")


@pytest.fixture(scope="module")
def build(flavour: Flavour) -> Build:
    """Builds what no test before has built: models share segments."""
    built: dict[str, Plan] = {}

    def build(
        segment: Segment,
        architecture: str = "sm_89",
        dtypes: DTypes = BFLOAT16,
        profiles: ProfileSet | None = None,
    ) -> Plan:
        target = flavour.target(architecture)
        profiles = profiles or default_profiles(target)
        key = plan_key(segment, dtypes=dtypes, profiles=profiles, target=target)
        if key not in built:
            built[key] = build_plan(
                segment, dtypes=dtypes, profiles=profiles, target=target, flavour=flavour
            )
        assert built[key].key == key
        return built[key]

    return build


def load(name: str) -> tuple[Model, ShardWeights]:
    checkpoint = open_checkpoint(str(tiny_models.directory(name)))
    try:
        model = resolve(checkpoint.config)(checkpoint.config)
        return model, load_weights(model, checkpoint)
    finally:
        checkpoint.close()


# --- every definition --------------------------------------------------------------------------


@cache
def published_segments(name: str, ranks: int) -> list[Segment]:
    return join(trace(PUBLISHED[name].model(ranks))).segments()


@pytest.mark.parametrize("architecture", ["sm_89", "sm_120"])
@pytest.mark.parametrize(
    ("name", "ranks"), [(name, ranks) for name in PUBLISHED for ranks in PUBLISHED[name].ranks]
)
def test_published_models_compile(build: Build, name: str, ranks: int, architecture: str) -> None:
    for segment in published_segments(name, ranks):
        plan = build(segment, architecture)
        assert len(plan.data) < 8 << 20  # no weights in it
        assert [binding.shape for binding in plan.weights] == [s.shape for s in segment.weights]


@pytest.mark.parametrize(
    "dtypes",
    [DTypes("float16", "float16"), DTypes("float16", "float32"), DTypes("float32", "float32")],
    ids=lambda dtypes: f"{dtypes.compute}-{dtypes.residual}",
)
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_other_dtypes_compile(build: Build, name: str, dtypes: DTypes) -> None:
    config = read_config(tiny_models.directory(name), {})
    for segment in join(trace(resolve(config)(config))).segments():
        plan = build(segment, dtypes=dtypes, profiles=ONE_PROFILE)
        for binding, spec in zip(plan.outputs, segment.output_specs, strict=True):
            assert binding.dtype == dtypes.of(spec.dtype)


# --- what the layers compute ---------------------------------------------------------------------


class NetworkOps(ArrayOps):
    """Runs segments as TensorRT networks, evaluated with NumPy."""

    def __init__(self, kv: list[LayerKV], flavour: Flavour, dtypes: DTypes) -> None:
        super().__init__(np, kv)
        self.flavour = flavour
        self.dtypes = dtypes

    def run(self, segment: Segment, inputs: list[Any], weights: list[Any]) -> list[Any]:
        network = self.flavour.create_network()
        ops = TensorRTOps(self.flavour, network, self.dtypes)
        names: dict[str, Any] = {}
        arguments: list[list[Any]] = [[], []]
        groups = ((inputs, segment.inputs), (weights, segment.weights))
        for symbols, (arrays, specs) in zip(arguments, groups, strict=True):
            for array, spec in zip(arrays, specs, strict=True):
                name = f"i{len(names)}"
                symbols.append(ops.input(name, spec))
                names[name] = array.astype(self.dtypes.of(spec.dtype))
        for index, value in enumerate(segment.run(ops, *arguments)):
            ops.output(f"y{index}", value)
        outputs = evaluate(self.flavour.trt, network, names)
        return [outputs[f"y{index}"] for index in range(len(outputs))]


class NetworkRun(PagedRun):
    """A paged run whose segments are TensorRT networks, evaluated with NumPy."""

    ops: NetworkOps

    def __init__(self, name: str, flavour: Flavour, dtypes: DTypes) -> None:
        model, weights = load(name)
        super().__init__(model, weights, make_ops=lambda kv: NetworkOps(kv, flavour, dtypes))
        self.program = trace(model)

    def step(self, chunks: Any) -> Any:
        batch = self.ops.batch = self._pack(chunks)
        groups = {"embed": self.weights.embed, "head": self.weights.head, **self.weights.layers}
        values: dict[int, Any] = {0: batch.tokens}

        def fetch(argument: int | WeightRef) -> Any:
            if isinstance(argument, WeightRef):
                return groups[argument.group].arrays[argument.name]
            return values[argument]

        for call in self.program.calls:
            if isinstance(call, KernelCall):
                arguments = [fetch(argument) for argument in call.arguments]
                results = getattr(self.ops, call.op)(*arguments, **dict(call.attributes))
                results = results if len(call.outputs) > 1 else [results]
            else:
                inputs = [fetch(value) for value in call.inputs]
                weights = [fetch(reference) for reference in call.weights]
                results = self.ops.run(call.segment, inputs, weights)
            values.update(zip(call.outputs, results, strict=True))
        return np.split(values[self.program.result], batch.query_starts[1:-1])


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_layers_give_the_models_logits(flavour: Flavour, name: str) -> None:
    """Against transformers' own logits."""
    run = NetworkRun(name, flavour, DTypes("float32", "float32"))
    for i, reference in enumerate(tiny_models.references(name)):
        (logits,) = run.step([(str(i), reference.prompt)])
        assert np.abs(logits - reference.logits).max() < 1e-4


def test_statistics_survive_a_residual_stream_beyond_float16(flavour: Flavour) -> None:
    """Gemma 3's reaches 104,000: float32 in, normed in float32, products in float16."""

    def math(op: Any, x: Any, delta: Any, norm: Any, weight: Any) -> Any:
        x = op.add_residual(x, delta)
        return [x, op.linear(op.rms_norm(x, norm, 1e-6), weight)]

    stream, compute = Spec((ROWS, 64), "residual"), Spec((ROWS, 64), "compute")
    segment = trace_segment(
        math, [stream, compute], [Spec((64,), "compute"), Spec((32, 64), "compute")]
    )
    ops = NetworkOps([], flavour, DTypes("float16", "float32"))
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((5, 64)) * 104_000).astype(np.float32)
    delta = generator.standard_normal((5, 64)).astype(np.float16)
    norm, weight = (generator.standard_normal(s).astype(np.float16) for s in ((64,), (32, 64)))
    found = ops.run(segment, [x, delta], [norm, weight])
    wide = [array.astype(np.float32) for array in (x, delta, norm, weight)]
    expected = segment.run(ArrayOps(np, []), wide[:2], wide[2:])
    assert [array.dtype for array in found] == [np.float32, np.float16]
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(a - b) < 2e-3 * np.linalg.norm(b)


# --- what TensorRT rejects -----------------------------------------------------------------------


def test_a_rejected_op_is_named_with_tensorrts_message(build: Build) -> None:
    """A graph that tracing would not have made: the weight's width is off by one."""
    x, weight = Spec((ROWS, 64), "compute"), Spec((32, 64), "compute")
    segment = trace_segment(lambda op, x, w: op.silu(op.linear(x, w)), [x], [weight])
    broken = replace(segment, weights=(Spec((32, 63), "compute"),))
    with pytest.raises(TensorRTError, match=r"0\.linear/matmul.* = 64 .* = 63 but must match"):
        build(broken)
    assert build(segment).data  # and the next build is not affected


def test_a_type_that_tensorrt_rejects_is_named(build: Build) -> None:
    spec = Spec((ROWS, 64), "int32")
    segment = Segment((spec,), (), (Node("silu", (0,), (), (spec,)),), (1,))
    assert build(segment).data  # cast to float32 and back
    mixed = Segment(
        (spec, Spec((ROWS, 64), "compute")), (), (Node("add", (0, 1), (), (spec,)),), (2,)
    )
    with pytest.raises(TensorRTError, match=r"0\.add/add.*must have same input types"):
        build(mixed)


def test_a_rejected_network_has_tensorrts_message(flavour: Flavour) -> None:
    network = flavour.create_network()
    ops = TensorRTOps(flavour, network, DTypes())
    ops.output("y0", ops.silu(ops.input("x0", Spec((ROWS, 8), "compute"))))
    with pytest.raises(TensorRTError, match="optimization profile"):
        flavour.compile(network, flavour.target("sm_89"), [])


def test_segments_that_fail_to_compile_are_named(
    flavour: Flavour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were bfloat16 not refused up front for SM 7.5, TensorRT would say this."""
    monkeypatch.setattr(flavour, "check_dtype", lambda dtype, target: None)
    weight = Spec((64, 64), "compute")
    segment = trace_segment(
        lambda op, x, w: op.linear(x, w), [Spec((ROWS, 64), "compute")], [weight]
    )
    target = flavour.target("sm_75")
    with pytest.raises(TensorRTError, match=r"segment \[linear\]: .*sm75"):
        build_plan(segment, dtypes=DTypes(), profiles=ONE_PROFILE, target=target, flavour=flavour)


# --- bad input -----------------------------------------------------------------------------------


def test_ranks_that_do_not_divide_a_model() -> None:
    with pytest.raises(ModelConfigError, match=r"sizes that do: 1, 2, 4"):
        PUBLISHED["Qwen2-7B"].model(8)
    with pytest.raises(ModelConfigError, match=r"sizes that do: 1, 5, 25"):
        PUBLISHED["gpt2-xl"].model(2)


def test_unknown_target(flavour: Flavour) -> None:
    with pytest.raises(TargetError, match=r"'sm_90'; it has sm_75, .*sm_89, sm_120"):
        flavour.target("sm_90")


def test_dtype_that_the_target_lacks(flavour: Flavour, build: Build) -> None:
    segment = trace_segment(lambda op, x: op.silu(x), [Spec((ROWS, 64), "compute")])
    with pytest.raises(TargetError, match=r"sm_75 has no bfloat16; it has float16, float32"):
        build(segment, "sm_75")
    assert build(segment, "sm_75", DTypes("float16", "float32")).data
    with pytest.raises(ValueError, match=r"float8: must be one of bfloat16, float16, float32"):
        DTypes("float8")


def test_unknown_flavour() -> None:
    with pytest.raises(TargetError, match=r"'tensorrt9'; there are tensorrt, tensorrt_rtx"):
        load_flavour("tensorrt9")


def test_flavour_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(TargetError, match=r"pip install .*rtx"):
        load_flavour("tensorrt_rtx")


def test_tensorrt_without_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flavours that build for the local GPU say so, and what it is."""
    from tensorray.builder import tensorrt_flavour

    class Module:
        __version__ = "10.9.0"

        class ILogger:
            class Severity:
                INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    monkeypatch.setitem(sys.modules, "tensorrt", Module)  # type: ignore[arg-type]
    monkeypatch.setattr(tensorrt_flavour, "local_gpu", lambda: None)
    local = load_flavour("tensorrt")
    assert local.architectures() == []
    with pytest.raises(TargetError, match=r"this machine's GPU \(none .*tensorrt_rtx"):
        local.target("sm_90")
    gpu = tensorrt_flavour.GPU("NVIDIA H200", "sm_90")
    monkeypatch.setattr(tensorrt_flavour, "local_gpu", lambda: gpu)
    with pytest.raises(TargetError, match=r"NVIDIA H200, sm_90.* not for 'sm_120'"):
        local.target("sm_120")
    monkeypatch.setattr(Module, "__version__", "9.3.0")
    with pytest.raises(TargetError, match=r"9\.3\.0 is not supported"):
        load_flavour("tensorrt")


# --- plans and their keys ------------------------------------------------------------------------

MLP_INPUT = Spec((ROWS, 64), "compute")


def mlp(op: Any, x: Any, gate_up: Any, down: Any) -> Any:
    gate, up = op.split(op.linear(x, gate_up), [96, 96])
    return op.linear(op.silu(gate) * up, down)


MLP = trace_segment(mlp, [MLP_INPUT], [Spec((192, 64), "compute"), Spec((64, 96), "compute")])
TARGET = Target("tensorrt_rtx", "1.7", "sm_89", None, (("flags", 0),))


def test_a_plan_lists_its_bindings(build: Build) -> None:
    plan = build(MLP, dtypes=DTypes("float16", "float32"))
    assert plan.inputs == (Binding("x0", (ROWS, 64), "float16"),)
    assert plan.weights == (
        Binding("w0", (192, 64), "float16"),
        Binding("w1", (64, 96), "float16"),
    )
    assert plan.outputs == (Binding("y0", (ROWS, 64), "float16"),)
    assert plan.segment == MLP.digest()
    assert plan.target.gpu is None
    assert plan.seconds > 0


def test_keys_name_all_that_plans_depend_on() -> None:
    base: dict[str, Any] = {"dtypes": DTypes(), "profiles": ONE_PROFILE, "target": TARGET}
    keys = [
        plan_key(MLP, **base),
        plan_key(replace(MLP, outputs=(2,)), **base),
        plan_key(MLP, **{**base, "dtypes": DTypes("float16", "float16")}),
        plan_key(MLP, **{**base, "dtypes": DTypes("bfloat16", "float32")}),
        plan_key(MLP, **{**base, "profiles": ProfileSet((Profile(1, 9, 64),))}),
    ]
    changes: list[dict[str, Any]] = [
        {"flavour": "tensorrt"},
        {"version": "1.8"},
        {"architecture": "sm_120"},
        {"gpu": "NVIDIA L4"},
        {"settings": (("flags", 1),)},
    ]
    keys += [plan_key(MLP, **{**base, "target": replace(TARGET, **change)}) for change in changes]
    assert len(set(keys)) == len(keys)


def test_keys_are_the_same_everywhere() -> None:
    """Another process, with other hash seeds; no TensorRT is loaded for a key."""
    code = (
        "from tensorray.builder.graph import *\nfrom tensorray.builder.plan import *\n"
        "from tensorray.builder.tensorrt_flavour import Target\n"
        f"print(plan_key({MLP!r}, dtypes=DTypes(), profiles={ONE_PROFILE!r}, target={TARGET!r}))\n"
        "import sys; assert 'tensorrt_rtx_bindings' not in sys.modules"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert plan_key(MLP, dtypes=DTypes(), profiles=ONE_PROFILE, target=TARGET) == other


def test_targets_hold_the_builders_settings(flavour: Flavour) -> None:
    settings = dict(flavour.target("sm_89").settings)
    assert settings.keys() == {"flags", "optimization_level", "tactic_sources"}
    assert settings["flags"] & 1 << int(flavour.trt.BuilderFlag.TF32) == 0


@pytest.mark.parametrize(("heads", "asked", "level"), [(1, None, 3), (4, None, 0), (4, 2, 3)])
def test_norms_of_heads_are_not_searched_for_long(
    flavour: Flavour, heads: int, asked: int | None, level: int
) -> None:
    """By TensorRT 8.6, whose networks are read as TensorRT-RTX's are."""
    network = flavour.create_network()
    ops = TensorRTOps(flavour, network, DTypes())
    x, weight = (
        ops.input(name, Spec(shape, "compute"))
        for name, shape in (("x", (ROWS, 32)), ("w", (32 // heads,)))
    )
    ops.output("y", ops.rms_norm(ops.heads(x, 32 // heads) if heads > 1 else x, weight, 1e-6))
    config = SimpleNamespace(builder_optimization_level=3)
    old = SimpleNamespace(trt=flavour.trt, optimization_level=asked)
    TensorRT8.limit_search(old, config, network)  # type: ignore[arg-type]
    assert config.builder_optimization_level == level


def test_nothing_is_timed_ahead_of_time(flavour: Flavour) -> None:
    timing = TimingCache(b"of some GPU")
    plan = build_plan(
        MLP,
        dtypes=DTypes(),
        profiles=ONE_PROFILE,
        target=flavour.target("sm_89"),
        flavour=flavour,
        timing_cache=timing,
    )
    assert plan.data
    assert timing.data == b"of some GPU"


def test_a_target_goes_with_its_flavour(flavour: Flavour) -> None:
    other = replace(flavour.target("sm_89"), version="0.1")
    with pytest.raises(ValueError, match=r"tensorrt_rtx 0\.1"):
        build_plan(MLP, dtypes=DTypes(), profiles=ONE_PROFILE, target=other, flavour=flavour)


# --- profiles ------------------------------------------------------------------------------------


def test_profiles_pick_a_bucket_for_a_number_of_rows() -> None:
    target = replace(TARGET, gpu="NVIDIA H200")
    profiles = default_profiles(target, max_rows=2048)
    assert [profile.best for profile in profiles.profiles] == [
        *(1, 2, 4, 8, 16, 32, 64, 128, 256),
        *(512, 1024, 2048),
    ]
    assert profiles.pick(1) == (0, 1)
    assert profiles.pick(3) == (2, 4)  # padded to the bucket
    assert profiles.pick(256) == (8, 256)
    assert profiles.pick(257) == (9, 257)  # as it is, in a range
    assert profiles.pick(2048) == (11, 2048)
    for rows in (0, 2049):
        with pytest.raises(ValueError, match="serves 1 to 2048"):
            profiles.pick(rows)


@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
@pytest.mark.parametrize(("max_decode", "max_rows"), [(256, 8192), (3, 8192), (300, 1000), (8, 8)])
def test_profiles_serve_every_number_of_rows(
    gpu: str | None, max_decode: int, max_rows: int
) -> None:
    profiles = default_profiles(replace(TARGET, gpu=gpu), max_decode=max_decode, max_rows=max_rows)
    assert profiles.max_rows == max_rows
    for rows in range(1, max_rows + 1):
        index, padded = profiles.pick(rows)
        profile = profiles.profiles[index]
        assert rows <= padded
        assert profile.smallest <= padded <= profile.largest
        assert padded < 2 * rows or padded <= max_decode


def test_decode_buckets_end_at_the_largest_batch() -> None:
    assert [p.largest for p in decode_profiles(24)] == [1, 2, 4, 8, 16, 24]
    assert [(p.smallest, p.largest) for p in prefill_profiles(25, 100)] == [
        (25, 32),
        (33, 64),
        (65, 100),
    ]


def test_bad_profiles() -> None:
    with pytest.raises(ValueError, match="rise from 1"):
        Profile(0, 1, 1)
    with pytest.raises(ValueError, match="rise from 1"):
        Profile(4, 2, 8)
    with pytest.raises(ValueError, match="overlap"):
        ProfileSet((Profile(1, 1, 4), Profile(4, 8, 8)))
    with pytest.raises(ValueError, match="needs a profile"):
        ProfileSet(())
