"""The plans a deployment needs, and having them all in a store.

The first half says what is needed: the distinct segments of a model over all ranks and stages,
times the targets. That takes a config and no weights. The second half fills a store: what is there
is left alone, what somebody else is building is waited for, the rest goes to workers, which may
be this process or a cluster.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, Protocol

from tensorray.builder.checkpoint.quantization_config import schemes_of
from tensorray.builder.graph import DTypes, Program, Segment, SegmentCall, trace
from tensorray.builder.joining import join
from tensorray.builder.model import Layout, Model, stage_layers
from tensorray.builder.plan import Plan, ProfileSet, build_plan, plan_key
from tensorray.builder.quantized_segment import model_forms, products, quantize_program
from tensorray.builder.store import Claim, PlanStore, StoreError
from tensorray.builder.tensorrt_flavour import (
    Flavour,
    NeedsKernels,
    Target,
    TargetError,
    TensorRTError,
    TimingCache,
    load_flavour,
)

logger = logging.getLogger(__name__)

#: Seconds between looks at a key that somebody else is building.
POLL = 0.5


# --- what is needed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedSegment:
    """A distinct segment, and a name that says where the model has it."""

    name: str  # "layers 0-31: mlp_norm gate_up down"
    segment: Segment


@dataclass(frozen=True)
class PlanRequest:
    """One plan that there has to be. Plain data: it travels to whoever builds it."""

    name: str
    segment: Segment
    dtypes: DTypes
    profiles: ProfileSet
    target: Target

    @cached_property
    def key(self) -> str:
        return plan_key(
            self.segment, dtypes=self.dtypes, profiles=self.profiles, target=self.target
        )

    def __str__(self) -> str:
        where = self.target.gpu or self.target.architecture
        return f"{self.name}, for {where}"


def find_segments(
    definition: type[Model], config: Mapping[str, Any], *, tp_size: int = 1, pp_size: int = 1
) -> list[NamedSegment]:
    """The distinct segments over all ranks and stages, in order of first use.

    Weights are quantized as the config tells. Raises ModelConfigError for a layout that the model
    does not divide into, and CheckpointError for a quantization that is not supported.
    """
    scheme_of = schemes_of(config)

    def programs() -> Iterator[Program]:
        for pp_rank in range(pp_size):
            for tp_rank in range(tp_size):
                model = definition(config, Layout(tp_rank, tp_size, pp_rank, pp_size))
                layers = stage_layers(model.num_layers, pp_size, pp_rank)
                forms = model_forms(model, layers, scheme_of)
                yield quantize_program(join(trace(model, layers)), forms)

    return name_segments(programs())


def name_segments(programs: Iterable[Program]) -> list[NamedSegment]:
    """The distinct segments of programs, in order of first use."""
    found: dict[Segment, _Places] = {}
    for program in programs:
        group: str | int = "embed"
        for call in program.calls:
            if not isinstance(call, SegmentCall):
                continue
            # A segment without weights (an add) belongs to where the one before it ended.
            first = call.weights[0].group if call.weights else group
            group = call.weights[-1].group if call.weights else group
            found.setdefault(call.segment, _Places(call)).add(first)
    return [NamedSegment(str(places), segment) for segment, places in found.items()]


class _Places:
    """Where a segment occurs, as the start of its name."""

    def __init__(self, call: SegmentCall) -> None:
        self._layers: set[int] = set()
        self._groups: dict[str, None] = {}
        names = [ref.name for ref in call.weights] or [node.op for node in call.segment.nodes]
        self._content = " ".join(names)

    def add(self, group: str | int) -> None:
        if isinstance(group, int):
            self._layers.add(group)
        else:
            self._groups[group] = None

    def __str__(self) -> str:
        spans: list[list[int]] = []
        for layer in sorted(self._layers):
            if spans and spans[-1][1] == layer - 1:
                spans[-1][1] = layer
            else:
                spans.append([layer, layer])
        parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in spans[:3]]
        parts += ["…"] if len(spans) > 3 else []
        where = [*self._groups]
        if parts:
            where.append(f"layer{'s' if len(self._layers) > 1 else ''} {','.join(parts)}")
        return f"{' and '.join(where)}: {self._content}"


#: Builds one plan; raises TensorRTError or TargetError.
Compile = Callable[[PlanRequest], Plan]

# --- building one ---------------------------------------------------------------------------------


def compile_plan(request: PlanRequest) -> Plan:
    """Build a plan with the TensorRT of this process.

    Raises TensorRTError naming op and message, and TargetError where this machine can't build
    for the target.
    """
    target = request.target
    flavour = _flavour(target.flavour)
    here = flavour.target(target.architecture)
    if here != target:
        raise TargetError(f"this machine builds for {here}, not for {target}")
    return build_plan(
        request.segment,
        dtypes=request.dtypes,
        profiles=request.profiles,
        target=target,
        flavour=flavour,
        timing_cache=_timing_cache(target),
    )


@cache
def _flavour(name: str) -> Flavour:
    return load_flavour(name)


@cache
def _timing_cache(target: Target) -> TimingCache:
    """What this process learnt by timing: segments of one model share many products."""
    return TimingCache()


# --- building all ---------------------------------------------------------------------------------

#: "kernels": TensorRT has not what the segment needs, own kernels will run it.
State = Literal["reused", "compiled", "kernels", "failed", "missing"]


@dataclass(frozen=True)
class Result:
    """What became of one request that was submitted to workers."""

    request: PlanRequest
    plan: Plan | None
    error: str = ""
    where: str = ""  # the machine
    needs_kernels: bool = False  # the error is that TensorRT has not what it takes


class Workers(Protocol):
    """Whoever builds plans."""

    def submit(self, request: PlanRequest) -> None:
        """Have a plan built; returns at once."""

    def collect(self, timeout: float | None) -> list[Result]:
        """What is done since the last call; waits for something, at most `timeout` seconds."""

    def close(self) -> None:
        """Give up whatever is not done."""


class LocalWorkers:
    """Builds in this process, one after another."""

    def __init__(self, compile: Compile = compile_plan) -> None:
        self._compile = compile
        self._queue: deque[PlanRequest] = deque()

    def submit(self, request: PlanRequest) -> None:
        self._queue.append(request)

    def collect(self, timeout: float | None) -> list[Result]:
        if not self._queue:
            time.sleep(timeout or 0.0)
            return []
        request = self._queue.popleft()
        try:
            return [Result(request, self._compile(request))]
        except (TensorRTError, TargetError) as error:
            lacks = isinstance(error, NeedsKernels)
            return [Result(request, None, str(error), needs_kernels=lacks)]

    def close(self) -> None:
        self._queue.clear()


@dataclass(frozen=True)
class Outcome:
    """What became of one plan that there has to be."""

    request: PlanRequest
    state: State
    seconds: float = 0.0  # that this job's build took
    bytes: int = 0
    error: str = ""
    where: str = ""


class Progress:
    """Hears what happens to each request. These methods do nothing; override what is wanted."""

    def building(self, request: PlanRequest) -> None:
        """It was handed to the workers."""

    def elsewhere(self, request: PlanRequest) -> None:
        """Another job is building it; this one waits for the plan."""

    def finished(self, outcome: Outcome) -> None:
        """It is done, one way or the other."""


def look_up(requests: Iterable[PlanRequest], store: PlanStore) -> list[Outcome]:
    """What a store has of the requests, without building: "reused" or "missing"."""
    return [_stored(request, store) or Outcome(request, "missing") for request in requests]


def fill(
    requests: Sequence[PlanRequest],
    store: PlanStore,
    workers: Workers,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Have every plan in the store; outcomes in the order of the requests.

    A segment that TensorRT rejects is an outcome, and the rest still lands. Raises StoreError when
    the store can't be read or written; what was stored until then stays. Closes the workers.
    """
    filling = _Filling(store, workers, progress or Progress())
    try:
        filling.run({request.key: request for request in requests}.values())
    finally:
        workers.close()
        for claim in filling.claims.values():
            claim.release()
    return [filling.outcomes[request.key] for request in requests]


class _Filling:
    """One run of `fill`. Every request is in the hands of workers (`claims`), or done, or waits
    for another job's claim to end."""

    def __init__(self, store: PlanStore, workers: Workers, progress: Progress) -> None:
        self.store = store
        self.workers = workers
        self.progress = progress
        self.claims: dict[str, Claim] = {}
        self.outcomes: dict[str, Outcome] = {}

    def run(self, requests: Iterable[PlanRequest]) -> None:
        missing = [request for request in requests if not self._is_stored(request)]
        if missing:
            self.store.check_writable()
        waiting = [request for request in missing if not self._start(request)]
        for request in waiting:
            self.progress.elsewhere(request)
        while self.claims or waiting:
            for result in self.workers.collect(POLL if waiting else None):
                self._finish(self._land(result))
                self.claims.pop(result.request.key).release()
            waiting = [request for request in waiting if not self._start(request)]

    def _start(self, request: PlanRequest) -> bool:
        """Hand a request to the workers; False while another job is building it."""
        claim = self.store.claim(request.key)
        if claim is None:
            return False
        if self._is_stored(request):  # since it was looked for, by whoever held the claim
            claim.release()
        else:
            self.claims[request.key] = claim
            self.workers.submit(request)
            self.progress.building(request)
        return True

    def _is_stored(self, request: PlanRequest) -> bool:
        stored = _stored(request, self.store)
        if stored:
            self._finish(stored)
        return stored is not None

    def _land(self, result: Result) -> Outcome:
        request, plan = result.request, result.plan
        if result.needs_kernels:
            self.store.write(_note_name(request), result.error.encode())
            return Outcome(request, "kernels", error=result.error, where=result.where)
        if plan is None:
            return Outcome(
                request, "failed", error=f"{request}: {result.error}", where=result.where
            )
        self.store.put(plan)
        return Outcome(request, "compiled", plan.seconds, len(plan.data), where=result.where)

    def _finish(self, outcome: Outcome) -> None:
        self.outcomes[outcome.request.key] = outcome
        self.progress.finished(outcome)


def _stored(request: PlanRequest, store: PlanStore) -> Outcome | None:
    plan = store.get(request.key)
    if plan is not None:
        return Outcome(request, "reused", bytes=len(plan.data))
    # Only quantized segments have such notes; looking for others' would be in vain.
    note = store.read(_note_name(request)) if products(request.segment) else None
    return None if note is None else Outcome(request, "kernels", error=note.decode())


def _note_name(request: PlanRequest) -> str:
    """Where a store says why there is no plan for a request."""
    return f"kernels/{request.key}.txt"


def plan_for(request: PlanRequest, store: PlanStore, compile: Compile = compile_plan) -> Plan:
    """The stored plan; else one built here, and stored. What a shard calls as it starts.

    Waits while somebody else builds it. A store that fails is logged and done without, since a
    shard can serve with the plan it has just made. Raises as `compile_plan` does.
    """
    plan: Plan | None = None
    try:
        if (plan := store.get(request.key)) is not None:
            return plan
        while (claim := store.claim(request.key)) is None:
            time.sleep(POLL)
        try:
            if (plan := store.get(request.key)) is None:
                plan = compile(request)
                store.put(plan)
        finally:
            claim.release()
    except StoreError as error:
        logger.warning("%s; going on without it", error)
    return plan or compile(request)
