"""A TensorRT whose plans are segments, run by the array interpreter: right, or as wrong as the
segment that was put into the plan."""

from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass, field, replace
from typing import Any

from helpers.fake_cupy import array_at, cupy
from tensorray.actors.canary import WideOps
from tensorray.builder.build import PlanRequest
from tensorray.builder.graph import Segment
from tensorray.builder.plan import Binding, Plan
from tensorray.builder.tensorrt_flavour import Target, TensorRTError

TARGET = Target("tensorrt", "10.99", "sm_90", "NVIDIA H200", ())


def plan_of(
    request: PlanRequest, content: Segment | None = None, *, unwritten: tuple[str, ...] = ()
) -> Plan:
    """The plan for a request; `content` is what it computes (None: what it should), and outputs
    that are `unwritten` it leaves alone."""
    segment = request.segment

    def bindings(prefix: str, specs: Any) -> tuple[Binding, ...]:
        return tuple(
            Binding(f"{prefix}{i}", spec.shape, request.dtypes.of(spec.dtype))
            for i, spec in enumerate(specs)
        )

    return Plan(
        key=request.key,
        segment=segment.digest(),
        dtypes=request.dtypes,
        profiles=request.profiles,
        target=request.target,
        inputs=bindings("x", segment.inputs),
        weights=bindings("w", segment.weights),
        outputs=bindings("y", segment.output_specs),
        seconds=1.0,
        data=pickle.dumps((content or segment, unwritten)),
    )


def with_attribute(segment: Segment, op: str, **attributes: Any) -> Segment:
    """The segment with another attribute of its first node of an op."""
    nodes = list(segment.nodes)
    index = next(i for i, node in enumerate(nodes) if node.op == op)
    changed = {**dict(nodes[index].attributes), **attributes}
    nodes[index] = replace(nodes[index], attributes=tuple(sorted(changed.items())))
    return replace(segment, nodes=tuple(nodes))


@dataclass
class FakeFlavour:
    """The flavour; counts the engines it loads."""

    name: str = "tensorrt"
    version: str = "10.99"
    loaded: int = 0
    refuses_to_load: bool = False
    lock: Any = field(default_factory=threading.RLock)

    @property
    def messages(self) -> Any:
        return self

    def take(self) -> str:
        return "TensorRT's reason"

    def load(self, data: bytes) -> _Engine:
        if self.refuses_to_load:
            raise TensorRTError("a plan cannot be loaded: TensorRT's reason")
        self.loaded += 1
        return _Engine(*pickle.loads(data))

    def scratch_bytes(self, engine: _Engine) -> int:
        return 1000

    def create_context(self, engine: _Engine) -> _Context:
        return _Context(engine.segment, engine.unwritten)

    def set_scratch(self, context: _Context, address: int, size: int) -> None:
        assert array_at(address).nbytes == size >= 1000


class _Engine:
    def __init__(self, segment: Segment, unwritten: tuple[str, ...]) -> None:
        self.segment = segment
        self.unwritten = unwritten
        counts = {"x": len(segment.inputs), "w": len(segment.weights), "y": len(segment.outputs)}
        self._names = [f"{prefix}{i}" for prefix, count in counts.items() for i in range(count)]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]


class _Context:
    def __init__(self, segment: Segment, unwritten: tuple[str, ...]) -> None:
        self._segment = segment
        self._unwritten = unwritten
        self._arrays: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._arrays[name] = array_at(address)
        assert self._arrays[name].flags.c_contiguous
        return True

    def execute_async_v3(self, stream: int) -> bool:
        segment, arrays = self._segment, self._arrays
        assert all(arrays[name].shape == shape for name, shape in self._shapes.items())
        inputs = [arrays[f"x{i}"].astype("float32") for i in range(len(segment.inputs))]
        weights = [arrays[f"w{i}"] for i in range(len(segment.weights))]
        for i, result in enumerate(segment.run(WideOps(cupy, {}), inputs, weights)):
            if f"y{i}" not in self._unwritten:
                arrays[f"y{i}"][...] = result
        return True
