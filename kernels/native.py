"""The C kernels, if they were compiled.

Each kernel has a NumPy twin (`*_numpy`, same signature). The public function takes the native
way for float32 NumPy arrays when there is one, and the twin otherwise.

What holds for native results: a row's bits don't depend on the rows that share its batch, on the
number of threads, or, in attention, on how a prompt is cut into chunks. They do depend on the
instruction set (AVX-512, AVX2 or the baseline, whichever the machine has), and products of many
rows go to BLAS (see linear.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from tensorray.kernels import _native as library
except ImportError:
    library = None  # type: ignore[assignment]

__all__ = ["library", "native_available", "takes"]


def native_available() -> bool:
    """Whether the C kernels were compiled when the package was installed."""
    return library is not None


def takes(x: Any) -> bool:
    """Whether a kernel should go the native way for activations x."""
    return library is not None and isinstance(x, np.ndarray) and x.dtype == np.float32
