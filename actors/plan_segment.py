"""A segment by its TensorRT plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy, and so CuPy, its "bfloat16")
import numpy as np

from tensorray.actors.array_segment import Backend, Runner
from tensorray.builder.plan import Binding, Plan
from tensorray.builder.quantized_segment import flat
from tensorray.builder.tensorrt_runtime import ALIGNMENT, Engine, Scratch


class SharedScratch:
    """The scratch memory of all contexts of a device, which run one after another.

    It grows with the largest engine; contexts made before keep the smaller piece they know, as
    captured graphs hold its address.
    """

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self.memory: Any = xp.empty(0, np.uint8)

    def at_least(self, size: int) -> Any:
        """An array of at least `size` bytes, to be held as long as its address is in use."""
        if self.memory.nbytes < max(size, 1):
            self.memory = self._xp.empty(max(size, ALIGNMENT), np.uint8)
        return self.memory


class PlanSegment(Runner):
    """A plan's context for one number of rows, which has to be one that the plan serves as it is.

    Made on the CuPy stream that is current then. It has to run once before it is captured. Raises
    TensorRTError where TensorRT refuses.
    """

    backend: Backend = "tensorrt"

    def __init__(self, engine: Engine, rows: int, scratch: SharedScratch, xp: Any) -> None:
        if not serves(engine.plan, rows):
            raise ValueError(f"{rows} rows; the plan serves {engine.plan.profiles}")
        self._xp = xp
        self._plan = engine.plan
        self._scratch = scratch.at_least(engine.scratch_bytes)
        area = Scratch(address(self._scratch), self._scratch.nbytes)
        self._context = engine.context(rows, area, self._stream())
        self.rows = rows

    def run(self, inputs: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
        outputs = [self._xp.empty(*self._form(each)) for each in self._plan.outputs]
        self.run_into(inputs, weights, outputs)
        return outputs

    def run_into(
        self, inputs: Sequence[Any], weights: Sequence[Any], outputs: Sequence[Any]
    ) -> None:
        """`run`, with results written to dense arrays of the outputs' shapes and dtypes."""
        dense = [self._dense(each) for each in inputs]
        for array, binding in zip(dense, self._plan.inputs, strict=True):
            if (array.shape, array.dtype) != self._form(binding):
                raise ValueError(
                    f"{binding.name} is {array.dtype} {array.shape}, "
                    f"not {binding.dtype} {binding.at(self.rows)}"
                )
        self._context.enqueue(
            [address(each) for each in dense],
            [address(each) for each in flat(weights)],
            [address(each) for each in outputs],
            self._stream(),
        )

    def _dense(self, x: Any) -> Any:
        """An input as TensorRT takes it: a copy of what is a piece of something wider, or starts
        in the midst of something."""
        x = self._xp.ascontiguousarray(x)
        return x.copy() if x.data.ptr % ALIGNMENT else x

    def poisoned_outputs(self) -> list[Any]:
        """Arrays for `run_into`, and scratch memory, in which nothing is a number yet."""
        self._scratch.fill(0xFF)
        outputs = [self._xp.empty(*self._form(each)) for each in self._plan.outputs]
        for output in outputs:
            output.fill(np.nan)
        return outputs

    def _form(self, binding: Binding) -> tuple[tuple[int, ...], Any]:
        return binding.at(self.rows), np.dtype(binding.dtype)

    def _stream(self) -> int:
        return int(self._xp.cuda.get_current_stream().ptr)


def serves(plan: Plan, rows: int) -> bool:
    """Whether a plan was made for a number of rows (and not for a larger one to pad it to)."""
    return any(each.smallest <= rows <= each.largest for each in plan.profiles.profiles)


def address(array: Any) -> int:
    """An array's device address; raises ValueError for one that TensorRT can't be given."""
    pointer = int(array.data.ptr)
    if pointer % ALIGNMENT:
        raise ValueError(f"an array at {pointer:#x}; TensorRT needs multiples of {ALIGNMENT}")
    return pointer
