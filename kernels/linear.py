"""Linear layers: activations times a weight stored `[out, in]`."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from tensorray.kernels import native
from tensorray.kernels.threads import num_threads, on_all_threads

# The C kernel wins up to here, BLAS beyond: tests/benchmarks/bench_linear.py, kernels/README.md.
_MOST_NATIVE_ROWS = 96
# Multiply-adds that take about as long as waking another Python thread, many times over.
_WORTH_SHARING = 20_000_000
_PIECES_PER_THREAD = 4


def linear(x: Any, weight: Any, bias: Any | None = None) -> Any:
    """`x @ weight.T + bias`: x `[T, in]`, weight `[out, in]`, bias `[out]` -> new `[T, out]`.

    Up to 96 rows of float32 the C kernel runs, and a row's result is the same bits whatever the
    other rows are; beyond, BLAS, whose rounding depends on the number of rows.
    """
    if not (native.takes(x) and len(x) <= _MOST_NATIVE_ROWS and weight.flags.c_contiguous):
        if (
            num_threads() > 1
            and isinstance(x, np.ndarray)
            and len(x) * weight.size > _WORTH_SHARING
        ):
            return _linear_in_pieces(x, weight, bias)
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


def _linear_in_pieces(x: Any, weight: Any, bias: Any | None) -> Any:
    """The twin, a range of the weight's rows at a time, on all threads."""
    out = len(weight)
    y = np.empty((len(x), out), np.result_type(x, weight))
    step = -(-out // (_PIECES_PER_THREAD * num_threads()))
    starts = deque(range(0, out, step))

    def work() -> None:
        while starts:
            try:
                start = starts.popleft()
            except IndexError:  # another thread took the last one
                return
            piece = slice(start, start + step)
            np.matmul(x, weight[piece].T, out=y[:, piece])
            if bias is not None:
                y[:, piece] += bias[piece]

    on_all_threads(work)
    return y
