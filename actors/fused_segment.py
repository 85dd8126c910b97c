"""A segment by the project's own kernels: few calls, each of which does the work of several ops."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tensorray.actors.array_segment import Backend, Runner
from tensorray.actors.fusion import fuse
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.graph import ELEMENTWISE, Segment, elementwise
from tensorray.builder.ops import Tensor, segment
from tensorray.kernels import activation, linear, norm
from tensorray.kernels.cuda.linear import FEW_ROWS


@cache
def kernels_digest() -> str:
    """A digest of all source that decides how fast fused segments are."""
    folder = Path(linear.__file__).parent
    files = [*folder.glob("*.py"), *folder.glob("cuda/*"), *Path(__file__).parent.glob("fus*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.suffix in (".py", ".cu", ".cuh"):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


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
        gate: activation.Gate | None = None,
    ) -> Tensor:
        """See `kernels.linear.linear`."""
        return linear.linear(
            x, weight, bias, norm=norm_weight, eps=eps, gate=gate, residual=residual
        )

    @segment
    def add_residual(self, x: Tensor, delta: Tensor) -> Tensor:
        return activation.add(x, delta)

    def add_rms_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, delta_weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `kernels.norm.add_rms_norm`."""
        return norm.add_rms_norm(x, delta, weight, eps, delta_weight=delta_weight)

    def qk_norm(
        self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `kernels.norm.qk_norm`."""
        return norm.qk_norm(q, k, q_weight, k_weight, eps)


class FusedSegment(Runner):
    """Runs `fuse`'s calls on arrays of the module `xp`, joined as a number of rows wants them."""

    backend: Backend = "kernels"

    def __init__(self, segment: Segment, rows: int, xp: Any) -> None:
        self._calls = fuse(segment, few_rows=rows <= FEW_ROWS)
        self._inputs = len(segment.inputs)
        self._outputs = segment.outputs
        self._ops = FusedOps(xp, {})

    def gated_weights(self, weights: Sequence[Any]) -> list[Any]:
        """Those of the segment's weights whose products have a gate."""
        gated = [call for call in self._calls if "gate" in dict(call.attributes)]
        given: dict[int | None, Any] = dict(enumerate(weights, self._inputs))
        return [given[call.arguments[1]] for call in gated if call.arguments[1] in given]

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
