"""A traced program at work on rows some of which have LoRA adapters.

Segments run by own kernels, each product with what adapters add to it: its `shrink` before it,
which reads the same rows, its `expand` after. An addition has to come before whatever follows the
product and after whatever makes its rows, so of `fuse`'s joins those of many rows are used, at any
number: norms with the additions before them. A gate comes after the addition. TensorRT's plans have
no place for it.
"""

from __future__ import annotations

from typing import Any

from tensorray.actors.device_adapters import DeviceAdapters
from tensorray.actors.fused_segment import FusedOps, FusedSegment
from tensorray.actors.program import ProgramRunner
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.graph import Program, Segment
from tensorray.builder.model import ShardWeights
from tensorray.builder.ops import Tensor, segment
from tensorray.kernels import activation, lora
from tensorray.kernels.cuda.linear import FEW_ROWS


class AdaptedOps(FusedOps):
    """The segment ops, products with what adapters add to them."""

    def __init__(self, adapters: DeviceAdapters, xp: Any) -> None:
        super().__init__(xp, {})
        self._adapters = adapters

    @segment
    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        *,
        eps: float = 0.0,
        gate: activation.Gate | None = None,
    ) -> Tensor:
        stack = self._adapters.stack(weight)
        if stack is None:
            return super().linear(x, weight, bias, residual, norm_weight, eps=eps, gate=gate)
        assert residual is norm_weight is None, "an adapter's part comes between"
        inner = lora.shrink(x, stack, self._adapters.rows)
        y = super().linear(x, weight, bias)
        lora.expand(y, inner, stack, self._adapters.rows)
        return y if gate is None else activation.gated(y, gate)


class AdaptedSegment(FusedSegment):
    """Runs a segment with what adapters add to it."""

    def __init__(self, segment: Segment, adapters: DeviceAdapters, xp: Any) -> None:
        super().__init__(segment, FEW_ROWS + 1, xp)
        self._ops = AdaptedOps(adapters, xp)


class AdaptedProgram(ProgramRunner):
    """A program whose rows have the adapters that `DeviceAdapters` was told of last."""

    def __init__(
        self, program: Program, ops: ArrayOps, weights: ShardWeights, adapters: DeviceAdapters
    ) -> None:
        runners = {each: AdaptedSegment(each, adapters, ops.xp) for each in program.segments()}
        super().__init__(program, ops, weights, lambda segment, rows: runners[segment])
        self._adapters = adapters

    def body(self, first: Any) -> Any:
        self._adapters.rows = self._adapters.packed(0, len(first))
        return super().body(first)

    def head(self, rows: Any) -> Any:
        self._adapters.rows = self._adapters.wanted(len(rows))
        return super().head(rows)

    def head_of(self, hidden: Any, first: int, count: int) -> Any:
        self._adapters.rows = self._adapters.packed(first, count)
        return super().head(hidden[first : first + count])
