"""What runs each segment of a shard's program, by its number of rows.

    runners = open_runners(program, weights, dtypes, backend="auto", max_decode=256, max_rows=8192)
    runners.prepare(body_rows, head_rows)
    runners.get(segment, rows).run(inputs, weights)

The project's own kernels run any segment with any number of rows, and nothing has to be compiled
ahead for them. A TensorRT plan serves the numbers of rows it was made for. It has to be right,
which a canary finds out, and it should be the faster, which a timer does. Both are found out once
and kept beside the plan: later starts look it up, and load no plan that nothing runs by.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from tensorray.actors.array_segment import Runner
from tensorray.actors.canary import TOLERANCE, error_of
from tensorray.actors.fused_segment import FusedSegment, kernels_digest
from tensorray.actors.plan_segment import PlanSegment, SharedScratch, serves
from tensorray.actors.plan_source import PlanSource, open_source
from tensorray.actors.protocol import SegmentInfo
from tensorray.actors.segment_table import table
from tensorray.actors.segment_timer import GraphTimer, Timer
from tensorray.builder.build import NamedSegment, name_segments
from tensorray.builder.graph import DTypes, KernelCall, Program, Segment, SegmentCall, WeightRef
from tensorray.builder.model import ShardWeights
from tensorray.builder.plan import Plan
from tensorray.builder.quantized_segment import form_of, quantized_segment
from tensorray.builder.store import StoreError, open_store
from tensorray.builder.tensorrt_flavour import TargetError, TensorRTError
from tensorray.builder.tensorrt_runtime import Engine
from tensorray.builder.trials import Trial, TrialRecord, read_record, record_name, write_record
from tensorray.kernels.cuda import gated_hopper
from tensorray.kernels.cuda.linear import FEW_ROWS
from tensorray.kernels.device import is_cuda

logger = logging.getLogger(__name__)

#: auto: plans that are stored, where they are the faster; tensorrt: plans wherever they serve;
#: kernels: none.
SegmentBackend = Literal["auto", "tensorrt", "kernels"]

#: A segment's weights, layer by layer, each in the segment's order.
WeightSets = list[list[Any]]


def open_runners(
    program: Program,
    weights: ShardWeights,
    dtypes: DTypes,
    *,
    backend: SegmentBackend = "auto",
    plan_store: str | None = None,
    build_plans: bool = False,
    max_decode: int,
    max_rows: int,
) -> SegmentRunners:
    """Runners on this process's current GPU, for decodes of up to `max_decode` sequences and steps
    of up to `max_rows` tokens.

    `plan_store` is a directory or URL (None: the default one). Plans that it lacks are built, which
    takes minutes, with `build_plans` or if the backend is to be TensorRT. Raises TargetError if it
    is to be and can't, and StoreError for a store that can't be opened.
    """
    cupy: Any = importlib.import_module("cupy")
    source = None
    if backend != "kernels":
        store = open_store(plan_store)
        build = build_plans or backend == "tensorrt"
        try:
            # TensorRT takes seconds to start, which a store without plans is no reason for.
            if build or store.has_plans():
                sizes = {"max_decode": max_decode, "max_rows": max_rows}
                source = open_source(dtypes, store, build=build, **sizes)
            else:
                logger.info("no plans in %s: own kernels run all segments", store.url)
        except (TargetError, StoreError) as error:
            if backend == "tensorrt":
                raise
            logger.warning("own kernels run all segments: %s", error)
    runtime = cupy.cuda.runtime
    device = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    circumstances = " ".join(
        map(str, (kernels_digest(), cupy.__version__, runtime.driverGetVersion(), device))
    )
    return SegmentRunners(
        program, weights, dtypes, cupy, backend=backend, plans=source, circumstances=circumstances
    )


class SegmentRunners:
    """Runners for the segments of one program, on the current device and stream.

    `weights` are the shard's, on the device; `xp` is CuPy. `plans` is where plans come from (None:
    own kernels run everything). `circumstances` is what besides a plan decides whether it is right
    and which backend is faster. `timer` measures that.
    """

    def __init__(
        self,
        program: Program,
        weights: ShardWeights,
        dtypes: DTypes,
        xp: Any,
        *,
        backend: SegmentBackend = "auto",
        plans: PlanSource | None = None,
        circumstances: str = "",
        timer: Timer | None = None,
    ) -> None:
        self._backend = backend
        self._dtypes = dtypes
        self._xp = xp
        self._source = plans
        self._circumstances = circumstances
        self._timer = timer or GraphTimer(dtypes, xp)
        self._scratch = SharedScratch(xp)
        self._runners: dict[tuple[Segment, int], Runner] = {}
        self._names = name_segments([program])
        self._in_head = _head_segments(program)
        self._weights = weight_sets(program, weights)
        self._plans: dict[Segment, _TriedPlan] = {}
        #: Plans that were wrong, each with what is wrong with it.
        self.rejected: list[str] = []

    def get(self, segment: Segment, rows: int) -> Runner:
        """What runs a segment with a number of rows: own kernels, unless `prepare` found better.

        Never slow, and always the same one.
        """
        found = self._runners.get((segment, rows))
        if found is None:
            found = self._runners[segment, rows] = FusedSegment(segment, rows, self._xp)
        return found

    def prepare(self, body_rows: Sequence[int], head_rows: Sequence[int]) -> None:
        """Find plans, check and time those that are new here, and choose.

        `body_rows` are the numbers of packed tokens that steps will be padded to, `head_rows`
        those of the rows whose logits are wanted. Logs what runs what.
        """
        began = time.perf_counter()
        missing = []
        for each in self._names:
            plan = self._find(each)
            if plan is None:
                missing.append(each.name)
                continue
            self._plans[each.segment] = plan
            try:
                for rows in head_rows if each.segment in self._in_head else body_rows:
                    if serves(plan.plan, rows) and not plan.record.wrong:
                        self._choose(each, plan, rows)
            except TensorRTError as error:
                # Perhaps for want of memory: another start may well run it, so this isn't kept.
                logger.warning("own kernels run the rest of %s: %s", each.name, error)
            plan.keep()
        if missing and self._source is not None:
            logger.warning(
                "no plan in %s for %d of %d segments, which own kernels run (`tensorray build`, or "
                "--build-plans, makes plans): %s",
                self._source.store.url,
                len(missing),
                len(self._names),
                "; ".join(missing),
            )
        for each in self._names:  # own kernels where nothing was chosen
            for rows in head_rows if each.segment in self._in_head else body_rows:
                self.get(each.segment, rows)
        self._compile_ahead()
        seconds = time.perf_counter() - began
        logger.info("segments, prepared in %.1f s:\n%s", seconds, table(self.report()))

    def _compile_ahead(self) -> None:
        gated_hopper.compile_ahead(
            (weight, rows)
            for (segment, rows), runner in self._runners.items()
            if isinstance(runner, FusedSegment) and rows > FEW_ROWS
            for weight in runner.gated_weights(self._weights[segment][0])
            if is_cuda(weight)
        )

    def report(self) -> list[SegmentInfo]:
        """What runs each segment, and what was measured."""
        infos = []
        for each in self._names:
            chosen = {
                rows: runner.backend
                for (segment, rows), runner in sorted(self._runners.items(), key=_by_rows)
                if segment == each.segment
            }
            trials = self._plans[each.segment].record.trials if each.segment in self._plans else {}
            times = {
                rows: trials[rows].microseconds
                for rows in chosen
                if rows in trials and trials[rows].microseconds
            }
            infos.append(SegmentInfo(each.name, dict(chosen), times))
        return infos

    def _find(self, each: NamedSegment) -> _TriedPlan | None:
        if self._source is None:
            return None
        # The plan is for the weights as they are held: quantized in the same way in all layers,
        # if at all.
        sets = self._weights[each.segment]
        if not _serve_plans(sets, self._dtypes):
            return None
        segment = quantized_segment(each.segment, [form_of(weight) for weight in sets[0]])
        plan = self._source.find(replace(each, segment=segment))
        if plan is None:
            return None
        tried = _TriedPlan(plan, self._source, self._circumstances)
        if tried.record.wrong:
            self._reject(each, tried, tried.record.wrong)
        return tried

    def _choose(self, each: NamedSegment, plan: _TriedPlan, rows: int) -> None:
        trial = plan.record.trials.get(rows)
        timed = trial is not None and bool(trial.microseconds)
        if trial is None or (self._backend == "auto" and not timed):
            trial = self._try(each, plan, rows)
            if plan.record.wrong:
                self._reject(each, plan, plan.record.wrong)
                return
            plan.record.trials[rows] = trial
            plan.changed = True
        if self._backend == "tensorrt" or trial.backend == "tensorrt":
            self._runners[each.segment, rows] = self._by_plan(plan, rows)

    def _try(self, each: NamedSegment, plan: _TriedPlan, rows: int) -> Trial:
        """Check a plan and, to choose, time it beside own kernels."""
        sets = self._weights[each.segment]
        by_plan = self._by_plan(plan, rows)
        error = error_of(by_plan, each.segment, sets[0], self._dtypes, self._xp)
        limit = TOLERANCE[self._dtypes.compute]
        if not error <= limit:
            plan.record.wrong = f"a relative error of {error:.1e} at {rows} rows (limit {limit})"
            plan.changed = True
        if plan.record.wrong or self._backend != "auto":
            return Trial("tensorrt", error, {})
        candidates: list[Runner] = [by_plan, FusedSegment(each.segment, rows, self._xp)]
        measured = self._timer(candidates, each.segment, rows, sets)
        times = {str(one.backend): time for one, time in zip(candidates, measured, strict=True)}
        return Trial(min(times, key=lambda name: times[name]), error, times)

    def _by_plan(self, plan: _TriedPlan, rows: int) -> PlanSegment:
        return PlanSegment(plan.engine, rows, self._scratch, self._xp)

    def _reject(self, each: NamedSegment, plan: _TriedPlan, why: str) -> None:
        """Drop a plan, also where it was chosen already."""
        key = plan.plan.key[:12]
        logger.error("plan %s of %s is wrong: %s; own kernels run it", key, each.name, why)
        self.rejected.append(f"{each.name}: {why}")
        for segment, rows in [key for key in self._runners if key[0] == each.segment]:
            del self._runners[segment, rows]


class _TriedPlan:
    """A plan, what is known of it here, and its engine once something needs it."""

    def __init__(self, plan: Plan, source: PlanSource, circumstances: str) -> None:
        self.plan = plan
        self.changed = False
        self._source = source
        self._name = record_name(plan, circumstances)
        self.record: TrialRecord = read_record(source.store, self._name, plan)

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.plan, self._source.flavour)

    def keep(self) -> None:
        """Store what was found out."""
        if self.changed:
            write_record(self._source.store, self._name, self.record)
            self.changed = False


def weight_sets(program: Program, weights: ShardWeights) -> dict[Segment, WeightSets]:
    """Each segment's weights at all places that the program has it."""
    sets: dict[Segment, WeightSets] = {}
    for call in program.calls:
        if isinstance(call, SegmentCall):
            arrays = [_weight(weights, ref) for ref in call.weights]
            sets.setdefault(call.segment, []).append(arrays)
    return sets


def _weight(weights: ShardWeights, ref: WeightRef) -> Any:
    if isinstance(ref.group, int):
        return weights.layers[ref.group].arrays[ref.name]
    return (weights.embed if ref.group == "embed" else weights.head).arrays[ref.name]


def _serve_plans(sets: WeightSets, dtypes: DTypes) -> bool:
    """Whether weights are such as one plan takes: arrays of the compute dtype or quantized, each
    in one form in all layers."""
    forms = {tuple(form_of(each) for each in one) for one in sets}
    return len(forms) == 1 and all(
        form is not None or getattr(each, "dtype", None) == dtypes.compute
        for each, form in zip(sets[0], next(iter(forms)), strict=True)
    )


def _head_segments(program: Program) -> set[Segment]:
    """Segments whose rows are those that logits are wanted of."""
    found: set[Segment] = set()
    selected = False
    for call in program.calls:
        if isinstance(call, KernelCall):
            selected = selected or call.op == "select_rows"
        elif selected:
            found.add(call.segment)
    return found


def _by_rows(item: tuple[tuple[Segment, int], Runner]) -> int:
    return item[0][1]
