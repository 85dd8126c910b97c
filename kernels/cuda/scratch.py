"""Arrays that outlive the work they are first made for: what a launch's blocks count by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

_counters: dict[tuple[str, int, int], Any] = {}


def counters(purpose: str, count: int) -> Any:
    """Zeros, uint32 `[count]`, that a launch's blocks count by and leave zeros.

    One array for each purpose, device and stream: launches of a kernel on one stream come one after
    another. A purpose's count is always the same.
    """
    import cupy

    key = (purpose, cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr)
    known = _counters.get(key)
    if known is None:
        known = _counters[key] = lasting_zeros(count, "uint32")
    return known


def lasting_zeros(count: int, dtype: DTypeLike) -> Any:
    """Zeros `[count]` in memory of their own, outside of CuPy's pools: they live as long as used.

    Graphs are recorded with an allocator of their own, whose free memory earlier graphs go on
    writing to. An array made there that is still used later would be overwritten. They are zero
    when this returns, by a stream of their own: the current one may be recording.
    """
    import cupy

    kind = np.dtype(dtype)
    memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(count * kind.itemsize), 0)
    stream = cupy.cuda.Stream(non_blocking=True)
    memory.memset_async(0, count * kind.itemsize, stream)
    stream.synchronize()
    return cupy.ndarray((count,), kind, memory)
