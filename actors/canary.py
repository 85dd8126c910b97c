"""The check a plan passes before it serves: random inputs, against array ops on the same device.

A plan is megabytes of somebody else's machine code, chosen by timing. That it is wrong is rare,
and nothing else would notice: tokens would just be bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tensorray.actors.plan_segment import PlanSegment
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.graph import DTypes, Segment
from tensorray.builder.ops import Tensor, segment
from tensorray.kernels import activation, norm
from tensorray.kernels.quantized import QuantizedWeight, dequantize

#: The largest relative error of a plan that serves: norm of the difference over the norm. Right
#: bfloat16 kernels come to 1.2e-2 on one row of a tiny model, and stay under 1e-2 on real ones.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}

#: Rows computed again; rows don't depend on each other, so a sample of many stands for all.
_SAMPLE = 32
#: Half of the rows are this small, for an `eps` to matter to their norms.
_SMALL = 1 / 256
#: Rows of a weight that are widened at once.
_BLOCK = 16384


class WideOps(ArrayOps):
    """Segment ops in float32, by the kernels' twins, on narrower weights."""

    @segment
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, QuantizedWeight):
            weight = dequantize(weight)
        pieces = [
            x @ weight[start : start + _BLOCK].astype(np.float32).T
            for start in range(0, len(weight), _BLOCK)
        ]
        y = self.xp.concatenate(pieces, axis=1)
        return y if bias is None else y + bias.astype(np.float32)

    @segment
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm_numpy(x, weight.astype(np.float32), eps)

    @segment
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = weight.astype(np.float32), bias.astype(np.float32)
        return norm.layer_norm_numpy(x, *wide, eps)

    @segment
    def silu(self, x: Tensor) -> Tensor:
        return activation.silu_numpy(x)

    @segment
    def gelu_tanh(self, x: Tensor) -> Tensor:
        return activation.gelu_tanh_numpy(x)

    @segment
    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return activation.softcap_numpy(x, cap)


def error_of(
    runner: PlanSegment,
    segment: Segment,
    weights: Sequence[Any],
    dtypes: DTypes,
    xp: Any,
    seed: int = 0,
) -> float:
    """The largest relative error of a plan's outputs on random inputs; infinite where it gives
    no number. `weights` are the segment's, of any layer."""
    errors = []
    for odd in (False, True):  # so that a single row is once large and once small
        inputs = random_inputs(segment, runner.rows, dtypes, xp, seed, odd=odd)
        outputs = runner.poisoned_outputs()
        runner.run_into(inputs, weights, outputs)
        errors.append(worst_error(segment, inputs, weights, outputs, xp))
    return max(errors)


def random_inputs(
    segment: Segment, rows: int, dtypes: DTypes, xp: Any, seed: int = 0, *, odd: bool = False
) -> list[Any]:
    """Normal values, of rows of different sizes: every other one is small."""
    generator = np.random.default_rng(seed)
    sizes = generator.uniform(0.5, 1.5, rows) * np.where(np.arange(rows) % 2 == odd, 1.0, _SMALL)
    scale = xp.asarray(sizes.astype(np.float32))
    inputs = []
    for spec in segment.inputs:
        some = generator.standard_normal((min(rows, 2 * _SAMPLE), *spec.shape[1:]), np.float32)
        values = xp.asarray(some)[xp.arange(rows) % len(some)]
        values = values * scale.reshape(rows, *[1] * (len(spec.shape) - 1))
        inputs.append(values.astype(np.dtype(dtypes.of(spec.dtype))))
    return inputs


def worst_error(
    segment: Segment,
    inputs: Sequence[Any],
    weights: Sequence[Any],
    outputs: Sequence[Any],
    xp: Any,
) -> float:
    """The largest relative error among outputs, over a sample of rows."""
    rows = len(inputs[0])
    sample = np.unique(np.linspace(0, rows - 1, min(rows, _SAMPLE)).astype(np.int64))
    chosen = xp.asarray(sample)  # the last row among them, where padding and tiles end
    expected = segment.run(
        WideOps(xp, {}), [each[chosen].astype(np.float32) for each in inputs], weights
    )
    return max(
        _relative_error(found[chosen], other)
        for found, other in zip(outputs, expected, strict=True)
    )


def _relative_error(found: Any, expected: Any) -> float:
    """Of the norm; infinite if anything is not a number."""
    difference = found.astype(np.float32) - expected
    error, size = float((difference * difference).sum()), float((expected * expected).sum())
    if error == 0.0:
        return 0.0
    return (error / size) ** 0.5 if size > 0.0 and error == error else float("inf")
