"""Arrays that outlive the work they are first made for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike


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
