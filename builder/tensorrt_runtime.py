"""Plans at work: engines, and contexts that enqueue them on raw device addresses.

Nothing here allocates or copies: the caller owns activations, weights, outputs and the scratch
memory that contexts of all engines may share, as long as they run one after another.

To capture a context in a CUDA graph, enqueue it once after each change of rows, then capture; the
same context may be enqueued again and again in one capture, with another layer's weights each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorray.builder.plan import Binding, Plan
from tensorray.builder.tensorrt_flavour import Flavour, TensorRTError

#: Bytes that scratch memory's address has to be a multiple of; every other address likewise.
ALIGNMENT = 256


@dataclass(frozen=True)
class Scratch:
    """Device memory that engines use while they run."""

    address: int
    size: int  # bytes


class Engine:
    """A plan loaded on the current device. Raises TensorRTError if it can't be."""

    def __init__(self, plan: Plan, flavour: Flavour) -> None:
        self.plan = plan
        self.flavour = flavour
        self.engine = flavour.load(plan.data)
        self.scratch_bytes = flavour.scratch_bytes(self.engine)
        expected = {each.name for each in (*plan.inputs, *plan.weights, *plan.outputs)}
        found = {self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)}
        if found != expected:
            raise TensorRTError(f"plan {plan.key[:12]} has tensors {found}, not {expected}")

    def context(self, rows: int, scratch: Scratch, stream: int) -> Context:
        """A context for steps of `rows` rows, or of the number they are padded to: its `rows`."""
        index, padded = self.plan.profiles.pick(rows)
        context = Context(self, index, scratch, stream)
        context.set_rows(padded)
        return context


class Context:
    """One profile of an engine, ready to run. `stream` is a CUDA stream's address."""

    def __init__(self, engine: Engine, profile: int, scratch: Scratch, stream: int) -> None:
        if scratch.size < engine.scratch_bytes:
            raise ValueError(f"{scratch.size} bytes of scratch; needs {engine.scratch_bytes}")
        if scratch.address % ALIGNMENT:
            raise ValueError(f"scratch must be aligned to {ALIGNMENT} bytes")
        self.engine = engine
        self.profile = engine.plan.profiles.profiles[profile]
        self.rows = 0
        # The scratch has to outlive the context, which knows its address only.
        self._scratch = scratch
        self._context: Any = engine.flavour.create_context(engine.engine)
        if self._context is None:
            raise self._failed("making a context")
        engine.flavour.set_scratch(self._context, scratch.address, scratch.size)
        if not self._context.set_optimization_profile_async(profile, stream):
            raise self._failed(f"choosing profile {profile}")

    def set_rows(self, rows: int) -> None:
        """Run with this number of rows from now on; it has to be in the context's profile."""
        profile = self.profile
        if not profile.smallest <= rows <= profile.largest:
            raise ValueError(f"{rows} rows; the context's profile is {profile}")
        for binding in self.engine.plan.inputs:
            if not self._context.set_input_shape(binding.name, binding.at(rows)):
                raise self._failed(f"setting {binding.name} to {rows} rows")
        self.rows = rows

    def enqueue(
        self, inputs: Sequence[int], weights: Sequence[int], outputs: Sequence[int], stream: int
    ) -> None:
        """Run on a stream. Addresses are of dense row-major arrays, in the plan's order."""
        plan = self.engine.plan
        self._bind(plan.inputs, inputs)
        self._bind(plan.weights, weights)
        self._bind(plan.outputs, outputs)
        if not self._context.execute_async_v3(stream):
            raise self._failed("running")

    def _bind(self, bindings: Sequence[Binding], addresses: Sequence[int]) -> None:
        for binding, address in zip(bindings, addresses, strict=True):
            if not self._context.set_tensor_address(binding.name, address):
                raise self._failed(f"binding {binding.name}")

    def _failed(self, doing: str) -> TensorRTError:
        key = self.engine.plan.key[:12]
        return TensorRTError(f"{doing}, plan {key}: {self.engine.flavour.messages.take()}")
