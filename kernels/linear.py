"""Linear layers: activations times a weight stored `[out, in]`."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from tensorray.kernels import native
from tensorray.kernels.activation import Gate, gated, gated_numpy
from tensorray.kernels.device import is_cuda
from tensorray.kernels.norm import rms_norm, rms_norm_numpy
from tensorray.kernels.quantized import QuantizedWeight, linear_quantized
from tensorray.kernels.threads import num_threads, on_all_threads

# The C kernel wins up to here, BLAS beyond: tests/benchmarks/bench_linear.py, kernels/README.md.
_MOST_NATIVE_ROWS = 96
# Multiply-adds that take about as long as waking another Python thread, many times over.
_WORTH_SHARING = 20_000_000
_PIECES_PER_THREAD = 4


def linear(
    x: Any,
    weight: Any,
    bias: Any | None = None,
    *,
    norm: Any | None = None,
    eps: float = 0.0,
    gate: Gate | None = None,
    residual: Any | None = None,
) -> Any:
    """`x @ weight.T + bias`: x `[T, in]`, weight `[out, in]`, bias `[out]` -> new `[T, out]`.

    What may come before and after, in this order:
    - `norm` `[in]`: x is `rms_norm(x, norm, eps)`; x itself may be of the residual stream's dtype.
    - `gate`: the result is `gated(result, gate)`, `[T, out / 2]`; weight has the gate's rows first.
    - `residual` `[T, out]`: it is added, and the result has its dtype.

    On a CPU, up to 96 rows of float32 the C kernel runs, and a row's result is the same bits
    whatever the other rows are; beyond, BLAS, whose rounding depends on the number of rows.

    On a GPU, a kernel of few rows reads each weight once and has the rest in it. It reads the norm,
    and in a stream that is being captured the weight, ahead of the kernels before it: these must
    not be what writes them.

    A quantized weight (quantized.py) is unpacked as it is read.
    """
    if is_cuda(x) and not isinstance(weight, QuantizedWeight):
        from tensorray.kernels.cuda import linear as cuda

        return cuda.linear(x, weight, bias, norm=norm, eps=eps, gate=gate, residual=residual)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = _product(x, weight, bias)
    if gate is not None:
        y = gated(y, gate)
    if residual is not None:
        y = (residual + y).astype(residual.dtype, copy=False)
    return y


def linear_numpy(
    x: Any,
    weight: Any,
    bias: Any | None = None,
    *,
    norm: Any | None = None,
    eps: float = 0.0,
    gate: Gate | None = None,
    residual: Any | None = None,
) -> Any:
    """The twin of `linear`."""
    if norm is not None:
        x = rms_norm_numpy(x, norm, eps)
    y = _product_numpy(x, weight, bias)
    if gate is not None:
        y = gated_numpy(y, gate)
    if residual is not None:
        y = (residual + y).astype(residual.dtype, copy=False)
    return y


def _product(x: Any, weight: Any, bias: Any | None) -> Any:
    if isinstance(weight, QuantizedWeight):
        return linear_quantized(x, weight, bias, dense=_linear_of_new)
    if not (native.takes(x) and len(x) <= _MOST_NATIVE_ROWS and weight.flags.c_contiguous):
        if (
            num_threads() > 1
            and isinstance(x, np.ndarray)
            and len(x) * weight.size > _WORTH_SHARING
        ):
            return _linear_in_pieces(x, weight, bias)
        return _product_numpy(x, weight, bias)
    y = np.empty((x.shape[0], weight.shape[0]), np.float32)
    native.library.linear(x, weight, bias, y)
    return y


def _linear_of_new(x: Any, weight: Any) -> Any:
    """A product, on a GPU, by a weight that was just written."""
    from tensorray.kernels.cuda import linear as cuda

    return cuda.linear(x, weight, weight_ahead=False)


def _product_numpy(x: Any, weight: Any, bias: Any | None) -> Any:
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
