"""Arrays that outlive the work they are first made for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike


def lasting_zeros(count: int, dtype: DTypeLike) -> Any:
    """Zeros `[count]` from CuPy's default pool, whatever allocator is the current one.

    Graphs are recorded with an allocator of their own, whose free memory earlier graphs go on
    writing to. An array made there that is still used later would be overwritten. They are zero
    when this returns, by a stream of their own: the current one may be recording.
    """
    import cupy

    kind = np.dtype(dtype)
    memory = cupy.get_default_memory_pool().malloc(count * kind.itemsize)
    stream = cupy.cuda.Stream(non_blocking=True)
    memory.memset_async(0, count * kind.itemsize, stream)
    stream.synchronize()
    return cupy.ndarray((count,), kind, memory)
