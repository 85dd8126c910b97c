"""A segment by the project's own kernels: few calls, each of which does the work of several ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorray.actors.array_segment import Backend, Runner
from tensorray.actors.fusion import fuse
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.graph import ELEMENTWISE, Segment, elementwise
from tensorray.builder.ops import Tensor, segment
from tensorray.kernels import activation, linear, norm

#: With more rows than these a linear is a plain matrix product, and what follows it a call of
#: its own.
FEW_ROWS = 64


class FusedOps(ArrayOps):
    """The segment ops, and those that `fuse` makes of several."""

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
        gate: str | None = None,
    ) -> Tensor:
        """A linear on `rms_norm(x)`, gated, added to `residual`; each where it is given."""
        if norm_weight is not None:
            x = norm.rms_norm(x, norm_weight, eps)
        y = linear.linear(x, weight, bias)
        if gate is not None:
            y = self.gated(y, gate)
        return y if residual is None else residual + y

    def gated(self, x: Tensor, kind: str) -> Tensor:
        """`act(gate) * up` of `[T, 2 * inner]`, gate columns first -> `[T, inner]`."""
        inner = x.shape[-1] // 2
        gate: Tensor = getattr(activation, kind)(x[..., :inner])
        return gate * x[..., inner:]

    def add_rms_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`x + delta` in x's dtype, and its norm."""
        x = x + delta
        return x, norm.rms_norm(x, weight, eps)


class FusedSegment(Runner):
    """Runs `fuse`'s calls on arrays of the module `xp`, joined as a number of rows wants them."""

    backend: Backend = "kernels"

    def __init__(self, segment: Segment, rows: int, xp: Any) -> None:
        self._calls = fuse(segment, few_rows=rows <= FEW_ROWS)
        self._outputs = segment.outputs
        self._ops = FusedOps(xp, {})

    def run(self, inputs: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
        values: dict[int | None, Any] = dict(enumerate([*inputs, *weights]))
        values[None] = None
        for call in self._calls:
            arguments = [values[index] for index in call.arguments]
            if call.op in ELEMENTWISE:
                made = elementwise(call.op, arguments, dict(call.attributes))
            else:
                made = getattr(self._ops, call.op)(*arguments, **dict(call.attributes))
            produced = made if isinstance(made, list | tuple) else [made]
            values.update(zip(call.outputs, produced, strict=True))
        return [values[index] for index in self._outputs]
