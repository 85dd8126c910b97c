"""Kernel ops that run as one: rope, the attention that reads it, and norms of the heads before it.

The keys that rope makes go nowhere but to the cache, so one kernel rotates and appends them; and
where a model norms its query and key heads (Qwen 3, Gemma 3) the same kernel does that too. What a
segment had of it is taken out, so plans are built of joined programs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tensorray.builder.graph import (
    KernelCall,
    Node,
    Program,
    Segment,
    SegmentCall,
    WeightRef,
)
from tensorray.builder.joining_sums import join_sums

#: `ArrayOps.rope_attention`: q, k, v and, where heads are normed, q_norm and k_norm.
ROPE_ATTENTION = "rope_attention"

Call = SegmentCall | KernelCall


def join(program: Program) -> Program:
    """The program as devices run it."""
    return join_sums(join_rope(program))


def join_rope(program: Program) -> Program:
    """The program with every rope and the attention that follows it as one call."""
    uses = _uses(program)
    joined: list[Call] = []
    for call in program.calls:
        rope = joined[-1] if joined else None
        if (
            isinstance(call, KernelCall)
            and call.op == "attention"
            and isinstance(rope, KernelCall)
            and rope.op == "rope"
            and call.arguments[:2] == rope.outputs
            and all(uses[value] == 1 for value in rope.outputs)
        ):
            joined.pop()
            attributes = (*call.attributes, *rope.attributes)
            arguments = (*rope.arguments, call.arguments[2])
            before = joined[-1] if joined else None
            if isinstance(before, SegmentCall):
                q, k = rope.arguments
                if isinstance(q, int) and isinstance(k, int) and uses[q] == uses[k] == 1:
                    without = _without_norms(before, q, k)
                    if without is not None:
                        joined[-1], norms, eps = without
                        arguments = (*arguments, *norms)
                        attributes = (*attributes, ("eps", eps))
            call = KernelCall(ROPE_ATTENTION, arguments, attributes, call.outputs)
        joined.append(call)
    return Program(tuple(joined), program.result)


def _uses(program: Program) -> Counter[int]:
    """How many arguments of the program's calls each value is."""

    def read() -> Iterable[int]:
        for call in program.calls:
            given = call.inputs if isinstance(call, SegmentCall) else call.arguments
            yield from (value for value in given if isinstance(value, int))
        yield program.result

    return Counter(read())


def _without_norms(
    call: SegmentCall, q: int, k: int
) -> tuple[SegmentCall, tuple[WeightRef, WeightRef], float] | None:
    """The call without the RMS norms that make its outputs q and k, their weights, and their
    epsilon; None if it does not end in such norms."""
    if q not in call.outputs or k not in call.outputs:
        return None
    segment = call.segment
    made = dict(_made(segment))
    locals_ = [segment.outputs[call.outputs.index(value)] for value in (q, k)]
    norms = [made.get(local) for local in locals_]
    read = Counter(value for node in segment.nodes for value in node.arguments)
    first_weight = len(segment.inputs)
    weights = range(first_weight, first_weight + len(segment.weights))
    refs, epsilons = [], set()
    for local, norm in zip(locals_, norms, strict=True):
        if norm is None or norm.op != "rms_norm" or len(norm.outputs[0].shape) != 3 or read[local]:
            return None
        weight = norm.arguments[1]
        if weight not in weights or read[weight] != 1:
            return None
        assert weight is not None
        refs.append(call.weights[weight - first_weight])
        epsilons.add(dict(norm.attributes)["eps"])
    if len(epsilons) != 1:
        return None
    smaller = _drop(segment, {local: made[local] for local in locals_})
    kept = tuple(ref for ref in call.weights if ref not in refs)
    without = SegmentCall(smaller, call.inputs, kept, call.outputs)
    return without, (refs[0], refs[1]), epsilons.pop()


def _made(segment: Segment) -> Iterable[tuple[int, Node]]:
    """Each value that a node makes, with the node."""
    local = len(segment.inputs) + len(segment.weights)
    for node in segment.nodes:
        for _ in node.outputs:
            yield local, node
            local += 1


def _drop(segment: Segment, norms: dict[int, Node]) -> Segment:
    """The segment without these norms: what they read takes their place. In new numbers."""
    dropped = {norm.arguments[1] for norm in norms.values()}
    inputs = len(segment.inputs)
    number: dict[int, int] = {}  # by the old one
    for old in range(inputs + len(segment.weights)):
        if old not in dropped:
            number[old] = len(number)
    count = len(number)
    nodes = []
    old = inputs + len(segment.weights)
    for node in segment.nodes:
        if old in norms:
            (read, _) = node.arguments
            assert read is not None
            number[old] = number[read]
            old += 1
            continue
        arguments = tuple(None if value is None else number[value] for value in node.arguments)
        nodes.append(Node(node.op, arguments, node.attributes, node.outputs))
        for _ in node.outputs:
            number[old] = count
            old, count = old + 1, count + 1
    return Segment(
        inputs=segment.inputs,
        weights=tuple(
            spec for i, spec in enumerate(segment.weights, start=inputs) if i not in dropped
        ),
        nodes=tuple(nodes),
        outputs=tuple(number[value] for value in segment.outputs),
    )
