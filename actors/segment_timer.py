"""What a segment takes, measured as it will run: captured, with weights that no cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np

from tensorray.actors.array_segment import Runner
from tensorray.builder.graph import DTypes, Segment

#: Microseconds of one run of a segment by a runner, of a number of rows, over sets of weights.
Timer = Callable[[Runner, Segment, int, Sequence[Sequence[Any]]], float]

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
    """Times a runner from a CUDA graph of one run a set of weights."""

    def __init__(self, dtypes: DTypes, xp: Any) -> None:
        self._dtypes = dtypes
        self._xp = xp

    def __call__(
        self, runner: Runner, segment: Segment, rows: int, sets: Sequence[Sequence[Any]]
    ) -> float:
        xp = self._xp
        device = xp.cuda.runtime.getDevice()
        l2_bytes = int(xp.cuda.runtime.getDeviceProperties(device)["l2CacheSize"])
        sets = rotation(sets, l2_bytes)
        inputs = [
            xp.full((rows, *spec.shape[1:]), 0.1, np.dtype(self._dtypes.of(spec.dtype)))
            for spec in segment.inputs
        ]
        stream = xp.cuda.Stream(non_blocking=True)
        xp.cuda.get_current_stream().synchronize()
        with stream:
            runner.run(inputs, sets[0])
            stream.synchronize()
            stream.begin_capture()
            try:
                for weights in sets:
                    runner.run(inputs, weights)
            finally:
                graph = stream.end_capture()
            times = [self._launch(graph, stream) for _ in range(_LAUNCHES)]
        return sorted(times)[_LAUNCHES // 4] / len(sets)

    def _launch(self, graph: Any, stream: Any) -> float:
        start, end = self._xp.cuda.Event(), self._xp.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return float(self._xp.cuda.get_elapsed_time(start, end)) * 1000
