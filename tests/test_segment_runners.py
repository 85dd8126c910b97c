"""Which runner each segment gets, and what is remembered of it; TensorRT and CuPy are stand-ins."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from helpers import tiny_models
from helpers.fake_cupy import cupy
from helpers.fake_tensorrt import TARGET, FakeFlavour, plan_of, with_attribute

from tensorray.actors import plan_source, segment_runners
from tensorray.actors.array_segment import ArraySegment, Runner
from tensorray.actors.config import ShardConfig
from tensorray.actors.plan_source import PlanSource, open_source
from tensorray.actors.protocol import SegmentInfo
from tensorray.actors.segment_runners import SegmentBackend, SegmentRunners, open_runners
from tensorray.actors.segment_table import table
from tensorray.actors.segment_timer import rotation
from tensorray.actors.shard_host import load_executor
from tensorray.builder.build import PlanRequest, name_segments
from tensorray.builder.checkpoint import open_checkpoint
from tensorray.builder.graph import DTypes, Program, Segment, trace
from tensorray.builder.load import load_weights
from tensorray.builder.model import ShardWeights, Weights
from tensorray.builder.plan import Plan, Profile, ProfileSet
from tensorray.builder.quantized_segment import form_of, quantized_segment
from tensorray.builder.registry import resolve
from tensorray.builder.store import PlanStore, StoreError, open_store
from tensorray.builder.tensorrt_flavour import GPU, Flavour, TargetError, TensorRTError
from tensorray.kernels.cuda.linear import FEW_ROWS
from tensorray.kernels.quantized import QuantizedWeight

#: Gemma's: the residual stream is wider than products.
DTYPES = DTypes("float16", "float32")
PROFILES = ProfileSet((Profile(1, 1, 1), Profile(4, 4, 4), Profile(5, 16, 16)))
ROWS = (1, 4, 7, 16, 24)
SERVED = (1, 4, 7, 16)


@pytest.fixture(scope="module")
def program_and_weights() -> tuple[Program, ShardWeights]:
    checkpoint = open_checkpoint(str(tiny_models.directory("gemma3")))
    try:
        model = resolve(checkpoint.config)(checkpoint.config)
        loaded = load_weights(model, checkpoint, dtype=np.float16)
    finally:
        checkpoint.close()

    def on_device(weights: Weights) -> Weights:
        return Weights({name: cupy.asarray(array) for name, array in weights.arrays.items()})

    layers = {layer: on_device(weights) for layer, weights in loaded.layers.items()}
    weights = ShardWeights(on_device(loaded.embed), layers, on_device(loaded.head))
    return trace(model), weights


@dataclass
class Bench:
    """Starts shards' runners, one after another, on one store."""

    program: Program
    weights: ShardWeights
    store: PlanStore
    #: Microseconds of a run by a plan, by the number of rows; own kernels take 100.
    by_plan: dict[int, float] = field(default_factory=dict)
    timed: list[int] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    flavour: FakeFlavour = field(default_factory=FakeFlavour)

    @property
    def segments(self) -> list[Segment]:
        return self.program.segments()

    def requests(self) -> list[PlanRequest]:
        return [
            PlanRequest(each.name, each.segment, DTYPES, PROFILES, TARGET)
            for each in name_segments([self.program])
        ]

    def fill(self) -> None:
        for request in self.requests():
            self.store.put(plan_of(request))

    def start(
        self,
        backend: SegmentBackend = "auto",
        *,
        build: bool = False,
        circumstances: str = "",
        weights: ShardWeights | None = None,
    ) -> SegmentRunners:
        """A shard's start."""
        self.timed.clear()
        self.compiled.clear()
        self.flavour.loaded = 0
        runners = SegmentRunners(
            self.program,
            weights or self.weights,
            DTYPES,
            cupy,
            backend=backend,
            plans=self.source(build),
            circumstances=circumstances,
            timer=self._time,
        )
        runners.prepare(ROWS, ROWS)
        return runners

    def source(self, build: bool) -> PlanSource:
        return PlanSource(
            cast(Flavour, self.flavour),
            TARGET,
            DTYPES,
            self.store,
            (ProfileSet((Profile(1, 2, 3),)), PROFILES),
            build,
            self._compile,
        )

    def _compile(self, request: PlanRequest) -> Plan:
        self.compiled.append(request.name)
        return plan_of(request)

    def _time(
        self,
        runners: Sequence[Runner],
        segment: Segment,
        rows: int,
        sets: Sequence[Sequence[Any]],
    ) -> list[float]:
        assert [runner.backend for runner in runners] == ["tensorrt", "kernels"]
        assert [w.shape for w in sets[0]] == [spec.shape for spec in segment.weights]
        self.timed.append(rows)
        return [self.by_plan.get(rows, 50.0), 100.0]


@pytest.fixture
def bench(program_and_weights: tuple[Program, ShardWeights], tmp_path: Path) -> Bench:
    return Bench(*program_and_weights, open_store(str(tmp_path / "store")))


def backends(runners: SegmentRunners, segment: Segment) -> list[str]:
    return [runners.get(segment, rows).backend for rows in ROWS]


def random_inputs(segment: Segment, rows: int) -> list[Any]:
    generator = np.random.default_rng(0)
    return [
        cupy.asarray(
            generator.standard_normal((rows, *spec.shape[1:])).astype(DTYPES.of(spec.dtype))
        )
        for spec in segment.inputs
    ]


def test_each_number_of_rows_gets_the_faster(bench: Bench) -> None:
    bench.fill()
    bench.by_plan = {4: 150.0}
    runners = bench.start()
    for segment in bench.segments:
        # The plan is slower at 4 rows, and was not made for 24.
        assert backends(runners, segment) == [
            "tensorrt",
            "kernels",
            "tensorrt",
            "tensorrt",
            "kernels",
        ]
        assert runners.get(segment, 999).backend == "kernels"
        assert runners.get(segment, 16) is runners.get(segment, 16)
    assert not runners.rejected
    assert len(bench.timed) == len(SERVED) * len(bench.segments)


def test_all_runners_compute_the_same(bench: Bench) -> None:
    bench.fill()
    runners = bench.start()
    weights = {segment: sets[0] for segment, sets in runners._weights.items()}
    for segment in bench.segments:
        for rows in (7, 24):
            inputs = random_inputs(segment, rows)
            found = runners.get(segment, rows).run(inputs, weights[segment])
            expected = ArraySegment(segment, cupy).run(inputs, weights[segment])
            for one, other, spec in zip(found, expected, segment.output_specs, strict=True):
                assert one.dtype == DTYPES.of(spec.dtype)
                error = np.linalg.norm(one.astype("f8") - other) / np.linalg.norm(
                    other.astype("f8")
                )
                assert error < 5e-3


def test_a_piece_of_something_wider_goes_into_a_plan(bench: Bench) -> None:
    bench.fill()
    runners = bench.start("tensorrt")
    segment = bench.segments[-1]
    (x,) = random_inputs(segment, 4)
    wide = cupy.concatenate([x, x], axis=1)
    weights = runners._weights[segment][0]
    (dense,), (piece,) = (
        runners.get(segment, 4).run([each], weights) for each in (x, wide[:, : x.shape[1]])
    )
    np.testing.assert_array_equal(dense, piece)
    with pytest.raises(ValueError, match="x0 is float32"):
        runners.get(segment, 4).run([x[:3]], weights)


# --- wrong plans ---------------------------------------------------------------------------------


def wrong(kind: str, request: PlanRequest) -> Plan:
    """A plan of equal shapes that computes something else."""
    segment = request.segment
    if kind == "eps":
        return plan_of(request, with_attribute(segment, "rms_norm", eps=1e-5))
    if kind == "scale":
        return plan_of(request, with_attribute(segment, "mul", value=1.0))
    assert kind == "an output is not written"
    return plan_of(request, unwritten=("y2",))


@pytest.mark.parametrize("kind", ["eps", "scale", "an output is not written"])
def test_a_wrong_plan_does_not_serve(
    bench: Bench, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench.fill()
    request = bench.requests()[0]
    segment = request.segment
    bench.store.put(wrong(kind, request))
    runners = bench.start()
    assert set(backends(runners, segment)) == {"kernels"}
    (reason,) = runners.rejected
    assert reason.startswith(f"{request.name}: a relative error of ")
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "is wrong" in errors[0].message
    assert "own kernels run it" in errors[0].message
    others = [each for each in bench.segments if each != segment]
    assert all(runners.get(each, 1).backend == "tensorrt" for each in others)


def spoil(bench: Bench) -> PlanRequest:
    """Have a wrong plan in the store."""
    bench.fill()
    request = bench.requests()[0]
    bench.store.put(wrong("eps", request))
    return request


def test_a_plan_wrong_at_some_rows_is_dropped_at_all(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fill()
    errors = {1: 0.0, 4: 0.0, 7: 0.5, 16: 0.0}
    monkeypatch.setattr(
        "tensorray.actors.segment_runners.error_of", lambda runner, *_: errors[runner.rows]
    )
    runners = bench.start()
    assert len(runners.rejected) == len(bench.segments)
    assert all(set(backends(runners, segment)) == {"kernels"} for segment in bench.segments)


def test_a_wrong_plan_is_remembered_until_something_changes(bench: Bench) -> None:
    request = spoil(bench)
    assert bench.start().rejected
    again = bench.start()
    assert again.rejected
    assert bench.timed == []
    assert bench.flavour.loaded == len(bench.segments) - 1, "the wrong one was loaded again"
    assert set(backends(again, request.segment)) == {"kernels"}

    assert bench.start(circumstances="another driver").rejected
    assert bench.flavour.loaded == len(bench.segments), "it was not tried again"

    bench.store.put(plan_of(request))  # another build, which is right
    repaired = bench.start()
    assert not repaired.rejected
    assert repaired.get(request.segment, 1).backend == "tensorrt"


# --- what is remembered ---------------------------------------------------------------------------


def test_a_later_start_tries_nothing(bench: Bench) -> None:
    bench.fill()
    bench.by_plan = {4: 150.0}
    first = bench.start()
    again = bench.start()
    assert bench.timed == []
    assert again.report() == first.report()
    assert bench.flavour.loaded == len(bench.segments)


def test_plans_that_nothing_runs_by_are_not_loaded(bench: Bench) -> None:
    bench.fill()
    bench.by_plan = dict.fromkeys(SERVED, 150.0)
    bench.start()
    assert bench.flavour.loaded == len(bench.segments)
    bench.start()
    assert bench.flavour.loaded == 0


def test_other_kernels_are_timed_again(bench: Bench) -> None:
    bench.fill()
    bench.start(circumstances="kernels of yesterday")
    bench.start(circumstances="kernels of today")
    assert bench.timed
    bench.start(circumstances="kernels of yesterday")
    assert bench.timed == []


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"plan": ',
        b'{"plan": "another", "trials": {}}',
        b'{"plan": "KEY", "trials": {}, "schema": 99}',
        b'{"plan": "KEY", "trials": {"1": {"backend": 5}}}',
    ],
)
def test_a_record_that_cannot_be_read_is_made_again(
    bench: Bench, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    bench.fill()
    before = bench.start().report()
    folder = Path(bench.store.url) / "trials"
    keys = [request.key for request in bench.requests()]
    for path in folder.iterdir():
        key = next(key for key in keys if key.encode() in path.read_bytes())
        path.write_bytes(damage.replace(b"KEY", key.encode()))
    assert bench.start().report() == before
    assert len(bench.timed) == len(SERVED) * len(bench.segments)
    assert "trying again" in caplog.text
    bench.start()
    assert bench.timed == []


@pytest.mark.parametrize("fails", ["read", "write"])
def test_a_store_that_fails_costs_the_memory_only(
    bench: Bench, fails: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.fill()
    works = getattr(bench.store, fails)

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("trials/"):
            raise StoreError("full")
        return works(name, *rest)

    monkeypatch.setattr(bench.store, fails, refuse)
    runners = bench.start()
    assert runners.get(bench.segments[0], 1).backend == "tensorrt"
    assert "full; " in caplog.text


# --- plans that are not there ---------------------------------------------------------------------


def test_without_plans_own_kernels_serve_at_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    runners = bench.start()
    assert all(set(backends(runners, segment)) == {"kernels"} for segment in bench.segments)
    assert bench.compiled == bench.timed == []
    (warning,) = (r.message for r in caplog.records if r.levelno == logging.WARNING)
    assert all(request.name in warning for request in bench.requests())
    assert "tensorray build" in warning


def test_kernels_of_gated_products_are_compiled_ahead(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[tuple[Any, int]] = []
    monkeypatch.setattr(segment_runners, "is_cuda", lambda weight: True)
    monkeypatch.setattr(segment_runners.gated_hopper, "compile_ahead", ahead.extend)
    bench.start("kernels")
    gated = [id(layer.arrays["gate_up"]) for layer in bench.weights.layers.values()]
    assert ahead
    assert {id(weight) for weight, _ in ahead} <= set(gated)
    assert all(rows > FEW_ROWS for _, rows in ahead)


@pytest.mark.parametrize("backend", ["auto", "tensorrt"])
def test_missing_plans_are_built_and_stored_if_asked_for(
    bench: Bench, backend: SegmentBackend
) -> None:
    bench.store.put(plan_of(bench.requests()[1]))
    runners = bench.start(backend, build=True)
    assert bench.compiled == [r.name for i, r in enumerate(bench.requests()) if i != 1]
    assert all(runners.get(segment, 16).backend == "tensorrt" for segment in bench.segments)
    bench.start(backend, build=True)
    assert bench.compiled == []


def test_what_cannot_be_built_runs_by_own_kernels(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(_: Bench, request: PlanRequest) -> Plan:
        raise TensorRTError("no implementation for 3.linear")

    monkeypatch.setattr(Bench, "_compile", reject)
    runners = bench.start(build=True)
    assert runners.get(bench.segments[0], 1).backend == "kernels"
    assert "no implementation for 3.linear" in caplog.text


def test_a_plan_that_cannot_be_loaded_is_not_called_wrong(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.fill()
    bench.flavour.refuses_to_load = True
    runners = bench.start()
    assert runners.get(bench.segments[0], 1).backend == "kernels"
    assert not runners.rejected
    assert "a plan cannot be loaded: TensorRT's reason" in caplog.text
    bench.flavour.refuses_to_load = False
    assert bench.start().get(bench.segments[0], 1).backend == "tensorrt"


def test_quantized_weights_run_by_own_kernels(bench: Bench) -> None:
    bench.fill()
    layers = {
        layer: Weights({**weights.arrays, "gate_up": object()})
        for layer, weights in bench.weights.layers.items()
    }
    runners = bench.start(weights=replace(bench.weights, layers=layers))
    head = bench.segments[-1]
    assert runners.get(head, 1).backend == "tensorrt"
    middle = max(bench.segments, key=lambda each: len(each.nodes))
    assert runners.get(middle, 1).backend == "kernels"


def quantized(weight: Any) -> QuantizedWeight:
    """Rounded to int8, a scale a row."""
    values = np.asarray(weight).astype(np.float32)
    scales = np.abs(values).max(axis=1, keepdims=True) / 127
    codes = np.rint(values / scales).astype(np.int8)
    return QuantizedWeight("int8", values.shape[1], cupy.asarray(codes), cupy.asarray(scales))


def test_plans_for_quantized_weights(bench: Bench) -> None:
    """Are other plans than those for float weights, checked and run with codes and scales."""
    layers = {
        layer: Weights({**weights.arrays, "gate_up": quantized(weights.gate_up)})
        for layer, weights in bench.weights.layers.items()
    }
    weights = replace(bench.weights, layers=layers)
    bench.fill()
    middle = max(bench.segments, key=lambda each: len(each.nodes))
    assert bench.start(weights=weights).get(middle, 1).backend == "kernels"
    (request,) = [each for each in bench.requests() if each.segment == middle]
    sets = segment_runners.weight_sets(bench.program, weights)[middle]
    changed = quantized_segment(middle, [form_of(weight) for weight in sets[0]])
    bench.store.put(plan_of(replace(request, segment=changed)))
    runners = bench.start(weights=weights)
    assert not runners.rejected
    assert runners.get(middle, 1).backend == "tensorrt"
    # With one layer that is not quantized, no plan serves all.
    one = min(layers)
    layers = {**layers, one: bench.weights.layers[one]}
    mixed = bench.start(weights=replace(bench.weights, layers=layers))
    assert mixed.get(middle, 1).backend == "kernels"


# --- what is asked for ----------------------------------------------------------------------------


def test_tensorrt_runs_what_it_can_when_told_to(bench: Bench) -> None:
    bench.fill()
    bench.by_plan = dict.fromkeys(SERVED, 150.0)
    assert backends(bench.start("tensorrt"), bench.segments[0]) == ["tensorrt"] * 4 + ["kernels"]
    assert bench.timed == []
    # What was not timed then is timed when somebody asks which is faster.
    assert set(backends(bench.start("auto"), bench.segments[0])) == {"kernels"}
    assert bench.timed
    assert backends(bench.start("tensorrt"), bench.segments[0]) == ["tensorrt"] * 4 + ["kernels"]


class TestOpening:
    """What a shard on a GPU starts with."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
        self.bench = bench
        self.built: list[bool] = []
        self.refuses = False
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setattr(segment_runners, "open_source", self.open_source)

    def open_source(self, *_: Any, build: bool, **sizes: int) -> PlanSource:
        assert sizes == {"max_decode": 8, "max_rows": 64}
        if self.refuses:
            raise TargetError("TensorRT is not installed")
        self.built.append(build)
        return self.bench.source(build)

    def open(self, backend: SegmentBackend, *, build: bool = False) -> SegmentRunners:
        bench = self.bench
        return open_runners(
            bench.program,
            bench.weights,
            DTYPES,
            backend=backend,
            plan_store=bench.store.url,
            build_plans=build,
            max_decode=8,
            max_rows=64,
        )

    def test_tensorrt_is_left_alone_while_there_are_no_plans(self) -> None:
        for backend in ("auto", "kernels"):
            runners = self.open(cast(SegmentBackend, backend))
            runners.prepare(ROWS, ROWS)
            assert set(backends(runners, self.bench.segments[0])) == {"kernels"}
        assert self.built == []
        self.open("auto", build=True)
        self.open("tensorrt")
        assert self.built == [True, True]

    def test_plans_that_are_stored_are_used(self) -> None:
        self.bench.fill()
        self.open("kernels")
        assert self.built == []
        runners = self.open("auto")
        assert self.built == [False]
        runners._timer = self.bench._time
        runners.prepare(ROWS, ROWS)
        assert runners.get(self.bench.segments[0], 1).backend == "tensorrt"

    def test_a_machine_that_cannot(self, caplog: pytest.LogCaptureFixture) -> None:
        self.bench.fill()
        self.refuses = True
        self.open("auto")
        assert "own kernels run all segments: TensorRT is not installed" in caplog.text
        with pytest.raises(TargetError, match="not installed"):
            self.open("tensorrt")


def test_own_kernels_need_no_source_of_plans(bench: Bench) -> None:
    runners = SegmentRunners(bench.program, bench.weights, DTYPES, cupy, backend="kernels")
    runners.prepare(ROWS, (1,))
    head = bench.segments[-1]
    by_name = {info.name: info for info in runners.report()}
    assert list(by_name["head: norm tokens"].backends) == [1], "rows of the head are its own"
    assert runners.get(head, 1).backend == "kernels"


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"segment_backend": "tensorrt"}, "--segment-backend tensorrt"),
        ({"build_plans": True}, "--b"),
    ],
)
def test_plans_are_refused_without_a_gpu(settings: dict[str, Any], flag: str) -> None:
    config = ShardConfig(str(tiny_models.directory("llama3")), device="cpu", **settings)
    with pytest.raises(ValueError, match=f"{flag}.*: plans run on a GPU, and the shard has none"):
        load_executor(config)


def test_the_table_says_what_runs_what() -> None:
    rows = {1: "kernels", 2: "kernels", 4: "tensorrt", 8: "tensorrt", 16: "kernels", 32: "kernels"}
    times = {2: {"tensorrt": 120.4, "kernels": 99.6}, 8: {"tensorrt": 80.0, "kernels": 90.0}}
    assert table([SegmentInfo("layers 0-31: o", rows, times)]) == (
        "  layers 0-31: o: 1 kernels, 2 kernels (100 us; tensorrt 120), 4 tensorrt, "
        "8 tensorrt (80 us; kernels 90), 16-32 kernels"
    )


class TestSource:
    """What there is to run plans by on this machine."""

    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan_source, "local_gpu", lambda: GPU("NVIDIA H200", "sm_90"))
        monkeypatch.setattr(plan_source, "installed", lambda: ["tensorrt"])
        monkeypatch.setattr(plan_source, "load_flavour", lambda _: self)
        self.asked: list[str] = []

    name, version = "tensorrt", "10.99"
    dtypes = ("float16", "float32")

    def target(self, architecture: str) -> Any:
        self.asked.append(architecture)
        return TARGET

    def check_dtype(self, dtype: str, target: Any) -> None:
        if dtype not in self.dtypes:
            raise TargetError(f"no {dtype}")

    def open(self, dtypes: DTypes, store: PlanStore, **options: int) -> PlanSource:
        sizes = {"max_decode": 256, "max_rows": 8192, **options}
        return open_source(dtypes, store, **sizes)

    def test_looks_for_its_own_sizes_first(self, bench: Bench) -> None:
        source = self.open(DTYPES, bench.store)
        assert len(source.profiles) == 1, "the sizes that `tensorray build` makes by default"
        source = self.open(DTYPES, bench.store, max_decode=64, max_rows=512)
        assert [profiles.max_rows for profiles in source.profiles] == [512, 8192]

    def test_starts_no_builder_again(
        self, bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(2):
            assert self.open(DTYPES, bench.store).target == TARGET
        assert self.asked == ["sm_90"]
        (path,) = (Path(bench.store.url) / "targets").iterdir()
        path.write_bytes(path.read_bytes()[:-5])
        assert self.open(DTYPES, bench.store).target == TARGET
        assert self.asked == ["sm_90"] * 2
        assert "asking TensorRT" in caplog.text
        self.open(DTYPES, bench.store)
        monkeypatch.setattr(type(self), "version", "10.100")
        self.open(DTYPES, bench.store)
        assert self.asked == ["sm_90"] * 3

    def test_says_what_is_missing(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(TargetError, match="no bfloat16"):
            self.open(DTypes(), bench.store)
        monkeypatch.setattr(plan_source, "installed", lambda: [])
        with pytest.raises(TargetError, match="pip install tensorrt"):
            self.open(DTYPES, bench.store)
        monkeypatch.setattr(plan_source, "local_gpu", lambda: None)
        with pytest.raises(TargetError, match="no GPU"):
            self.open(DTYPES, bench.store)


def test_weights_rotate_through_more_than_the_cache() -> None:
    layers = [[np.full(1 << 16, layer, np.int8)] for layer in range(4)]
    assert rotation(layers, l2_bytes=1 << 15) == layers[:2]
    assert rotation(layers, l2_bytes=1 << 16) == layers
    six = rotation(layers, l2_bytes=3 << 15)
    assert [each[0][0] for each in six] == [0, 1, 2, 3, 0, 1]
    assert all(not np.shares_memory(six[i][0], six[i + 4][0]) for i in (0, 1))
    small = [[np.zeros(8)]] * 4
    assert len(rotation(small, l2_bytes=1 << 20)) == 1
    assert len(rotation([[]], l2_bytes=1 << 20)) == 1
