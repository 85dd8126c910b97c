"""The C kernels, if they were compiled, and the number of threads kernels run on.

Each kernel has a NumPy twin (`*_numpy`, same signature). The public function takes the native
way for float32 NumPy arrays when there is one, and the twin otherwise.

What holds for native results: a row's bits don't depend on the rows that share its batch, on the
number of threads, or, in attention, on how a prompt is cut into chunks. They do depend on the
instruction set (AVX-512, AVX2 or the baseline, whichever the machine has), and products of many
rows go to BLAS (see linear.py).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import threadpoolctl

try:
    from tensorray.kernels import _native as library
except ImportError:
    library = None  # type: ignore[assignment]


def native_available() -> bool:
    """Whether the C kernels were compiled when the package was installed."""
    return library is not None


def takes(x: Any) -> bool:
    """Whether a kernel should go the native way for activations x."""
    return library is not None and isinstance(x, np.ndarray) and x.dtype == np.float32


def set_num_threads(threads: int | None = None) -> None:
    """Run kernels and NumPy's matrix products on this many threads (None: a thread a core).

    Raises ValueError unless threads is at least 1. Idle threads sleep.
    """
    if threads is None:
        threads = _cores()
    if threads < 1:
        raise ValueError(f"num_threads must be at least 1, not {threads}")
    if library is not None:
        library.set_num_threads(threads)
    threadpoolctl.threadpool_limits(limits=threads, user_api="blas")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if library is not None:
    library.set_num_threads(_cores())
