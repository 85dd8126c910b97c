"""Linear layers: activations times a weight stored `[out, in]`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels import native

# The C kernel wins up to here, BLAS beyond: tests/benchmarks/bench_linear.py, kernels/README.md.
_MOST_NATIVE_ROWS = 64


def linear(x: Any, weight: Any, bias: Any | None = None) -> Any:
    """`x @ weight.T + bias`: x `[T, in]`, weight `[out, in]`, bias `[out]` -> new `[T, out]`.

    Up to 64 rows of float32 the C kernel runs, and a row's result is the same bits whatever the
    other rows are; beyond, BLAS, whose rounding depends on the number of rows.
    """
    if not (native.takes(x) and len(x) <= _MOST_NATIVE_ROWS and weight.flags.c_contiguous):
        return linear_numpy(x, weight, bias)
    y = np.empty((x.shape[0], weight.shape[0]), np.float32)
    native.library.linear(x, weight, bias, y)
    return y


def linear_numpy(x: Any, weight: Any, bias: Any | None = None) -> Any:
    """The twin of `linear`."""
    y = x @ weight.T
    if bias is not None:
        y += bias
    return y
