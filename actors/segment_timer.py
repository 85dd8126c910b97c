"""What a segment takes, measured as it will run: captured, with weights that no cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

from tensorray.actors.array_segment import Runner
from tensorray.actors.canary import random_inputs
from tensorray.actors.device import capture
from tensorray.builder.graph import DTypes, Segment

#: Microseconds of one run of a segment by each of some runners, of a number of rows, over sets of
#: weights.
Timer = Callable[[Sequence[Runner], Segment, int, Sequence[Sequence[Any]]], list[float]]

#: Bytes of weights to rotate through, as a multiple of the L2 cache.
_TIMES_L2 = 4
#: A segment of fewer bytes of weights reads activations, which are hot when it runs.
_FEW_BYTES = 1 << 16
_LAUNCHES = 8


def rotation(sets: Sequence[Sequence[Any]], l2_bytes: int) -> list[Sequence[Any]]:
    """Sets of weights that don't fit into the L2 cache together: the model's layers' as far as
    they go, then copies. Each is its layer's arrays in the segment's order."""
    size = sum(each.nbytes for each in sets[0])
    if size < _FEW_BYTES:
        return list(sets[:1])
    count = max(2, -(-_TIMES_L2 * l2_bytes // size))
    missing = max(0, count - len(sets))
    return [*sets[:count], *([w.copy() for w in one] for one in islice(cycle(sets), missing))]


class GraphTimer:
    """Times runners from CUDA graphs of one run a set of weights, each its best launch.

    They take turns, so that a time in which the device is slow is so for all of them. Inputs are
    random, as the power that a product takes, and so its clock, depends on them.
    """

    def __init__(self, dtypes: DTypes, xp: Any) -> None:
        self._dtypes = dtypes
        self._xp = xp

    def __call__(
        self,
        runners: Sequence[Runner],
        segment: Segment,
        rows: int,
        sets: Sequence[Sequence[Any]],
    ) -> list[float]:
        xp = self._xp
        device = xp.cuda.runtime.getDevice()
        l2_bytes = int(xp.cuda.runtime.getDeviceProperties(device)["l2CacheSize"])
        sets = rotation(sets, l2_bytes)
        inputs = random_inputs(segment, rows, self._dtypes, xp)
        stream = xp.cuda.Stream(non_blocking=True)
        xp.cuda.get_current_stream().synchronize()
        with stream:
            graphs = [self._capture(runner, inputs, sets, stream) for runner in runners]
            rounds = [[self._launch(graph, stream) for graph in graphs] for _ in range(_LAUNCHES)]
        return [min(times) / len(sets) for times in zip(*rounds, strict=True)]

    def _capture(
        self, runner: Runner, inputs: list[Any], sets: Sequence[Sequence[Any]], stream: Any
    ) -> Any:
        def run() -> None:
            for weights in sets:
                runner.run(inputs, weights)

        runner.run(inputs, sets[0])
        stream.synchronize()
        graph, _ = capture(self._xp.cuda, stream, run)
        return graph

    def _launch(self, graph: Any, stream: Any) -> float:
        start, end = self._xp.cuda.Event(), self._xp.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return float(self._xp.cuda.get_elapsed_time(start, end)) * 1000
