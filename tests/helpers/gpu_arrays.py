"""Arrays for tests of CUDA kernels: NumPy to CuPy and back in any float dtype, poisoned memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def normal(
    rng: np.random.Generator, *shape: int, dtype: str, scale: float = 1.0, mean: float = 0.0
) -> Any:
    """Normal numbers as CuPy has them, rounded to a dtype."""
    import cupy

    return cupy.asarray((mean + scale * rng.standard_normal(shape)).astype(DTYPES[dtype]))


def wide(x: Any) -> Any:
    """A CuPy array in float64 NumPy."""
    import cupy

    return cupy.asnumpy(x).astype(np.float64)


def relative_error(actual: Any, expected: Any) -> float:
    """The norm of the difference over that of what is expected; not finite is infinitely wrong."""
    difference = wide(actual) - expected
    if not np.isfinite(difference).all():
        return float("inf")
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-30))


def poison_new_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `cupy.empty` returns with NaN (integers: -1): what is left out then shows."""
    import cupy

    original = cupy.empty

    def poisoned(*arguments: Any, **named: Any) -> Any:
        made = original(*arguments, **named)
        if made.size:
            made.view(np.uint8).fill(0xFF)
        return made

    monkeypatch.setattr(cupy, "empty", poisoned)
