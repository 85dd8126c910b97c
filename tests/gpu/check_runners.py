"""What runs segments on a GPU: own kernels against the canary's math, plans and canaries, times.

    python tests/gpu/check_runners.py [--store DIR] [--workers 6] [--rows 1,16,…] [STAGE ...]

Runs by itself, without an install: it needs CuPy, NumPy, cuda-bindings and the libraries that
builder/, kernels/ and actors/ import (ml_dtypes, msgspec, fsspec, filelock, gguf, safetensors,
huggingface_hub, threadpoolctl); all but the first two stages need TensorRT.

- kernels: every segment of every family at a test model's sizes, and of Llama 3.1 8B and Qwen3
  0.6B, by own kernels, in float16, bfloat16 and float32.
- fused: times of the latter two's segments, fused and op by op.
- wrong: plans of equal shapes but another eps or scale are caught, dropped and remembered.
- plans: plans of all of Llama 3.1 8B's segments: built (as far as --store has them not), each
  number of rows checked by the canary and timed beside own kernels; then a later start, which has
  nothing to do but load; what starting and loading take.
- capture: one context of each of these plans rebound over layers in a capture equals eager.

Prints tables, and fails (status 1) if anything is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]


def make_importable() -> None:
    """Give this process and its children the rooms as tensorray.*, and the tests' helpers."""
    paths = [str(TESTS)]
    if importlib.util.find_spec("tensorray") is None:
        tree = Path(tempfile.mkdtemp(prefix="tensorray-"))
        (tree / "tensorray").mkdir()
        for room in ("builder", "kernels", "actors"):
            (tree / "tensorray" / room).symlink_to(TESTS.parent / room)
        paths.append(str(tree))
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])


make_importable()

import numpy as np  # noqa: E402
from helpers import tiny_models  # noqa: E402
from helpers.published_configs import PUBLISHED  # noqa: E402

from tensorray.actors.array_segment import ArraySegment  # noqa: E402
from tensorray.actors.canary import TOLERANCE, error_of, random_inputs, worst_error  # noqa: E402
from tensorray.actors.fused_segment import FusedSegment  # noqa: E402
from tensorray.actors.plan_segment import PlanSegment, SharedScratch  # noqa: E402
from tensorray.actors.plan_source import PlanSource  # noqa: E402
from tensorray.actors.segment_runners import SegmentRunners, weight_sets  # noqa: E402
from tensorray.actors.segment_table import table  # noqa: E402
from tensorray.actors.segment_timer import GraphTimer  # noqa: E402
from tensorray.builder.build import (  # noqa: E402
    PlanRequest,
    compile_plan,
    name_segments,
    plan_for,
)
from tensorray.builder.checkpoint.config import flatten_config, read_config  # noqa: E402
from tensorray.builder.graph import DTypes, Program, Segment, SegmentCall, trace  # noqa: E402
from tensorray.builder.model import Model, ShardWeights, Weights  # noqa: E402
from tensorray.builder.plan import Plan, Profile, ProfileSet  # noqa: E402
from tensorray.builder.registry import resolve  # noqa: E402
from tensorray.builder.store import open_store  # noqa: E402
from tensorray.builder.tensorrt_flavour import Flavour, load_flavour, local_gpu  # noqa: E402
from tensorray.builder.tensorrt_runtime import Engine  # noqa: E402

HALF = DTypes("float16", "float32")
LAYERS = {"Llama-3.1-8B": 4, "Qwen3-0.6B": 6}  # how many layers each is tried with


class Check:
    """One run of the script: its device, what it was asked for, and what went wrong."""

    def __init__(
        self, store: Path, workers: int, rows: Sequence[int], models: Sequence[str] = ()
    ) -> None:
        import cupy

        self.cupy: Any = cupy
        self.store_path = store
        self.workers = workers
        self.rows = tuple(rows)
        self.models = tuple(models) or (*tiny_models.NAMES, *LAYERS)
        self.failures: list[str] = []
        self.started = time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"WRONG: {text}")

    # --- own kernels -----------------------------------------------------------------------------

    def kernels(self) -> None:
        worst: dict[str, tuple[float, str]] = {}
        count = 0
        for name, program in programs(self.models):
            for dtypes in (HALF, DTypes("bfloat16", "bfloat16"), DTypes("float32", "float32")):
                if name in LAYERS and dtypes.compute == "float32":
                    continue
                weights = weight_sets(program, self.weights(program, dtypes))
                for index, (segment, sets) in enumerate(weights.items()):
                    for rows in (1, 3, 8, 16, 17, 37, 300):
                        case = f"{name} {index} {dtypes.compute} {rows} rows"
                        try:
                            error = self.kernel_error(segment, sets[0], dtypes, rows)
                        except Exception:
                            self.fail(f"{case}: {traceback.format_exc(limit=-3)}")
                            continue
                        count += 1
                        worst[dtypes.compute] = max(
                            worst.get(dtypes.compute, (0.0, "")), (error, case)
                        )
                        if not error <= TOLERANCE[dtypes.compute]:
                            self.fail(f"{case}: relative error {error:.1e}")
                del weights
                self.cupy.get_default_memory_pool().free_all_blocks()
        for dtype, (error, case) in worst.items():
            self.say(f"own kernels, {dtype}: worst relative error {error:.1e} ({case})")
        self.say(f"own kernels: {count} runs")

    def kernel_error(
        self, segment: Segment, weights: list[Any], dtypes: DTypes, rows: int
    ) -> float:
        errors = []
        for odd in (False, True):
            inputs = random_inputs(segment, rows, dtypes, self.cupy, seed=rows, odd=odd)
            found = FusedSegment(segment, rows, self.cupy).run(inputs, weights)
            for each, spec in zip(found, segment.output_specs, strict=True):
                assert each.dtype == np.dtype(dtypes.of(spec.dtype)), (each.dtype, spec)
            errors.append(worst_error(segment, inputs, weights, found, self.cupy))
        return max(errors)

    def fused(self) -> None:
        timer = GraphTimer(HALF, self.cupy)
        print(f"\n{'segment':52}{'rows':>6}{'fused us':>10}{'op by op':>10}{'GB/s':>8}")
        for name in LAYERS:
            program = trace(few_layers(name))
            sets = weight_sets(program, self.weights(program, HALF))
            for each in name_segments([program]):
                segment = each.segment
                size = sum(array.nbytes for array in sets[segment][0])
                for rows in (1, 4, 16, 64, 256, 2048):
                    runners = (
                        FusedSegment(segment, rows, self.cupy),
                        ArraySegment(segment, self.cupy),
                    )
                    try:
                        times = timer(runners, segment, rows, sets[segment])
                    except Exception:
                        self.fail(f"{each.name}, {rows} rows: {traceback.format_exc(limit=-2)}")
                        continue
                    label = f"{name} {each.name}"[:50]
                    rate = size / times[0] / 1e3
                    print(f"{label:52}{rows:6}{times[0]:10.1f}{times[1]:10.1f}{rate:8.0f}")
            del sets
            self.cupy.get_default_memory_pool().free_all_blocks()

    # --- plans -----------------------------------------------------------------------------------

    def source(self, flavour: Flavour, store: str, profiles: ProfileSet) -> PlanSource:
        gpu = local_gpu()
        assert gpu is not None
        target = flavour.target(gpu.architecture)
        return PlanSource(flavour, target, HALF, open_store(store), (profiles,))

    def wrong(self) -> None:
        flavour = load_flavour("tensorrt")
        profiles = ProfileSet((Profile(1, 8, 16),))
        for name, op, attributes in (
            ("llama3", "rms_norm", {"eps": 1e-4}),
            ("gemma3", "mul", {"value": 1.25}),
        ):
            config = read_config(tiny_models.directory(name), {})
            program = trace(resolve(config)(config))
            weights = self.weights(program, HALF)
            with tempfile.TemporaryDirectory() as folder:
                source = self.source(flavour, folder, profiles)
                request = self.requests(program, source)[0]
                source.store.put(compile_plan(request))
                # Asked for by name: at these sizes own kernels are the faster.
                runners = self.start(program, weights, source, (1, 16), backend="tensorrt")
                if runners.rejected or runners.get(request.segment, 16).backend != "tensorrt":
                    self.fail(f"{name}: the right plan was refused: {runners.rejected}")
                other = replace(request, segment=with_attribute(request.segment, op, attributes))
                made = compile_plan(other)
                imposter = replace(made, key=request.key, segment=request.segment.digest())
                source.store.put(imposter)
                for start in ("first", "later"):
                    runners = self.start(program, weights, source, (1, 16))
                    backend = runners.get(request.segment, 16).backend
                    if len(runners.rejected) != 1 or backend != "kernels":
                        self.fail(f"{name}: a plan with another {op} serves at a {start} start")
                    else:
                        self.say(f"{name}, another {op}, {start} start: {runners.rejected[0]}")

    def plans(self) -> None:
        began = time.perf_counter()
        flavour = load_flavour("tensorrt")
        imported = time.perf_counter()
        gpu = local_gpu()
        assert gpu is not None
        flavour.target(gpu.architecture)
        self.say(
            f"TensorRT {flavour.version}: import {imported - began:.1f} s, "
            f"its builder {time.perf_counter() - imported:.1f} s"
        )
        source = self.llama_source(flavour)
        program = trace(few_layers("Llama-3.1-8B"))
        self.build(self.requests(program, source))
        weights = self.weights(program, HALF)
        for start in ("first", "later"):
            began = time.perf_counter()
            runners = self.start(program, weights, source, self.rows)
            self.say(f"{start} start: prepared in {time.perf_counter() - began:.2f} s")
            for rejected in runners.rejected:
                self.fail(f"plans: {rejected}")
        print(table(runners.report()))
        began = time.perf_counter()
        forced = self.start(program, weights, source, self.rows, backend="tensorrt")
        self.say(f"a start with all plans: {time.perf_counter() - began:.2f} s")
        self.print_times(runners, forced, program, weights)

    def print_times(
        self,
        runners: SegmentRunners,
        forced: SegmentRunners,
        program: Program,
        weights: ShardWeights,
    ) -> None:
        timer = GraphTimer(HALF, self.cupy)
        sets = weight_sets(program, weights)
        print(
            f"\n{'segment':52}{'rows':>6}{'TensorRT us':>12}{'kernels us':>12}{'op by op':>10}"
            f"{'error':>9}  chosen"
        )
        for each in name_segments([program]):
            segment = each.segment
            for rows in self.rows:
                plan = forced.get(segment, rows)
                if not isinstance(plan, PlanSegment):
                    self.fail(f"{each.name}: no plan for {rows} rows")
                    continue
                error = error_of(plan, segment, sets[segment][0], HALF, self.cupy, seed=rows)
                if not error <= TOLERANCE["float16"]:
                    self.fail(f"{each.name}, {rows} rows: relative error {error:.1e}")
                candidates = (
                    plan,
                    FusedSegment(segment, rows, self.cupy),
                    ArraySegment(segment, self.cupy),
                )
                times = timer(candidates, segment, rows, sets[segment])
                print(
                    f"{each.name[:50]:52}{rows:6}{times[0]:12.1f}{times[1]:12.1f}{times[2]:10.1f}"
                    f"{error:9.1e}  {runners.get(segment, rows).backend}"
                )

    def capture(self) -> None:
        flavour = load_flavour("tensorrt")
        source = self.llama_source(flavour)
        program = trace(few_layers("Llama-3.1-8B"))
        self.build(self.requests(program, source))
        sets = weight_sets(program, self.weights(program, HALF))
        scratch = SharedScratch(self.cupy)
        stream = self.cupy.cuda.Stream(non_blocking=True)
        for each in name_segments([program]):
            plan = source.find(each)
            assert plan is not None
            engine = Engine(plan, flavour)
            layers = (sets[each.segment] * 3)[:3]
            if len(sets[each.segment]) < 3:  # other numbers, so that a wrong address shows
                layers = [[w * (1 + 0.25 * i) for w in layer] for i, layer in enumerate(layers)]
            for rows in self.rows:
                with stream:
                    runner = PlanSegment(engine, rows, scratch, self.cupy)
                    inputs = random_inputs(each.segment, rows, HALF, self.cupy)
                    eager = [runner.run(inputs, weights) for weights in layers]
                    captured = [runner.poisoned_outputs() for _ in layers]
                    stream.synchronize()
                    stream.begin_capture()
                    for weights, outputs in zip(layers, captured, strict=True):
                        runner.run_into(inputs, weights, outputs)
                    graph = stream.end_capture()
                    graph.launch(stream)
                    stream.synchronize()
                same = all(
                    bool((a == b).all())
                    for one, other in zip(eager, captured, strict=True)
                    for a, b in zip(one, other, strict=True)
                )
                if not same:
                    self.fail(f"{each.name}, {rows} rows: captured differs from eager")
        self.say(f"captures: {len(self.rows)} numbers of rows of {len(sets)} segments")

    def llama_source(self, flavour: Flavour) -> PlanSource:
        profiles = ProfileSet(tuple(Profile(rows, rows, rows) for rows in self.rows))
        return self.source(flavour, str(self.store_path), profiles)

    def requests(self, program: Program, source: PlanSource) -> list[PlanRequest]:
        return [
            PlanRequest(each.name, each.segment, HALF, source.profiles[-1], source.target)
            for each in name_segments([program])
        ]

    def build(self, requests: list[PlanRequest]) -> None:
        """Into the store, in parallel. (What a busy GPU does to tactics' times is accepted.)"""
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            urls = [str(self.store_path)] * len(requests)
            for request, plan in zip(requests, pool.map(build, requests, urls), strict=True):
                self.say(f"{request}: {plan.seconds:.0f} s to build, {len(plan.data) / 1e6:.2f} MB")

    def start(
        self,
        program: Program,
        weights: ShardWeights,
        source: PlanSource,
        rows: Sequence[int],
        backend: Any = "auto",
    ) -> SegmentRunners:
        runners = SegmentRunners(program, weights, HALF, self.cupy, backend=backend, plans=source)
        runners.prepare(rows, rows)
        return runners

    def weights(self, program: Program, dtypes: DTypes) -> ShardWeights:
        """Random weights of a program's segments."""
        groups: dict[str | int, dict[str, Any]] = {"embed": {}, "head": {}}
        generator = self.cupy.random.default_rng(0)
        for call in program.calls:
            if not isinstance(call, SegmentCall):
                continue
            for ref, spec in zip(call.weights, call.segment.weights, strict=True):
                group = groups.setdefault(ref.group, {})
                if ref.name not in group:
                    values = generator.standard_normal(spec.shape, np.float32)
                    values = (
                        values / spec.shape[1] ** 0.5 if len(spec.shape) > 1 else 1 + values / 8
                    )
                    group[ref.name] = values.astype(np.dtype(dtypes.compute))
        layers = {key: Weights(value) for key, value in groups.items() if isinstance(key, int)}
        return ShardWeights(Weights(groups["embed"]), layers, Weights(groups["head"]))


def build(request: PlanRequest, url: str) -> Plan:
    """In a worker process: the stored plan, or one made there."""
    return plan_for(request, open_store(url))


def programs(names: Sequence[str]) -> Iterator[tuple[str, Program]]:
    for name in names:
        if name in LAYERS:
            yield name, trace(few_layers(name))
        else:
            config = read_config(tiny_models.directory(name), {})
            yield name, trace(resolve(config)(config))


def few_layers(name: str) -> Model:
    """A published model cut short: more layers have no other segments."""
    config = {**PUBLISHED[name].config, "num_hidden_layers": LAYERS[name]}
    flat = flatten_config(config, {})
    return resolve(flat)(flat)


def with_attribute(segment: Segment, op: str, attributes: dict[str, float]) -> Segment:
    """The segment with another attribute of its first node of an op."""
    nodes = list(segment.nodes)
    index = next(i for i, node in enumerate(nodes) if node.op == op)
    changed = {**dict(nodes[index].attributes), **attributes}
    nodes[index] = replace(nodes[index], attributes=tuple(sorted(changed.items())))
    return replace(segment, nodes=tuple(nodes))


STAGES: dict[str, Callable[[Check], None]] = {
    "kernels": Check.kernels,
    "fused": Check.fused,
    "wrong": Check.wrong,
    "plans": Check.plans,
    "capture": Check.capture,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--store", type=Path, help="keeps plans for another run")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rows", default="1,16,64,256,512,2048")
    parser.add_argument("--models", default="", help="of the stage `kernels`")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"no stage {unknown}; there are {', '.join(STAGES)}")
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        rows = [int(each) for each in arguments.rows.split(",")]
        models = [name for name in arguments.models.split(",") if name]
        check = Check(arguments.store or Path(folder), arguments.workers, rows, models)
        for stage in arguments.stages or STAGES:
            try:
                STAGES[stage](check)
            except Exception:
                check.fail(f"{stage}: {traceback.format_exc()}")
            check.say(f"{stage} done")
    print(f"\n{len(check.failures)} failures")
    for failure in check.failures[:12]:
        print(f"  {failure[:1500]}")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
