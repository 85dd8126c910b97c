"""Segments on a GPU: TensorRT's results against the array interpreter's and float64's, and times.

    python tests/gpu/check_segments.py [--minutes 9] [--plans FILE] [--resume FILE] [--only NAME,…]
        [--levels 3:60] [--workers 7] [STAGE ...]

Runs by itself, without an install: it needs TensorRT, CuPy, NumPy and the libraries that builder/
and kernels/ import (gguf, safetensors, huggingface_hub, threadpoolctl). Stages (all of them by
default) run until the minutes are up; what is left is listed as not run.

- ops: each op as a segment of its own.
- llama: every segment of Llama 3.1 8B, and one context rebound from layer to layer in a capture.
- families: every segment of every family at a test model's sizes, on one and on two ranks.
- times: Llama's MLP, QKV, output and LM head segments, from CUDA graphs that rotate through several
  sets of weights, beside the same math in PyTorch where `python3` has it (torch_times.py).

Plans are built by processes spread over the GPUs that are visible; they are checked on the first.
--levels are the builder's optimization levels to build each plan at, one after another, each with
the seconds after which a build is given up (with what TensorRT said last): 3 is TensorRT's default,
at 0 it takes the first kernels that work, which is quicker and as good a check of the network.
What a level did not give is tried at level 0 for one number of rows only.

Inputs are fresh and random; outputs and scratch are NaN before each run, and a margin after each
output has to stay so. The relative error is that of the norm, over each output.

Writes segments.json and plans.pickle (the plans that took long; --plans takes it in again) to
$OUT, or to the working directory, and prints a short table last. --resume takes an earlier run's
segments.json: what was right in it is not run again. Fails (status 1) if a result is wrong, a
build fails or something did not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


def make_importable() -> None:
    """Give this process and its children the rooms as tensorray.*, and the tests' helpers."""
    paths = [str(TESTS)]
    if importlib.util.find_spec("tensorray") is None:
        tree = Path(tempfile.mkdtemp(prefix="tensorray-"))
        (tree / "tensorray").mkdir()
        for room in ("builder", "kernels"):
            (tree / "tensorray" / room).symlink_to(TESTS.parent / room)
        paths.append(str(tree))
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])


make_importable()

import numpy as np  # noqa: E402
from helpers import tiny_models  # noqa: E402
from helpers.limited_pool import GivenUp, LimitedPool, Note  # noqa: E402
from helpers.published_configs import PUBLISHED  # noqa: E402

from tensorray.builder.array_ops import ArrayOps  # noqa: E402
from tensorray.builder.checkpoint.config import read_config  # noqa: E402
from tensorray.builder.graph import (  # noqa: E402
    ROWS,
    DTypes,
    Segment,
    Spec,
    trace,
    trace_segment,
)
from tensorray.builder.model import Layout, ModelConfigError  # noqa: E402
from tensorray.builder.ops import SegmentOps  # noqa: E402
from tensorray.builder.plan import (  # noqa: E402
    Binding,
    Plan,
    Profile,
    ProfileSet,
    build_plan,
    plan_key,
)
from tensorray.builder.registry import resolve  # noqa: E402
from tensorray.builder.tensorrt_flavour import (  # noqa: E402
    Flavour,
    Target,
    load_flavour,
    local_gpu,
)
from tensorray.builder.tensorrt_runtime import ALIGNMENT, Context, Engine, Scratch  # noqa: E402

TOLERANCE = 1e-2
HALF = DTypes("float16", "float16")
WIDE = DTypes("float16", "float32")  # Gemma's residual stream
SMALL = ProfileSet((Profile(1, 16, 48),))
TINY = ProfileSet((Profile(1, 8, 16),))
ONE_SIZE = ProfileSet((Profile(13, 13, 13),))  # nothing dynamic
TIMED_ROWS = (1, 16, 64, 256, 512, 2048, 8192)
MARGIN = 256  # bytes after each output that nobody may write


# --- the float64 reference -----------------------------------------------------------------------


class Float64Ops(SegmentOps):
    """Segment ops in float64 NumPy, written from their definitions."""

    def linear(self, x: Any, weight: Any, bias: Any = None) -> Any:
        return x @ weight.T + (0 if bias is None else bias)

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + eps
        ) * weight + bias

    def silu(self, x: Any) -> Any:
        return x / (1 + np.exp(-x))

    def gelu_tanh(self, x: Any) -> Any:
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def softcap(self, x: Any, cap: float) -> Any:
        return cap * np.tanh(x / cap)

    def split(self, x: Any, sizes: Any) -> Any:
        return np.split(x, np.cumsum(sizes)[:-1], axis=-1)

    def heads(self, x: Any, head_dim: int) -> Any:
        return x.reshape(len(x), -1, head_dim)

    def merge_heads(self, x: Any) -> Any:
        return x.reshape(len(x), -1)

    def add_residual(self, x: Any, delta: Any) -> Any:
        return x + delta


# --- what is checked -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A segment to build, and the numbers of rows to run it with."""

    name: str
    segment: Segment
    dtypes: DTypes
    profiles: ProfileSet
    rows: tuple[int, ...]


def op_cases() -> Iterator[Case]:
    n, m = 96, 160

    def x(*shape: int, dtype: Any = "compute") -> Spec:
        return Spec((ROWS, *(shape or (n,))), dtype)

    def w(*shape: int) -> Spec:
        return Spec(shape, "compute")

    def two(op: Any, x: Any, y: Any) -> Any:
        return [x + y, x - y, x * y]

    ops: dict[str, tuple[Callable[..., Any], list[Spec], list[Spec]]] = {
        "linear": (lambda op, x, w: op.linear(x, w), [x()], [w(m, n)]),
        "linear bias": (lambda op, x, w, b: op.linear(x, w, b), [x()], [w(m, n), w(m)]),
        "rms_norm": (lambda op, x, w: op.rms_norm(x, w, 1e-6), [x()], [w(n)]),
        "rms_norm heads": (lambda op, x, w: op.rms_norm(x, w, 1e-6), [x(4, 32)], [w(32)]),
        "layer_norm": (lambda op, x, w, b: op.layer_norm(x, w, b, 1e-5), [x()], [w(n), w(n)]),
        "silu": (lambda op, x: op.silu(x), [x()], []),
        "gelu_tanh": (lambda op, x: op.gelu_tanh(x), [x()], []),
        "softcap": (lambda op, x: op.softcap(x, 3.0), [x()], []),
        "split": (lambda op, x: op.split(x, [17, 47, 32]), [x()], []),
        "heads": (lambda op, x: op.heads(x, 32) * 2.0, [x()], []),
        "merge_heads": (lambda op, x: op.merge_heads(x) * 2.0, [x(3, 32)], []),
        "add_residual": (
            lambda op, x, d: op.add_residual(x, d),
            [x(dtype="residual"), x()],
            [],
        ),
        "add, sub, mul": (two, [x(), x()], []),
        "add, sub, mul by numbers": (lambda op, x: (1.5 - x) * 0.25 + 3.0, [x()], []),
        "add a row": (lambda op, x, b: x + b, [x()], [w(n)]),
    }
    for name, (math, inputs, weights) in ops.items():
        segment = trace_segment(math, inputs, weights)
        for dtypes in (HALF, WIDE, DTypes("float32", "float32")):
            if dtypes is not WIDE or "residual" in name or "norm" in name:
                label = f"{name} ({dtypes.compute}, {dtypes.residual})"
                yield Case(label, segment, dtypes, SMALL, (1, 16, 37))


def family_cases() -> Iterator[Case]:
    seen = set()
    for ranks in (1, 2):
        for name in tiny_models.NAMES:
            config = read_config(tiny_models.directory(name), {})
            try:
                model = resolve(config)(config, Layout(tp_size=ranks))
            except ModelConfigError:
                continue  # a size that does not divide this test model
            dtypes = WIDE if name.startswith("gemma") else HALF
            for index, segment in enumerate(trace(model).segments()):
                if (segment, dtypes) not in seen:
                    seen.add((segment, dtypes))
                    yield Case(f"{name} tp{ranks} {index}", segment, dtypes, TINY, (1, 13))


def llama_cases() -> Iterator[Case]:
    profiles = ProfileSet((Profile(1, 16, 64), Profile(65, 512, 512)))
    for index, segment in enumerate(trace(PUBLISHED["Llama-3.1-8B"].model()).segments()):
        ops = " ".join(node.op for node in segment.nodes)
        yield Case(f"Llama-3.1-8B {index} [{ops}]", segment, HALF, profiles, (1, 16, 100, 512))


def timed_cases(
    hidden: int = 4096, inner: int = 14336, q: int = 4096, kv: int = 1024, vocabulary: int = 128256
) -> Iterator[Case]:
    """Llama 3.1 8B's segments as they are cut where tensor-parallel ranks meet."""
    eps = 1e-5
    x = Spec((ROWS, hidden), "residual")
    norm = Spec((hidden,), "compute")

    def weight(*shape: int) -> Spec:
        return Spec(shape, "compute")

    def qkv(op: Any, x: Any, norm: Any, qkv: Any) -> Any:
        parts = op.split(op.linear(op.rms_norm(x, norm, eps), qkv), [q, kv, kv])
        return [op.heads(part, 128) for part in parts]

    def out(op: Any, x: Any, y: Any, o: Any) -> Any:
        return op.add_residual(x, op.linear(op.merge_heads(y), o))

    def mlp(op: Any, x: Any, norm: Any, gate_up: Any, down: Any) -> Any:
        gate, up = op.split(op.linear(op.rms_norm(x, norm, eps), gate_up), [inner, inner])
        return op.linear(op.silu(gate) * up, down)

    def head(op: Any, x: Any, norm: Any, tokens: Any) -> Any:
        return op.linear(op.rms_norm(x, norm, eps), tokens)

    heads = Spec((ROWS, q // 128, 128), "compute")
    segments = {
        "mlp": trace_segment(mlp, [x], [norm, weight(2 * inner, hidden), weight(hidden, inner)]),
        "qkv": trace_segment(qkv, [x], [norm, weight(q + 2 * kv, hidden)]),
        "out": trace_segment(out, [x, heads], [weight(hidden, q)]),
        # Rows of the LM head are sequences, not tokens.
        "head": trace_segment(head, [x], [norm, weight(vocabulary, hidden)]),
    }
    for name, segment in segments.items():
        for rows in TIMED_ROWS:
            if name != "head" or rows <= 512:
                profiles = ProfileSet((Profile(rows, rows, rows),))
                yield Case(f"{name} {rows}", segment, HALF, profiles, (rows,))


# --- building ------------------------------------------------------------------------------------


@cache
def flavour() -> Flavour:
    return load_flavour("tensorrt")


@dataclass(frozen=True)
class Build:
    """A case to build at one of the builder's optimization levels."""

    stage: str
    case: Case
    level: int

    def __str__(self) -> str:
        sizes = ", ".join(f"{p.smallest} to {p.largest} rows" for p in self.case.profiles.profiles)
        return f"{self.stage}: {self.case.name}, level {self.level}, {sizes}"

    @property
    def label(self) -> str:
        """What its checks are counted under."""
        alone = ", one size" if self.case.profiles == ONE_SIZE else ""
        return f"{self.stage} (level {self.level}{alone})"


def target(level: int) -> Target:
    gpu = local_gpu()
    assert gpu is not None, "no GPU, or no CuPy"
    flavour().optimization_level = level
    return flavour().target(gpu.architecture)


def start_tensorrt() -> None:
    """Have CUDA and TensorRT's builder up, which takes long."""
    target(3)


def build_safely(build: Build, note: Note) -> Plan | str:
    """For worker processes: a plan, or what went wrong."""
    _listen(note)
    try:
        return build_plan(
            build.case.segment,
            dtypes=build.case.dtypes,
            profiles=build.case.profiles,
            target=target(build.level),
            flavour=flavour(),
        )
    except Exception:
        return traceback.format_exc(limit=-2)


def _listen(note: Note) -> None:
    """Note whatever TensorRT says, in place of logging it."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    logger = logging.getLogger(load_flavour.__module__)
    logger.handlers[:] = [Listener()]
    logger.setLevel(1)
    logger.propagate = False


def builders(workers: int) -> list[dict[str, str]]:
    """Each builder's environment: as many for each GPU that this process sees."""
    import cupy

    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = cupy.cuda.runtime.getDeviceCount()
    gpus = seen.split(",")[:count] if seen else [str(i) for i in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(workers) for gpu in gpus]


# --- running -------------------------------------------------------------------------------------


class Buffer:
    """An array on the device with a margin after it, all NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        import cupy

        count = int(np.prod(shape))
        self.bytes = count * np.dtype(dtype).itemsize
        self.raw = cupy.full(self.bytes + MARGIN, 0xFF, cupy.uint8)
        self.array = self.raw[: self.bytes].view(dtype).reshape(shape)
        self.address = int(self.raw.data.ptr)
        assert self.address % ALIGNMENT == 0

    def margin_is_whole(self) -> bool:
        return bool((self.raw[self.bytes :] == 0xFF).all())


class Runner:
    """Runs plans on one stream, with one scratch for all."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.generator = np.random.default_rng(time.time_ns())
        self._scratch: Any = None

    def scratch(self, size: int) -> Scratch:
        if self._scratch is None or self._scratch.nbytes < size:
            self._scratch = self.cupy.empty(max(size, ALIGNMENT), self.cupy.uint8)
        self._scratch.fill(0xFF)
        return Scratch(int(self._scratch.data.ptr), self._scratch.nbytes)

    def random(self, binding: Binding, rows: int) -> Any:
        """Standard normal values; matrices scaled to keep rows' sizes, vectors about one."""
        shape = binding.at(rows)
        values = self.cupy.random.standard_normal(shape, dtype=self.cupy.float32)
        if binding.name.startswith("w"):
            values = values / shape[1] ** 0.5 if len(shape) > 1 else 1 + 0.1 * values
        return values.astype(binding.dtype)

    def check(self, case: Case, plan: Plan) -> list[Check]:
        """Run a plan with each number of rows and compare."""
        engine = Engine(plan, flavour())
        self.cupy.random.seed(int(self.generator.integers(1 << 31)))
        weights = [self.random(binding, 0) for binding in plan.weights]
        wide = [each.astype("float32") for each in weights]
        exact = [self.cupy.asnumpy(each).astype(np.float64) for each in weights]
        checks = []
        for rows in case.rows:
            context = engine.context(rows, self.scratch(engine.scratch_bytes), self.stream.ptr)
            inputs = [self.random(binding, context.rows) for binding in plan.inputs]
            outputs = [Buffer(binding.at(context.rows), binding.dtype) for binding in plan.outputs]
            self.enqueue(context, inputs, weights, outputs)
            found = [out.array for out in outputs]
            expected = case.segment.run(
                ArrayOps(self.cupy, []), [each.astype("float32") for each in inputs], wide
            )
            error = worst(self.cupy, found, expected)
            # Rows don't depend on each other, so that a few of them stand for all.
            some = sorted({0, context.rows // 2, context.rows - 1})
            few = [self.cupy.asnumpy(each[some]).astype(np.float64) for each in inputs]
            expected = case.segment.run(Float64Ops(), few, exact)
            error64 = worst(np, [self.cupy.asnumpy(each[some]) for each in found], expected)
            whole = all(out.margin_is_whole() for out in outputs)
            checks.append(Check(case.name, context.rows, error, error64, whole))
        return checks

    def enqueue(
        self, context: Context, inputs: list[Any], weights: list[Any], outputs: list[Buffer]
    ) -> None:
        self.cupy.cuda.Device().synchronize()
        context.enqueue(
            [int(each.data.ptr) for each in inputs],
            [int(each.data.ptr) for each in weights],
            [each.address for each in outputs],
            self.stream.ptr,
        )
        self.stream.synchronize()

    def capture(
        self, context: Context, inputs: list[Any], sets: list[list[Any]], outs: list[list[Buffer]]
    ) -> Any:
        """A graph that runs one context over every set of weights in turn."""
        self.enqueue(context, inputs, sets[0], outs[0])  # once after a change of shape
        with self.stream:
            self.stream.begin_capture()
            for weights, outputs in zip(sets, outs, strict=True):
                context.enqueue(
                    [int(each.data.ptr) for each in inputs],
                    [int(each.data.ptr) for each in weights],
                    [each.address for each in outputs],
                    self.stream.ptr,
                )
            return self.stream.end_capture()

    def check_capture(self, plan: Plan, rows: int, layers: int = 3) -> bool:
        """Whether one context, rebound in a capture, gives each layer's eager bits."""
        engine = Engine(plan, flavour())
        context = engine.context(rows, self.scratch(engine.scratch_bytes), self.stream.ptr)
        inputs = [self.random(binding, context.rows) for binding in plan.inputs]
        sets = [[self.random(b, 0) for b in plan.weights] for _ in range(layers)]

        def outputs() -> list[list[Buffer]]:
            return [
                [Buffer(b.at(context.rows), b.dtype) for b in plan.outputs] for _ in range(layers)
            ]

        eager, captured = outputs(), outputs()
        for weights, outs in zip(sets, eager, strict=True):
            self.enqueue(context, inputs, weights, outs)
        graph = self.capture(context, inputs, sets, captured)
        for outs in captured:
            for out in outs:
                out.raw.fill(0xFF)
        self.cupy.cuda.Device().synchronize()
        graph.launch(self.stream)
        self.stream.synchronize()
        return all(
            bool((a.raw == b.raw).all()) and not bool(self.cupy.isnan(a.array).any())
            for one, other in zip(eager, captured, strict=True)
            for a, b in zip(one, other, strict=True)
        )

    def microseconds(self, plan: Plan, rows: int, sets: list[list[Any]]) -> float:
        """Of one run, from a graph over several sets of weights; the best of some launches."""
        engine = Engine(plan, flavour())
        context = engine.context(rows, self.scratch(engine.scratch_bytes), self.stream.ptr)
        inputs = [self.random(binding, context.rows) for binding in plan.inputs]
        outputs = [Buffer(binding.at(context.rows), binding.dtype) for binding in plan.outputs]
        graph = self.capture(context, inputs, sets, [outputs] * len(sets))
        events = [self.cupy.cuda.Event() for _ in range(2)]
        times = []
        for _ in range(12):
            events[0].record(self.stream)
            graph.launch(self.stream)
            events[1].record(self.stream)
            events[1].synchronize()
            times.append(self.cupy.cuda.get_elapsed_time(*events) * 1000 / len(sets))
        return sorted(times)[len(times) // 4]


def weight_sets(runner: Runner, plan: Plan) -> list[list[Any]]:
    """As many sets of weights as it takes to keep them out of the L2 cache (60 MB)."""
    first = [runner.random(binding, 0) for binding in plan.weights]
    size = sum(each.nbytes for each in first)
    count = min(16, max(2, -(-(512 << 20) // size)))
    return [first] + [[each.copy() for each in first] for _ in range(count - 1)]


def worst(xp: Any, found: list[Any], expected: list[Any]) -> float:
    """The largest relative error among arrays: norm of the difference over the norm.

    Infinite where a shape is wrong or anything is NaN.
    """
    errors = []
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        a, b = one.astype("float64").ravel(), other.astype("float64").ravel()
        error = float(xp.linalg.norm(a - b) / xp.linalg.norm(b))
        errors.append(error if error == error else float("inf"))
    return max(errors)


# --- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    name: str
    rows: int
    error: float  # against ArrayOps on CuPy in float32
    error64: float  # against float64
    margins_whole: bool

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE and self.error64 <= TOLERANCE and self.margins_whole


@dataclass
class Report:
    started: float = field(default_factory=time.perf_counter)
    device: str = ""
    tensorrt: str = ""
    checks: dict[str, list[Check]] = field(default_factory=dict)
    captures: dict[str, bool] = field(default_factory=dict)
    builds: dict[str, tuple[float, int]] = field(default_factory=dict)  # seconds, bytes
    times: dict[str, dict[int, float]] = field(default_factory=dict)  # microseconds
    torch: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)

    def right(self, stage: str) -> set[str]:
        """The cases that have only right checks, whatever they were built at."""
        checks = [
            check
            for label, each in self.checks.items()
            for check in each
            if label.split(" (")[0] == stage
        ]
        return {c.name for c in checks} - {c.name for c in checks if not c.passed}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def add(self, stage: str, checks: list[Check]) -> None:
        self.checks.setdefault(stage, []).extend(checks)
        for check in checks:
            if not check.passed:
                self.failures.append(f"{stage}: {check}")

    def say(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)

    def print_table(self) -> None:
        print(f"\n{self.device}, TensorRT {self.tensorrt}, {self.seconds:.0f} s")
        for stage, checks in self.checks.items():
            good = sum(check.passed for check in checks)
            worst = max((check.error for check in checks), default=0.0)
            worst64 = max((check.error64 for check in checks), default=0.0)
            print(
                f"{stage:20} {good} of {len(checks)} runs right; worst relative error "
                f"{worst:.1e} (ArrayOps), {worst64:.1e} (float64)"
            )
        for name, same in self.captures.items():
            print(f"capture   {name}: {'equal to eager' if same else 'DIFFERS from eager'}")
        if self.times:
            print(f"\n{'segment':8}{'rows':>6}{'TensorRT us':>13}{'PyTorch us':>12}{'ratio':>7}")
        for name, times in self.times.items():
            for rows, microseconds in times.items():
                other = self.torch.get(name, {}).get(str(rows))
                beside = f"{other:12.1f}{microseconds / other:7.2f}" if other else ""
                print(f"{name:8}{rows:6}{microseconds:13.1f}{beside}")
        for label, lines in (
            ("FAILED", self.failures),
            ("given up", self.given_up),
            ("not run", self.not_run),
        ):
            for line in lines[:20]:
                print(f"{label}: {line[:600]}")
            if len(lines) > 20:
                print(f"{label}: and {len(lines) - 20} more")


# --- stages --------------------------------------------------------------------------------------


class Session:
    """The stages, one budget of time, and the plans that are worth keeping."""

    def __init__(self, out: Path, arguments: argparse.Namespace) -> None:
        self.out = out
        self.report = Report()
        self.deadline = self.report.started + 60 * arguments.minutes
        self.arguments = arguments
        earlier: Path | None = arguments.plans
        self.plans: dict[str, Plan] = pickle.loads(earlier.read_bytes()) if earlier else {}
        self.timed: dict[str, Plan] = {}
        if arguments.resume:
            self.resume(json.loads(arguments.resume.read_text()))
        self.environments = builders(arguments.workers)
        gpu = local_gpu()
        self.report.device = gpu.name if gpu else "no GPU"
        self.report.tensorrt = flavour().version
        self.runner = Runner()

    def resume(self, earlier: dict[str, Any]) -> None:
        """Take over an earlier run's right checks."""
        for label, each in earlier["checks"].items():
            checks = [Check(**check) for check in each]
            wrong = {check.name for check in checks if not check.passed}
            self.report.checks[label] = [check for check in checks if check.name not in wrong]

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def cases(self, stage: str) -> list[Case]:
        """A stage's cases, as far as they are asked for and not right already."""
        right = self.report.right(stage)
        only = tuple(self.arguments.only.split(",")) if self.arguments.only else ("",)
        return [
            case
            for case in STAGES[stage]()
            if case.name.startswith(only) and case.name not in right
        ]

    def parallel(self, stages: list[str]) -> None:
        """Build in several processes and check. What is slow to build should come first.

        They share GPUs, which blurs the times that TensorRT chooses tactics by: what is timed
        later may be somewhat slower than from a build alone.
        """
        cases = [(stage, case) for stage in stages for case in self.cases(stage)]
        there: list[tuple[Build, Plan | str]] = []
        made: set[tuple[str, str]] = set()

        under_way: set[tuple[str, str]] = set()
        levels: list[tuple[int, float]] = self.arguments.levels

        def builds() -> Iterator[tuple[Build, float]]:
            tried = set()
            for level, limit in levels:
                for stage, case in cases:
                    build = Build(stage, case, level)
                    if self.plans and (plan := self.plans.get(self.key(build))):
                        there.append((build, plan))
                        made.add((stage, case.name))
                    else:
                        under_way.add((stage, case.name))
                        yield build, limit
                for stage, case in cases:
                    name = (stage, case.name)
                    if name not in made | under_way | tried and stage != "times":
                        tried.add(name)
                        one_size = replace(case, profiles=ONE_SIZE, rows=(13,))
                        yield Build(stage, one_size, 0), limit

        pool = LimitedPool(build_safely, self.environments, start_tensorrt)
        self.report.say(f"{len(cases)} plans, {len(self.environments)} builders")
        for build, result in pool.run(builds(), self.deadline):
            under_way.discard((build.stage, build.case.name))
            if isinstance(result, GivenUp):
                self.report.say(f"{build}: given up after {result.seconds:.0f} s")
                self.report.given_up.append(f"{build}: {result.why}; {result.note}")
                continue
            there.append((build, result))
            if isinstance(result, Plan):
                made.add((build.stage, build.case.name))
                self.report.say(f"{build}: {result.seconds:.1f} s")
        # Checks take long beside builds, which keep all cores busy.
        for build, result in there:
            self.take(build, result)
        self.report.not_run += [
            f"{stage}: {case.name}" for stage, case in cases if (stage, case.name) not in made
        ]

    def key(self, build: Build) -> str:
        case = build.case
        return plan_key(
            case.segment, dtypes=case.dtypes, profiles=case.profiles, target=target(build.level)
        )

    def take(self, build: Build, plan: Plan | str) -> None:
        """Check what was built; keep it if it was slow to build."""
        stage, case = build.stage, build.case
        self.check(build, plan)
        self.save()
        if isinstance(plan, str) or stage not in ("llama", "times"):
            return
        self.plans[plan.key] = plan
        if stage == "times":
            self.timed[case.name] = plan
        else:
            for rows in (16, 512):
                name = f"{case.name.split(' [')[0]}, {rows} rows"
                self.report.captures[name] = self.runner.check_capture(plan, rows)
        self.save()

    def check(self, build: Build, plan: Plan | str) -> None:
        if isinstance(plan, str):
            self.report.failures.append(f"{build}: {plan}")
            return
        self.report.builds[str(build)] = (plan.seconds, len(plan.data))
        try:
            self.report.add(build.label, self.runner.check(build.case, plan))
        except Exception:
            self.report.failures.append(f"{build}: {traceback.format_exc(limit=-3)}")
        self.runner.cupy.get_default_memory_pool().free_all_blocks()

    def times(self) -> None:
        """Of the plans that `parallel` left, once the GPU is quiet."""
        for case in timed_cases():
            plan = self.timed.get(case.name)
            if plan is None:
                continue
            sets = weight_sets(self.runner, plan)
            name, rows = case.name.split()
            taken = self.runner.microseconds(plan, int(rows), sets)
            self.report.times.setdefault(name, {})[int(rows)] = taken
            del sets
            self.runner.cupy.get_default_memory_pool().free_all_blocks()
        self.torch_times()

    def torch_times(self) -> None:
        """The same math by PyTorch, if the machine's own Python has it."""
        python = shutil.which("python3")
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        script = Path(__file__).with_name("torch_times.py")
        done = subprocess.run(
            [python or "python3", str(script)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=max(30.0, self.left + 30),
        )
        if done.returncode:
            self.report.not_run.append(f"times: PyTorch: {done.stderr.strip()[-300:]}")
        else:
            self.report.torch = json.loads(done.stdout.splitlines()[-1])

    def save(self) -> None:
        """Everything so far, as the run may be cut short."""
        (self.out / "plans.pickle").write_bytes(pickle.dumps(self.plans))
        report = {**asdict(self.report), "seconds": self.report.seconds}
        (self.out / "segments.json").write_text(json.dumps(report, indent=1))


# The slowest builds first, so that they don't end last.
STAGES: dict[str, Callable[[], Iterator[Case]]] = {
    "times": timed_cases,
    "llama": llama_cases,
    "ops": op_cases,
    "families": family_cases,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--minutes", type=float, default=9.0, help="for building")
    parser.add_argument("--plans", type=Path, help="a plans.pickle of an earlier run")
    parser.add_argument("--resume", type=Path, help="a segments.json of an earlier run")
    parser.add_argument("--only", help="cases whose names begin so, with commas between")
    parser.add_argument("--levels", default="3:60", help="LEVEL:SECONDS, with commas between")
    parser.add_argument("--workers", type=int, default=7, help="builders for each GPU")
    arguments = parser.parse_args()
    stages = arguments.stages or list(STAGES)
    unknown = set(stages) - {*STAGES}
    if unknown:
        parser.error(f"no stage {unknown}; there are {', '.join(STAGES)}")
    pairs = [each.split(":") for each in arguments.levels.split(",")]
    arguments.levels = [(int(level), float(seconds)) for level, seconds in pairs]
    session = Session(Path(os.environ.get("OUT", ".")), arguments)
    report = session.report
    try:
        session.parallel([name for name in STAGES if name in stages])
        if session.timed:
            session.times()
    except Exception:
        report.failures.append(traceback.format_exc())
    report.failures += [f"capture: {name}" for name, same in report.captures.items() if not same]
    session.save()
    report.print_table()
    return 1 if report.failures or report.not_run else 0


if __name__ == "__main__":
    sys.exit(main())
