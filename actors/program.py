"""A traced program at work: its segments through runners, its kernel ops through `ArrayOps`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from tensorray.actors.array_segment import Runner
from tensorray.actors.protocol import SegmentInfo
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.graph import KernelCall, Program, Segment, SegmentCall, WeightRef
from tensorray.builder.model import ShardWeights, Weights

Call = SegmentCall | KernelCall


class Runners(Protocol):
    """What runs the program's segments (segment_runners.py)."""

    rejected: list[str]

    def get(self, segment: Segment, rows: int) -> Runner: ...

    def prepare(self, body_rows: Sequence[int], head_rows: Sequence[int]) -> None: ...

    def report(self) -> list[SegmentInfo]: ...


class ProgramRunner:
    """A program over one shard's weights and cache, run call by call.

    In two parts, since they have different numbers of rows: `body` runs the layers over a step's
    packed tokens, `head` makes logits of the rows that are wanted. A stage of a pipeline that does
    not end the model has no head. `runner(segment, rows)` says what runs a segment.
    """

    def __init__(
        self,
        program: Program,
        ops: ArrayOps,
        weights: ShardWeights,
        runner: Callable[[Segment, int], Runner],
    ) -> None:
        self._ops = ops
        self._weights = weights
        self._runner = runner
        calls = program.calls
        cut = next((i for i, call in enumerate(calls) if _is(call, "select_rows")), len(calls))
        self._result = program.result
        self._select: KernelCall | None = None
        if cut < len(calls):
            self._select = select = calls[cut]  # type: ignore[assignment]
            assert isinstance(select, KernelCall)
            (hidden,) = select.arguments
            assert isinstance(hidden, int)
            self._hidden = hidden
        else:
            self._hidden = program.result
        self._body = _with_ends(calls[:cut], self._hidden)
        self._head = _with_ends(calls[cut + 1 :], self._result)

    @property
    def has_head(self) -> bool:
        return self._select is not None

    def body(self, first: Any) -> Any:
        """The residual stream after the last layer, from the step's tokens (or the stream)."""
        return self._run(self._body, {0: first}, self._hidden, len(first))

    def select(self, hidden: Any) -> Any:
        """The rows of the residual stream whose logits the batch wants."""
        return self._ops.select_rows(hidden)

    def head(self, rows: Any) -> Any:
        """Logits `[R, vocab]` from rows of the residual stream `[R, hidden]`."""
        assert self._select is not None, "only the last stage has a head"
        return self._run(self._head, {self._select.outputs[0]: rows}, self._result, len(rows))

    def head_of(self, hidden: Any, first: int, count: int) -> Any:
        """Logits of packed rows of a step, from `first` on, of its residual stream."""
        return self.head(hidden[first : first + count])

    def _run(
        self, calls: list[tuple[Call, tuple[int, ...]]], values: dict[int, Any], end: int, rows: int
    ) -> Any:
        for call, ends in calls:
            outputs = self.bound(call, values, rows)()
            values.update(zip(call.outputs, outputs, strict=True))
            # What nobody reads any more frees its memory for what comes next.
            for index in ends:
                del values[index]
        return values[end]

    def bound(
        self, call: Call, values: Mapping[int, Any], rows: int
    ) -> Callable[[], Sequence[Any]]:
        """A call on what it reads, in a step of so many rows; calling it gives its outputs."""
        if isinstance(call, SegmentCall):
            run = self._runner(call.segment, rows).run
            inputs = [values[index] for index in call.inputs]
            return partial(run, inputs, [self._weight(ref) for ref in call.weights])
        arguments = [
            self._weight(argument) if isinstance(argument, WeightRef) else values[argument]
            for argument in call.arguments
        ]
        op = partial(getattr(self._ops, call.op), *arguments, **dict(call.attributes))
        return op if len(call.outputs) > 1 else lambda: [op()]

    def _weight(self, ref: WeightRef) -> Any:
        weights = self._weights
        group: Weights
        if isinstance(ref.group, int):
            group = weights.layers[ref.group]
        else:
            group = weights.embed if ref.group == "embed" else weights.head
        return group.arrays[ref.name]


def _is(call: Call, op: str) -> bool:
    return isinstance(call, KernelCall) and call.op == op


def _with_ends(calls: Sequence[Call], kept: int) -> list[tuple[Call, tuple[int, ...]]]:
    """Each call with the values that nothing after it reads; `kept` is the part's result."""
    needed = {kept}
    found: list[tuple[Call, tuple[int, ...]]] = []
    for call in reversed(calls):
        arguments = call.inputs if isinstance(call, SegmentCall) else call.arguments
        used = {a for a in arguments if isinstance(a, int)} | set(call.outputs)
        found.append((call, tuple(sorted(used - needed))))
        needed |= used
    return found[::-1]
