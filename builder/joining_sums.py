"""A sum over ranks, joined with the residual stream that it is added to and the norm of that.

After a sum every rank holds all columns of each row, so the kernel that sums up few rows can do
what follows as well (`ArrayOps.sum_norm`). What a segment had of it is taken out, so plans are
built of joined programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from tensorray.builder.graph import KernelCall, Node, Program, Segment, SegmentCall, Spec

#: `ArrayOps.sum_norm`: the residual stream, what is summed and added to it, the norm's weight and,
#: where what is added is normed itself, the weight of that.
SUM_NORM = "sum_norm"

Call = SegmentCall | KernelCall


def join_sums(program: Program) -> Program:
    """The program with every sum that is added to the residual stream and normed as one call."""
    uses = Counter(_read(program))
    fresh = count(1 + max(value for call in program.calls for value in call.outputs))
    joined: list[Call] = []
    for call in program.calls:
        before = joined[-1] if joined else None
        if (
            isinstance(call, SegmentCall)
            and isinstance(before, KernelCall)
            and before.op == "all_reduce"
            and uses[before.outputs[0]] == 1
            and before.outputs[0] in call.inputs
        ):
            start = _start(call.segment, call.inputs.index(before.outputs[0]))
            if start is not None:
                joined[-1:] = _joined(before, call, start, fresh)
                continue
        joined.append(call)
    return Program(tuple(joined), program.result)


def _read(program: Program) -> Iterable[int]:
    """What the program's calls read, as often as they do."""
    for call in program.calls:
        given = call.inputs if isinstance(call, SegmentCall) else call.arguments
        yield from (value for value in given if isinstance(value, int))
    yield program.result


@dataclass(frozen=True)
class _Start:
    """The ops of a segment that go into the call before it, by the segment's values."""

    stream: int
    total: int
    normed: int
    scales: tuple[int, ...]  # weights: of the norm, of what is added
    made: frozenset[int]  # by those ops
    eps: float


def _start(segment: Segment, delta: int) -> _Start | None:
    """What becomes of an input that is a sum; None if it is something else."""
    made = dict(_made(segment))
    uses = Counter(value for node in segment.nodes for value in node.arguments)
    uses.update(segment.outputs)

    def reader(value: int, op: str) -> tuple[int, Node] | None:
        """The first op of a kind that reads a value, and what it makes."""
        nodes = (item for item in made.items() if item[1].op == op and value in item[1].arguments)
        return next(nodes, None)

    norms = []
    before = reader(delta, "rms_norm")
    if before is not None and uses[delta] == 1:
        delta = before[0]
        norms.append(before)
    add = reader(delta, "add_residual")
    if add is None or uses[delta] > 1 or add[1].arguments[1] != delta:
        return None
    stream = add[1].arguments[0]
    norm = reader(add[0], "rms_norm")
    if norm is None or stream is None or stream >= len(segment.inputs):
        return None
    norms.insert(0, norm)
    scales = [scale for _, node in norms if (scale := node.arguments[1]) is not None]
    epsilons = {dict(node.attributes)["eps"] for _, node in norms}
    if len(epsilons) > 1 or not all(scale in _weights(segment) for scale in scales):
        return None
    gone = frozenset(value for value, _ in (*norms, add))
    return _Start(stream, add[0], norm[0], tuple(scales), gone, epsilons.pop())


def _joined(
    reduced: KernelCall, call: SegmentCall, start: _Start, fresh: Iterator[int]
) -> list[Call]:
    """The call in place of the sum, and what is left of the segment, if anything is."""
    segment, first = call.segment, len(call.inputs)
    outside = dict(zip(segment.outputs, call.outputs, strict=True))
    total = outside.pop(start.total, None) or next(fresh)
    normed = outside.pop(start.normed, None) or next(fresh)
    scales = (call.weights[scale - first] for scale in start.scales)
    arguments = (call.inputs[start.stream], *reduced.arguments, *scales)
    sum_norm = KernelCall(SUM_NORM, arguments, (("eps", start.eps),), (total, normed))

    nodes = {local: node for local, node in _made(segment) if local not in start.made}
    if not nodes:
        return [sum_norm]
    given = {**dict(enumerate(call.inputs)), start.total: total, start.normed: normed}
    read = {value for node in nodes.values() for value in node.arguments}
    inputs = [local for local in given if local in read]
    weights = [local for local in _weights(segment) if local in read]
    return [
        sum_norm,
        SegmentCall(
            _part(segment, inputs, weights, nodes, list(outside)),
            inputs=tuple(given[local] for local in inputs),
            weights=tuple(call.weights[local - first] for local in weights),
            outputs=tuple(outside.values()),
        ),
    ]


def _part(
    segment: Segment,
    inputs: list[int],
    weights: list[int],
    nodes: Mapping[int, Node],
    outputs: list[int],
) -> Segment:
    """A segment of some of the ops, in new numbers; all else are the segment's own values."""
    specs: list[Spec] = [*segment.inputs, *segment.weights]
    specs += [spec for node in segment.nodes for spec in node.outputs]
    number = {local: new for new, local in enumerate([*inputs, *weights])}
    moved = []
    for local, node in nodes.items():
        arguments = tuple(None if value is None else number[value] for value in node.arguments)
        for i in range(len(node.outputs)):
            number[local + i] = len(number)
        moved.append(Node(node.op, arguments, node.attributes, node.outputs))
    return Segment(
        inputs=tuple(specs[local] for local in inputs),
        weights=tuple(specs[local] for local in weights),
        nodes=tuple(moved),
        outputs=tuple(number[local] for local in outputs),
    )


def _made(segment: Segment) -> Iterator[tuple[int, Node]]:
    """Each op, with the first value that it makes."""
    local = len(segment.inputs) + len(segment.weights)
    for node in segment.nodes:
        yield local, node
        local += len(node.outputs)


def _weights(segment: Segment) -> range:
    """The values that are weights."""
    return range(len(segment.inputs), len(segment.inputs) + len(segment.weights))
