"""Plans built by a Ray cluster: which nodes can build what, and tasks on those that can.

`tensorrt_rtx` builds for any of its architectures on a node with a CPU. `tensorrt` times kernels
on the GPU it builds for, so it takes a node with such a GPU, all of it while it builds. A plan
comes back through Ray's object store. Ray runs a lost node's tasks again, on another one that can.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tensorray.builder.build import Compile, PlanRequest, Result, compile_plan
from tensorray.builder.plan import Plan
from tensorray.builder.tensorrt_flavour import (
    FLAVOURS,
    Flavour,
    NeedsKernels,
    Target,
    TargetError,
    TensorRTError,
    load_flavour,
)

logger = logging.getLogger(__name__)

FlavourChoice = Literal["auto", "tensorrt", "tensorrt_rtx"]

#: Seconds in which a node has to say what it can build; its GPUs may be busy.
ANSWER_WITHIN = 60.0
#: How often Ray runs a task again whose node or process died.
MAX_RETRIES = 3
#: Seconds between looks at which nodes are still there.
_LOOK_EVERY = 5.0

_NO_GPU = "no such GPU"
_ALL_LOST = "every node that could build it was lost"

#: Architectures of the GPUs that Ray has names for. Nodes with others are asked.
ARCHITECTURES = {
    "P100": "sm_60",
    "P4": "sm_61",
    "V100": "sm_70",
    "T4": "sm_75",
    "A100": "sm_80",
    "A10G": "sm_86",
    "L4": "sm_89",
    "L40S": "sm_89",
    "H20": "sm_90",
    "H100": "sm_90",
    "H200": "sm_90",
    "B200": "sm_100",
    "GB200": "sm_100",
    "B300": "sm_103",
    "GB300": "sm_103",
    "RTX-PRO-6000": "sm_120",
}


@dataclass(frozen=True)
class Sites:
    """A target, and the nodes that can build for it, by Ray's ids."""

    target: Target
    nodes: frozenset[str]


@dataclass(frozen=True)
class Survey:
    """What a cluster's nodes can build."""

    sites: list[Sites]
    lacking: dict[str, str]  # architectures that no node can build for, each with the reasons


def survey_nodes(
    architectures: Sequence[str], dtypes: Sequence[str], flavour: FlavourChoice = "auto"
) -> Survey:
    """Ask the cluster's nodes what they can build.

    There is one target for each GPU model that `tensorrt` finds, or where none does (or `flavour`
    says so) that of `tensorrt_rtx`.
    """
    asked = [name for name in FLAVOURS if flavour in ("auto", name)]
    answers = _ask(asked, architectures, dtypes)
    survey = Survey([], {})
    for architecture in architectures:
        for name in asked:  # tensorrt first: it times kernels on the GPU that will run them
            sites: dict[Target, set[str]] = {}
            for node, answer in answers[name].items():
                found = answer[architecture]
                if isinstance(found, Target):
                    sites.setdefault(found, set()).add(node)
            if sites:
                survey.sites.extend(Sites(target, frozenset(ids)) for target, ids in sites.items())
                break
        else:
            lacks = [_lacking(name, architecture, answers[name]) for name in asked]
            survey.lacking[architecture] = "\n".join(
                [f"no node can build for {architecture}:", *lacks]
            )
    return survey


#: What a node says of each architecture: its target, or why it has none.
_Answer = dict[str, Target | str]


def _ask(
    flavours: Sequence[str], architectures: Sequence[str], dtypes: Sequence[str]
) -> dict[str, dict[str, _Answer]]:
    """The answers of all nodes at once, by flavour and node."""
    answers: dict[str, dict[str, _Answer]] = {flavour: {} for flavour in flavours}
    tasks: dict[Any, tuple[str, str]] = {}
    for node in _nodes():
        if node["Resources"].get("CPU", 0) < 1:
            continue
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        gpus = _gpu_architectures(node, architectures)
        for flavour in flavours:
            gpu = flavour == "tensorrt"
            if gpu and not gpus & set(architectures):
                answers[flavour][node["NodeID"]] = dict.fromkeys(architectures, _NO_GPU)
                continue
            # Ray hides the GPU from a task that takes none.
            ask = _targets.options(num_cpus=0, num_gpus=int(gpu), scheduling_strategy=here)
            task = ask.remote(flavour, list(architectures), list(dtypes))
            tasks[task] = (flavour, node["NodeID"])
    if tasks:
        ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER_WITHIN)
    for task, (flavour, node_id) in tasks.items():
        answers[flavour][node_id] = _answer(task, flavour, architectures)
    return answers


def _nodes() -> list[dict[str, Any]]:
    """The nodes that are there, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _answer(task: Any, flavour: str, architectures: Sequence[str]) -> _Answer:
    try:
        answer: _Answer = ray.get(task, timeout=0)
        return answer
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task, force=True)
        problem = f"{flavour}: no answer within {ANSWER_WITHIN:.0f} s"
        problem += "; all its GPUs may be in use" if flavour == "tensorrt" else ""
    except ray.exceptions.RayError as error:  # the node died, or lacks this package
        problem = f"{flavour}: no answer: {_reason(error)}"
    logger.warning("a node is left out: %s", problem)
    return dict.fromkeys(architectures, problem)


def _gpu_architectures(node: dict[str, Any], wanted: Sequence[str]) -> set[str]:
    """What a node's GPUs may be; all that is wanted if Ray's name for them tells nothing."""
    if node["Resources"].get("GPU", 0) < 1:
        return set()
    prefix = "accelerator_type:"
    kinds = [name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix)]
    known = {ARCHITECTURES.get(kind) for kind in kinds}
    return set(wanted) if not known or None in known else {name for name in known if name}


@ray.remote(max_retries=0)
def _targets(flavour: str, architectures: list[str], dtypes: list[str]) -> _Answer:
    """What this node says; runs on it."""
    try:
        loaded = load_flavour(flavour)
    except TargetError as error:
        return dict.fromkeys(architectures, str(error))
    return {architecture: _target(loaded, architecture, dtypes) for architecture in architectures}


def _target(flavour: Flavour, architecture: str, dtypes: Sequence[str]) -> Target | str:
    try:
        target = flavour.target(architecture)
        for dtype in dtypes:
            flavour.check_dtype(dtype, target)
    except (TargetError, TensorRTError) as error:
        return str(error)
    return target


def _lacking(flavour: str, architecture: str, answers: dict[str, _Answer]) -> str:
    """Why no node can build for an architecture with a flavour, one reason a kind of node."""
    counts: dict[str, int] = {}
    for answer in answers.values():
        counts[str(answer[architecture])] = counts.get(str(answer[architecture]), 0) + 1
    if flavour == "tensorrt" and set(counts) <= {_NO_GPU}:
        return f"  tensorrt needs a node with an {architecture} GPU, and there is none"
    reasons = [f"{reason} ({n} node{'s' if n > 1 else ''})" for reason, n in counts.items()]
    return "  " + ("; ".join(reasons) or f"{flavour} needs a node with a CPU to build on")


class RayWorkers:
    """Builds on the nodes that can, one task a plan.

    `compile` is what a task runs to build its plan.
    """

    def __init__(self, sites: Sequence[Sites], compile: Compile = compile_plan) -> None:
        self._sites = {each.target: each.nodes for each in sites}
        self._compile = ray.put(compile)
        self._tasks: dict[Any, PlanRequest] = {}
        self._lost: set[str] = set()

    def submit(self, request: PlanRequest) -> None:
        nodes = ",".join(sorted(self._sites[request.target]))
        task = _build.options(
            num_gpus=1 if request.target.flavour == "tensorrt" else 0,
            max_retries=MAX_RETRIES,
            label_selector={"ray.io/node-id": f"in({nodes})"},
        ).remote(self._compile, request)
        self._tasks[task] = request

    def collect(self, timeout: float | None) -> list[Result]:
        if not (tasks := list(self._tasks)):
            time.sleep(timeout or 0.0)
            return []
        while True:
            patience = _LOOK_EVERY if timeout is None else min(timeout, _LOOK_EVERY)
            if ray.wait(tasks, timeout=patience)[0]:
                done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0)
                return [self._result(task) for task in done]
            stranded = self._stranded()
            if stranded or timeout is not None:
                return stranded

    def close(self) -> None:
        for task in self._tasks:
            ray.cancel(task, force=True)  # a TensorRT that builds hears no interrupt
        self._tasks.clear()

    def _result(self, task: Any) -> Result:
        request = self._tasks.pop(task)
        try:
            plan, where = ray.get(task)
            return Result(request, plan, where=where)
        except ray.exceptions.TaskUnschedulableError:  # Ray's way to say so of a single node
            return Result(request, None, _ALL_LOST)
        except ray.exceptions.RayError as error:
            lacks = isinstance(getattr(error, "cause", None), NeedsKernels)
            return Result(request, None, _reason(error), needs_kernels=lacks)

    def _stranded(self) -> list[Result]:
        """Give up what no node that is left can build; Ray would wait for one for ever."""
        alive = {node["NodeID"] for node in _nodes()}
        used = {node for nodes in self._sites.values() for node in nodes}
        if lost := used - alive - self._lost:
            self._lost |= lost
            logger.warning("lost %d of %d nodes; others build their share", len(lost), len(used))
        stranded = [t for t, r in self._tasks.items() if not self._sites[r.target] & alive]
        for task in stranded:
            ray.cancel(task, force=True)
        return [Result(self._tasks.pop(task), None, _ALL_LOST) for task in stranded]


@ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
def _build(compile: Compile, request: PlanRequest) -> tuple[Plan, str]:
    """A plan, and the host and node that built it; runs on a node that can."""
    node: str = ray.get_runtime_context().get_node_id()
    return compile(request), f"{socket.gethostname()}/{node[:8]}"


def _reason(error: ray.exceptions.RayError) -> str:
    """What happened in a task, in its own words."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, TensorRTError | TargetError):
        return str(cause)
    if isinstance(cause, ray.exceptions.RayTaskError):
        return str(cause).strip().rpartition("\n")[2]
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
