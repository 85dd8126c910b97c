"""The TensorRT interpreter: a segment's ops as layers of a TensorRT network.

Weights are inputs of the network, as activations are, so one plan serves every layer. Norms and
activations compute in float32, whatever goes in and comes out: TensorRT fuses the casts into the
kernels it makes of them, and statistics and exponentials keep their precision. Products run in
the compute dtype.

Every layer is named after the op it came from ("3.rms_norm/mean", the segment's fourth node), so
TensorRT's own messages say where they belong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensorray.builder.graph import ROWS, DTypes, Shape, Spec
from tensorray.builder.ops import SegmentOps, Tensor, segment
from tensorray.builder.tensorrt_flavour import Flavour, TensorRTError
from tensorray.kernels.quantized import Kind

#: Goes into plans' keys: raise it when the same segment becomes other layers than before.
LOWERING = 1


@dataclass(frozen=True)
class Value:
    """A tensor of the network being made. +, - and * add layers to it."""

    ops: TensorRTOps = field(repr=False)
    tensor: Any = field(repr=False)
    shape: Shape
    dtype: str

    def __add__(self, other: Value | float) -> Value:
        return self.ops.elementwise("add", self, other)

    def __radd__(self, other: float) -> Value:
        return self + other

    def __sub__(self, other: Value | float) -> Value:
        return self.ops.elementwise("sub", self, other)

    def __rsub__(self, other: float) -> Value:
        return self * -1.0 + other

    def __mul__(self, other: Value | float) -> Value:
        return self.ops.elementwise("mul", self, other)

    def __rmul__(self, other: float) -> Value:
        return self * other


class TensorRTOps(SegmentOps):
    """Adds layers to one network. The network must not outlive this object: it holds constants.

    A layer that TensorRT rejects raises TensorRTError with the op's name and TensorRT's message.
    """

    def __init__(self, flavour: Flavour, network: Any, dtypes: DTypes) -> None:
        self._flavour = flavour
        self._trt = flavour.trt
        self._network = network
        self._dtypes = dtypes
        self._constants: list[Any] = []
        self._names: Counter[str] = Counter()
        self._rows: Any = None  # the number of rows, as a shape tensor
        self._count = 0
        self._op = ""

    def input(self, name: str, spec: Spec) -> Value:
        dtype = self._dtypes.of(spec.dtype)
        tensor = self._network.add_input(name, self._flavour.data_type(dtype), spec.shape)
        if tensor is None:
            raise self._rejected(f"input {name} {spec}")
        value = Value(self, tensor, spec.shape, dtype)
        if spec.shape[0] == ROWS:
            # One name, one number: else each input could have rows of its own, or broadcast.
            tensor.set_dimension_name(0, "rows")
            self._rows = self._rows or self._first_dimension(value)
        return value

    def output(self, name: str, value: Value) -> None:
        value.tensor.name = name
        self._network.mark_output(value.tensor)
        self._flavour.set_output_type(value.tensor, value.dtype)
        if value.tensor.dtype != self._flavour.data_type(value.dtype):
            raise TensorRTError(f"output {name}: {value.tensor.dtype}, not {value.dtype}")

    # --- the op set --------------------------------------------------------------------------

    @segment
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._begin("linear")
        plain, transposed = self._trt.MatrixOperation.NONE, self._trt.MatrixOperation.TRANSPOSE
        layer = self._network.add_matrix_multiply(x.tensor, plain, weight.tensor, transposed)
        y = self._value("matmul", layer, (x.shape[0], weight.shape[0]), x.dtype)
        return y if bias is None else self._binary("SUM", y, bias, "bias")

    @segment
    def linear_quantized(
        self,
        x: Tensor,
        values: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        order: Tensor | None,
        groups: Tensor | None,
        bias: Tensor | None = None,
        *,
        kind: Kind,
        group: int,
    ) -> Tensor:
        self._begin("linear_quantized")
        if groups is not None:
            raise TensorRTError(f"{self._op}: no layer takes groups of any number of columns")
        if order is not None:
            layer = self._network.add_gather(x.tensor, order.tensor, 1)
            x = self._value("order", layer, x.shape, x.dtype)
        weight = self._dequantized(values, scales, zeros)
        plain, transposed = self._trt.MatrixOperation.NONE, self._trt.MatrixOperation.TRANSPOSE
        layer = self._network.add_matrix_multiply(x.tensor, plain, weight.tensor, transposed)
        y = self._value("matmul", layer, (x.shape[0], weight.shape[0]), x.dtype)
        return y if bias is None else self._binary("SUM", y, bias, "bias")

    def _dequantized(self, values: Value, scales: Value, zeros: Value | None) -> Value:
        """`(values - zeros) * scales` in the compute dtype.

        Where there are no zeros, one layer does it, which kernels are fused from. It takes no zeros
        but 0, so others are subtracted in float32.
        """
        compute = self._dtypes.compute
        out, columns = values.shape
        count = scales.shape[1]
        if columns % count:
            raise TensorRTError(f"{self._op}: no layer takes {count} groups of {columns} columns")
        if zeros is None:
            # Of int4, scale and result have to be of one dtype.
            scale = self._cast(scales, compute) if values.dtype == "int4" else scales
            return self._dequantize(values, scale, compute, "weight")
        one = self._constant(1.0, (), "float32")
        grouped = (out, count, columns // count)
        wide = self._reshape(self._dequantize(values, one, "float32", "codes"), grouped)
        shift = self._dequantize(zeros, one, "float32", "zeros")
        wide = self._binary("SUB", wide, self._reshape(shift, (out, count, 1)), "shifted")
        wide = self._binary("PROD", wide, self._reshape(scales, (out, count, 1)), "scaled")
        return self._cast(self._reshape(wide, (out, columns)), compute)

    def _dequantize(self, codes: Value, scale: Value, dtype: str, part: str) -> Value:
        layer = self._flavour.add_dequantize(self._network, codes.tensor, scale.tensor, dtype)
        return self._value(part, layer, codes.shape, dtype, typed=False)

    @segment
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self._begin("rms_norm")
        y = self._normalized(self._cast(x, "float32"), eps)
        y = self._binary("PROD", y, self._cast(weight, "float32"), "weight")
        return self._cast(y, self._dtypes.compute)

    @segment
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        self._begin("layer_norm")
        wide = self._cast(x, "float32")
        centred = self._binary("SUB", wide, self._mean(wide, "mean"), "centred")
        y = self._normalized(centred, eps)
        y = self._binary("PROD", y, self._cast(weight, "float32"), "weight")
        y = self._binary("SUM", y, self._cast(bias, "float32"), "bias")
        return self._cast(y, self._dtypes.compute)

    @segment
    def silu(self, x: Tensor) -> Tensor:
        self._begin("silu")
        wide = self._cast(x, "float32")
        y = self._binary("PROD", wide, self._activation("SIGMOID", wide), "gate")
        return self._cast(y, x.dtype)

    @segment
    def gelu_tanh(self, x: Tensor) -> Tensor:
        self._begin("gelu_tanh")
        wide = self._cast(x, "float32")
        square = self._binary("PROD", wide, wide, "square")
        factor = self._binary("PROD", square, 0.044715 * math.sqrt(2.0 / math.pi), "cubic")
        factor = self._binary("SUM", factor, math.sqrt(2.0 / math.pi), "linear")
        tanh = self._activation("TANH", self._binary("PROD", wide, factor, "argument"))
        gate = self._binary("PROD", self._binary("SUM", tanh, 1.0, "one"), 0.5, "half")
        return self._cast(self._binary("PROD", wide, gate, "gate"), x.dtype)

    @segment
    def softcap(self, x: Tensor, cap: float) -> Tensor:
        self._begin("softcap")
        inside = self._binary("PROD", self._cast(x, "float32"), 1.0 / cap, "scale")
        y = self._binary("PROD", self._activation("TANH", inside), cap, "cap")
        return self._cast(y, x.dtype)

    @segment
    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        self._begin("split")
        pieces, start = [], 0
        for size in sizes:
            pieces.append(self._slice(x, start, size))
            start += size
        return pieces

    @segment
    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        self._begin("heads")
        return self._reshape(x, (x.shape[0], x.shape[1] // head_dim, head_dim))

    @segment
    def merge_heads(self, x: Tensor) -> Tensor:
        self._begin("merge_heads")
        return self._reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))

    @segment
    def add_residual(self, x: Tensor, delta: Tensor) -> Tensor:
        self._begin("add_residual")
        return self._binary("SUM", x, self._cast(delta, x.dtype), "sum")

    def elementwise(self, op: str, x: Value, other: Value | float) -> Value:
        self._begin(op)
        return self._binary({"add": "SUM", "sub": "SUB", "mul": "PROD"}[op], x, other, op)

    # --- layers ------------------------------------------------------------------------------

    def _begin(self, op: str) -> None:
        """The layers to come are this op's, the segment's next node."""
        self._op = f"{self._count}.{op}"
        self._count += 1

    def _value(self, part: str, layer: Any, shape: Shape, dtype: str, typed: bool = True) -> Value:
        """A layer just added, named and typed, as the value it gives, which has to be `shape`.

        `typed` layers take the dtype as an instruction (where a flavour needs any).
        """
        name = f"{self._op}/{part}"
        self._names[name] += 1
        if self._names[name] > 1:  # TensorRT wants each name once
            name = f"{name} {self._names[name]}"
        if layer is None:
            raise self._rejected(name)
        layer.name = name
        if typed:
            self._flavour.set_types(layer, dtype)
        tensor = layer.get_output(0)
        try:
            found = tuple(tensor.shape)
        except (RuntimeError, ValueError):  # TensorRT's way to say that a layer is not valid
            raise self._rejected(name) from None
        if len(found) != len(shape) or any(
            a != b for a, b in zip(found, shape, strict=True) if ROWS not in (a, b)
        ):
            raise TensorRTError(f"{name}: TensorRT finds a shape of {found}, not {shape}")
        return Value(self, tensor, shape, dtype)

    def _rejected(self, name: str) -> TensorRTError:
        return TensorRTError(f"{name}: {self._flavour.messages.take()}")

    def _cast(self, x: Value, dtype: str) -> Value:
        if x.dtype == dtype:
            return x
        layer = self._network.add_cast(x.tensor, self._flavour.data_type(dtype))
        return self._value(f"cast to {dtype}", layer, x.shape, dtype, typed=False)

    def _binary(self, operation: str, x: Value, other: Value | float, part: str) -> Value:
        """Elementwise; a shorter shape meets the longer one's last axes."""
        if not isinstance(other, Value):
            other = self._constant(other, (1,) * len(x.shape), x.dtype)
        rank = max(len(x.shape), len(other.shape))
        x, other = self._raised(x, rank), self._raised(other, rank)
        kind = getattr(self._trt.ElementWiseOperation, operation)
        layer = self._network.add_elementwise(x.tensor, other.tensor, kind)
        shape = tuple(b if a == 1 else a for a, b in zip(x.shape, other.shape, strict=True))
        return self._value(part, layer, shape, x.dtype)

    def _raised(self, x: Value, rank: int) -> Value:
        """The value with axes of length one in front."""
        missing = rank - len(x.shape)
        return self._reshape(x, (1,) * missing + x.shape) if missing else x

    def _reshape(self, x: Value, shape: Shape) -> Value:
        layer = self._network.add_shuffle(x.tensor)
        # A zero keeps the input's dimension: the rows, which are always the first.
        layer.reshape_dims = tuple(0 if size == ROWS else size for size in shape)
        return self._value("reshape", layer, shape, x.dtype)

    def _activation(self, kind: str, x: Value) -> Value:
        layer = self._network.add_activation(x.tensor, getattr(self._trt.ActivationType, kind))
        return self._value(kind.lower(), layer, x.shape, x.dtype)

    def _mean(self, x: Value, part: str) -> Value:
        """Over the last axis, which stays with length one."""
        last = len(x.shape) - 1
        average = self._trt.ReduceOperation.AVG
        layer = self._network.add_reduce(x.tensor, average, 1 << last, keep_dims=True)
        return self._value(part, layer, (*x.shape[:-1], 1), x.dtype)

    def _normalized(self, x: Value, eps: float) -> Value:
        """`x / sqrt(mean(x * x) + eps)`."""
        variance = self._mean(self._binary("PROD", x, x, "square"), "variance")
        root = self._unary("SQRT", self._binary("SUM", variance, eps, "eps"))
        return self._binary("PROD", x, self._unary("RECIP", root), "normalized")

    def _unary(self, kind: str, x: Value) -> Value:
        layer = self._network.add_unary(x.tensor, getattr(self._trt.UnaryOperation, kind))
        return self._value(kind.lower(), layer, x.shape, x.dtype)

    def _constant(self, value: float | Sequence[int], shape: Shape, dtype: str) -> Value:
        if dtype == "bfloat16":  # which NumPy has not
            return self._cast(self._constant(value, shape, "float32"), dtype)
        array = np.full(shape, value, dtype)
        self._constants.append(array)
        layer = self._network.add_constant(shape, self._trt.Weights(array))
        return self._value("constant", layer, shape, dtype, typed=False)

    def _slice(self, x: Value, start: int, size: int) -> Value:
        """Part of the last axis. The shape is computed, as the number of rows is not known."""
        rank = len(x.shape)
        begin, ones = (*(0,) * (rank - 1), start), (1,) * rank
        shape = (*x.shape[:-1], size)
        computed = self._shape_tensor(shape)
        layer = self._network.add_slice(x.tensor, begin, ones, ones)
        layer.set_input(2, computed)
        return self._value("slice", layer, shape, x.dtype)

    def _shape_tensor(self, shape: Shape) -> Any:
        kind = self._flavour.shape_dtype
        fixed = self._constant(shape[1:], (len(shape) - 1,), kind)
        layer = self._network.add_concatenation([self._rows.tensor, fixed.tensor])
        layer.axis = 0
        return self._value("shape", layer, (len(shape),), kind, typed=False).tensor

    def _first_dimension(self, x: Value) -> Value:
        kind, rank = self._flavour.shape_dtype, len(x.shape)
        self._op = "rows"
        layer = self._network.add_shape(x.tensor)
        whole = self._value("shape", layer, (rank,), kind, typed=False)
        layer = self._network.add_slice(whole.tensor, (0,), (1,), (1,))
        return self._value("first", layer, (1,), kind, typed=False)
