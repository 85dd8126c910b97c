"""What runs a segment on a device, and the plainest one: op by op, by the array interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.graph import Segment

#: By what a segment runs: a TensorRT plan, the project's own fused kernels, or plain array ops.
Backend = Literal["tensorrt", "kernels", "arrays"]


class Runner(Protocol):
    """Runs one segment with one number of rows, on the current device and CuPy stream.

    `run` takes the segment's inputs and weights in its order, as dense arrays of the program's
    dtypes, and returns its outputs in new arrays from CuPy's current allocator. It neither waits
    for the device nor copies to the host, so it may be captured in a CUDA graph, any number of
    times with other layers' weights. An output may be a view whose rows are apart in memory (a
    piece of a split); within a row it is dense.
    """

    backend: Backend

    def run(self, inputs: Sequence[Any], weights: Sequence[Any]) -> list[Any]: ...


class ArraySegment(Runner):
    """A segment on arrays of the module `xp`, one op after another."""

    backend: Backend = "arrays"

    def __init__(self, segment: Segment, xp: Any) -> None:
        self._segment = segment
        self._ops = ArrayOps(xp, {})

    def run(self, inputs: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
        return self._segment.run(self._ops, inputs, weights)
