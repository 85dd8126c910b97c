"""Evaluate a TensorRT network definition with NumPy: what its layers mean, without a GPU.

Reads the definition through TensorRT's own API, layer by layer, so that what is computed is what
TensorRT was told, and nothing that the code under test says about it. Knows the layers that
TensorRTOps uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def evaluate(trt: Any, network: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The network's outputs by name, for arrays by input name."""
    values = dict(inputs)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        name, compute = _LAYERS[layer.type.name]
        # The API gives every layer as its base class; this is how to see it as its own.
        layer.__class__ = getattr(trt, name)
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        result = compute(trt, layer, *(None if t is None else values[t.name] for t in tensors))
        output = layer.get_output(0)
        assert result.ndim == len(output.shape), layer.name
        values[output.name] = result
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    return {name: values[name] for name in outputs}


def _cast(trt: Any, layer: Any, x: Any) -> Any:
    return x.astype(trt.nptype(layer.to_type))


def _matmul(trt: Any, layer: Any, x: Any, y: Any) -> Any:
    transposed = trt.MatrixOperation.TRANSPOSE
    return (x.T if layer.op0 == transposed else x) @ (y.T if layer.op1 == transposed else y)


def _elementwise(trt: Any, layer: Any, x: Any, y: Any) -> Any:
    # TensorRT broadcasts axes of length one, and never adds any.
    assert x.ndim == y.ndim, layer.name
    assert x.dtype == y.dtype, layer.name
    return {"SUM": np.add, "SUB": np.subtract, "PROD": np.multiply}[layer.op.name](x, y)


def _shuffle(trt: Any, layer: Any, x: Any) -> Any:
    shape = [x.shape[i] if n == 0 else n for i, n in enumerate(tuple(layer.reshape_dims))]
    return x.reshape(shape)


def _activation(trt: Any, layer: Any, x: Any) -> Any:
    if layer.type == trt.ActivationType.SIGMOID:
        return (1 / (1 + np.exp(-x.astype(np.float64)))).astype(x.dtype)
    assert layer.type == trt.ActivationType.TANH
    return np.tanh(x)


def _reduce(trt: Any, layer: Any, x: Any) -> Any:
    assert layer.op == trt.ReduceOperation.AVG
    axes = tuple(axis for axis in range(x.ndim) if layer.axes >> axis & 1)
    return x.mean(axis=axes, keepdims=layer.keep_dims)


def _unary(trt: Any, layer: Any, x: Any) -> Any:
    return {"SQRT": np.sqrt, "RECIP": np.reciprocal}[layer.op.name](x)


def _constant(trt: Any, layer: Any) -> Any:
    return np.array(layer.weights).reshape(tuple(layer.shape))


def _shape(trt: Any, layer: Any, x: Any) -> Any:
    return np.array(x.shape, np.int64)


def _slice(trt: Any, layer: Any, x: Any, *computed: Any) -> Any:
    """Inputs after the first stand for start, shape and stride in turn, where they are given."""
    shape = tuple(layer.shape) if len(computed) < 2 else computed[1]
    ends = [
        start + size * stride
        for start, size, stride in zip(layer.start, shape, layer.stride, strict=True)
    ]
    assert all(end <= length for end, length in zip(ends, x.shape, strict=True)), layer.name
    return x[tuple(map(slice, layer.start, ends, layer.stride))]


def _concatenation(trt: Any, layer: Any, *parts: Any) -> Any:
    return np.concatenate(parts, axis=layer.axis)


def _dequantize(trt: Any, layer: Any, x: Any, scale: Any) -> Any:
    """Each axis of the scale divides the codes' axis, or it has none."""
    for axis, count in enumerate(scale.shape):
        assert x.shape[axis] % count == 0, layer.name
        scale = scale.repeat(x.shape[axis] // count, axis=axis)
    # In one rounding: a layer's precision is its scale's.
    return (x.astype(np.float64) * scale).astype(trt.nptype(layer.to_type))


def _gather(trt: Any, layer: Any, x: Any, indices: Any) -> Any:
    return np.take(x, indices, axis=layer.axis)


_LAYERS = {
    "ACTIVATION": ("IActivationLayer", _activation),
    "CAST": ("ICastLayer", _cast),
    "CONCATENATION": ("IConcatenationLayer", _concatenation),
    "CONSTANT": ("IConstantLayer", _constant),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "ELEMENTWISE": ("IElementWiseLayer", _elementwise),
    "GATHER": ("IGatherLayer", _gather),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matmul),
    "REDUCE": ("IReduceLayer", _reduce),
    "SHAPE": ("IShapeLayer", _shape),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "UNARY": ("IUnaryLayer", _unary),
}
