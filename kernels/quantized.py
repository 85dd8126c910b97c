"""Quantized weights: few bits a value and a scale for each group of them, and products by them.

    value = (code - zero) * scale

A weight `[out, in]` has a scale for every `group` columns of a row. Weights stay as they are in
memory: a product unpacks what it multiplies by, a tile at a time in the C kernel, and a block of
rows at a time in its twin, which runs on arrays of any module.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorray.kernels import native
from tensorray.kernels.device import is_cuda
from tensorray.kernels.threads import on_all_threads

#: What a code is: a signed integer of 4 or 8 bits, or float8_e4m3fn (arXiv 2209.05433).
Kind = Literal["int4", "int8", "float8"]

# The C kernel wins up to here, unpacking for BLAS beyond: tests/benchmarks/bench_quantized.py.
_MOST_NATIVE_ROWS = 96
# What the C kernel works on at a time; groups have to be whole numbers of these.
_NATIVE_COLUMNS = 32
# Values the twin unpacks at a time: what stays in a core's cache, or keeps a GPU busy.
_BLOCK_VALUES = 1 << 18
_BLOCK_VALUES_CUDA = 1 << 24


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight `[out, in]`, or a stack of them, `[n, out, in]`.

    Codes lie in `values`: int8 for int8, uint8 otherwise. For float8 those are the bits. For int4
    they are pairs, `[out, in / 2]`: of columns 2i and 2i + 1, the first in the low four bits,
    each in two's complement. (That is how TensorRT stores INT4.)

    With `order`, column i of the codes is input `order[i]`: where groups were chosen by the
    activations (act-order), columns of one group lie together here, and inputs are taken in that
    order. A share of such a weight's inputs may have any number of columns of each group;
    `groups` then says which group each column of the codes belongs to. Otherwise column i is of
    group `i // group`, the last of which may be shorter.
    """

    kind: Kind
    group: int
    values: Any  # [..., out, in] or [..., out, in / 2]
    scales: Any  # float32 [..., out, number of groups]
    zeros: Any | None = None  # int8, as scales; None: zeros are 0
    order: Any | None = None  # int32 [..., in]
    groups: Any | None = None  # int32 [..., in]

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, width = self.values.shape
        return (*outer, 2 * width if self.kind == "int4" else width)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, Any]:
        """Its arrays by field name."""
        names = ("values", "scales", "zeros", "order", "groups")
        return {name: array for name in names if (array := getattr(self, name)) is not None}

    def map(self, change: Callable[[Any], Any]) -> QuantizedWeight:
        """The same weight over changed arrays: a part of each, or a copy elsewhere."""
        return replace(self, **{name: change(array) for name, array in self.arrays().items()})

    def copy(self) -> QuantizedWeight:
        return self.map(lambda array: array.copy())

    def __getitem__(self, index: int) -> QuantizedWeight:
        """One weight of a stack."""
        return self.map(lambda array: array[index])

    def __len__(self) -> int:
        return len(self.values)


def linear_quantized(
    x: Any, weight: QuantizedWeight, bias: Any | None, dense: Callable[[Any, Any], Any]
) -> Any:
    """`x @ weight.T + bias`: x `[T, in]`, weight `[out, in]`, bias `[out]` -> new `[T, out]`.

    `dense` is the product by a weight that is not quantized; a GPU's blocks go there. For float32
    NumPy arrays of up to 96 rows the C kernel runs, where groups are multiples of 32 columns, and
    a row's result is the same bits whatever the other rows are.
    """
    if weight.order is not None:
        x = x.take(weight.order, axis=1)
    if is_cuda(x):
        y = _linear_in_blocks(x, weight, dense)
    elif native.takes(x) and len(x) <= _MOST_NATIVE_ROWS and _suits_native(weight):
        y = np.empty((len(x), len(weight)), np.float32)
        native.library.linear_quantized(
            weight.kind, x, weight.values, weight.scales, weight.zeros, weight.group, bias, y
        )
        return y
    else:
        y = _linear_on_threads(x, weight)
    if bias is not None:
        y += bias
    return y


def linear_quantized_numpy(x: Any, weight: QuantizedWeight, bias: Any | None = None) -> Any:
    """The twin of `linear_quantized`."""
    if weight.order is not None:
        x = x.take(weight.order, axis=1)
    y = _linear_on_threads(x, weight)
    if bias is not None:
        y += bias
    return y


def dequantize(weight: QuantizedWeight) -> Any:
    """The whole weight as float32 `[..., out, in]`, columns in the order of the inputs."""
    if len(weight.shape) == 3:
        stack = [dequantize(weight[index]) for index in range(len(weight))]
        return _module(weight.values).stack(stack)
    values = dequantize_rows(weight, 0, len(weight))
    if weight.order is None:
        return values
    ordered = _module(values).empty_like(values)
    ordered[:, weight.order] = values
    return ordered


def dequantize_rows(weight: QuantizedWeight, start: int, stop: int) -> Any:
    """Rows start to stop of a weight, float32 `[stop - start, in]`, columns as they are stored."""
    rows = slice(start, stop)
    values = _codes(weight.kind, weight.values[rows])
    if weight.zeros is not None:
        values -= _spread(weight.zeros[rows], weight)
    values *= _spread(weight.scales[rows], weight)
    return values


def pack_int4(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """int8 codes `[..., in]` from -8 to 7, in pairs: uint8 `[..., in / 2]`."""
    bits: Any = codes.view(np.uint8)
    packed: NDArray[np.uint8] = (bits[..., 0::2] & 15) | (bits[..., 1::2] << 4)
    return packed


def _codes(kind: Kind, values: Any) -> Any:
    """Codes as new float32 `[rows, in]`."""
    if kind == "float8":
        return _float8_table(is_cuda(values))[values]
    if kind == "int4":
        wide: Any = values.repeat(2, axis=-1)
        wide[..., 0::2] <<= 4
        values = wide.view(np.int8) >> 4
    return values.astype(np.float32)


@cache
def _float8_table(cuda: bool) -> Any:
    """The float32 value of each of the 256 codes."""
    table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if not cuda:
        return table
    import cupy

    return cupy.asarray(table)


def _spread(by_group: Any, weight: QuantizedWeight) -> Any:
    """What there is by group `[rows, groups]`, by column (or with one column for all)."""
    columns, count = weight.shape[-1], by_group.shape[1]
    if weight.groups is not None:
        return by_group[:, weight.groups]
    return by_group if count == 1 else by_group.repeat(weight.group, axis=1)[:, :columns]


def _suits_native(weight: QuantizedWeight) -> bool:
    one_group = weight.scales.shape[1] == 1
    return (
        weight.groups is None
        and weight.shape[1] % _NATIVE_COLUMNS == 0
        and (one_group or weight.group % _NATIVE_COLUMNS == 0)
        and all(array.flags.c_contiguous for array in weight.arrays().values())
    )


def _linear_in_blocks(x: Any, weight: QuantizedWeight, dense: Callable[[Any, Any], Any]) -> Any:
    """A product without bias, on a GPU."""
    out, columns = weight.shape
    step = max(1, _BLOCK_VALUES_CUDA // columns)
    if step >= out:
        return dense(x, dequantize_rows(weight, 0, out).astype(x.dtype, copy=False))
    y = _module(x).empty((len(x), out), x.dtype)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        block = dequantize_rows(weight, rows.start, rows.stop)
        y[:, rows] = dense(x, block.astype(x.dtype, copy=False))
    return y


def _linear_on_threads(x: Any, weight: QuantizedWeight) -> Any:
    """A product without bias, on all threads of the CPU."""
    out, columns = weight.shape
    step = max(16, _BLOCK_VALUES // columns)
    y = np.empty((len(x), out), np.result_type(x, np.float32))
    starts = deque(range(0, out, step))

    def work() -> None:
        while starts:
            try:
                start = starts.popleft()
            except IndexError:  # another thread took the last one
                return
            stop = min(start + step, out)
            np.matmul(x, dequantize_rows(weight, start, stop).T, out=y[:, start:stop])

    on_all_threads(work)
    return y


def _module(array: Any) -> Any:
    """NumPy or CuPy, whichever an array is of."""
    if not is_cuda(array):
        return np
    import cupy

    return cupy
