"""A peephole pass: a segment's ops, joined where one kernel does the work of several.

What can be joined with what follows from where the values go: an intermediate that one op makes
and one op reads need never be written to memory.

    linear, + bias                     -> linear with a bias
    linear, split, silu(gate) * up     -> gated linear             or linear, gated
    linear, add_residual               -> linear that adds to x    (few rows)
    add_residual, rms_norm             -> add_rms_norm
    rms_norm, linear                   -> linear that norms x      (few rows)

With few rows a linear is bound by reading its weight, and what is joined to it is free: a decode
layer of Llama's is four calls. With many it is the best matrix product there is, with the rest
joined among itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tensorray.builder.graph import Segment

GATES = ("silu", "gelu_tanh")


@dataclass(frozen=True)
class Call:
    """One op over a segment's local values: of the op set, or one of those the pass makes.

    The latter, all of whose arguments but the first two may be None:
    `linear(x, weight, bias, residual, norm; eps, gate)`, `gated(x; kind)`,
    `add_rms_norm(x, delta, weight; eps) -> x + delta, normed`.
    """

    op: str
    arguments: tuple[int | None, ...]
    attributes: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]


def fuse(segment: Segment, *, few_rows: bool) -> tuple[Call, ...]:
    """The calls that compute a segment, in order, over its values as it numbers them."""
    fusion = _Fusion(segment)
    fusion.join("linear", "add", _bias)
    fusion.gate()
    if few_rows:
        fusion.join("linear", "add_residual", _residual)
    else:
        fusion.ungate()
    fusion.add_norms()
    if few_rows:
        fusion.join("rms_norm", "linear", _normed)
    return tuple(fusion.calls)


class _Fusion:
    """A segment's calls while they are joined."""

    def __init__(self, segment: Segment) -> None:
        self.weights = range(len(segment.inputs), len(segment.inputs) + len(segment.weights))
        self.shapes = [spec.shape for spec in (*segment.inputs, *segment.weights)]
        self.kept = segment.outputs
        self.calls: list[Call] = []
        for node in segment.nodes:
            first = len(self.shapes)
            self.shapes += [spec.shape for spec in node.outputs]
            outputs = tuple(range(first, len(self.shapes)))
            arguments = node.arguments
            if node.op == "linear":
                arguments = (*arguments, *[None] * (5 - len(arguments)))
            self.calls.append(Call(node.op, arguments, node.attributes, outputs))

    def join(self, first: str, second: str, merge: Callable[..., Call | None]) -> None:
        """Join each `first` into the `second` that alone reads its result, where `merge` can."""
        for call in [call for call in self.calls if call.op == first]:
            reader = self.reader(call)
            if reader is None or reader.op != second:
                continue
            merged = merge(self, call, reader)
            if merged is not None:
                self.replace(reader, merged)
                self.calls.remove(call)

    def gate(self) -> None:
        """Join a linear and the activation that its one half gates the other with."""
        for linear in [call for call in self.calls if call.op == "linear"]:
            split = self.reader(linear)
            if split is None or split.op != "split" or len(split.outputs) != 2:
                continue
            gate, up = split.outputs
            act, product = self.reader(split, gate), self.reader(split, up)
            if act is None or act.op not in GATES or product is None or product.op != "mul":
                continue
            if self.reader(act) is product and set(product.arguments) == {act.outputs[0], up}:
                attributes = (*linear.attributes, ("gate", act.op))
                outputs = product.outputs
                self.replace(product, replace(linear, attributes=attributes, outputs=outputs))
                for call in (linear, split, act):
                    self.calls.remove(call)

    def ungate(self) -> None:
        """Take gates out of their linears again, as calls of their own."""
        for call in [call for call in self.calls if "gate" in dict(call.attributes)]:
            attributes = dict(call.attributes)
            kind = attributes.pop("gate")
            self.shapes.append(())  # a value of its own, which nobody asks the shape of
            wide = len(self.shapes) - 1
            linear = replace(call, attributes=tuple(attributes.items()), outputs=(wide,))
            gated = Call("gated", (wide,), (("kind", kind),), call.outputs)
            self.replace(call, linear, gated)

    def add_norms(self) -> None:
        """Join additions to the residual stream with the norms that follow.

        Others read the sum as well, so the joined call takes the addition's place.
        """
        for add in [call for call in self.calls if call.op == "add_residual"]:
            total = add.outputs[0]
            for norm in self.calls:
                if norm.op == "rms_norm" and norm.arguments[0] == total:
                    weight = norm.arguments[1]
                    if weight in self.weights:
                        outputs = (total, *norm.outputs)
                        arguments = (*add.arguments, weight)
                        self.calls.remove(norm)
                        self.replace(add, Call("add_rms_norm", arguments, norm.attributes, outputs))
                    break

    def reader(self, call: Call, value: int | None = None) -> Call | None:
        """The one call that reads a value, once (None: the call's only one); else None."""
        value = call.outputs[0] if value is None else value
        if value in self.kept:
            return None
        uses = Counter({i: each.arguments.count(value) for i, each in enumerate(self.calls)})
        return self.calls[uses.most_common(1)[0][0]] if uses.total() == 1 else None

    def replace(self, call: Call, *calls: Call) -> None:
        at = self.calls.index(call)
        self.calls[at : at + 1] = calls


def _bias(fusion: _Fusion, linear: Call, add: Call) -> Call | None:
    x, weight, bias, *rest = linear.arguments
    others = [value for value in add.arguments if value != linear.outputs[0]]
    if bias is not None or len(others) != 1 or others[0] not in fusion.weights:
        return None
    return replace(linear, arguments=(x, weight, others[0], *rest), outputs=add.outputs)


def _residual(fusion: _Fusion, linear: Call, add: Call) -> Call | None:
    x, weight, bias, _, norm = linear.arguments
    stream, delta = add.arguments
    if delta != linear.outputs[0] or "gate" in dict(linear.attributes):
        return None
    return replace(linear, arguments=(x, weight, bias, stream, norm), outputs=add.outputs)


def _normed(fusion: _Fusion, norm: Call, linear: Call) -> Call | None:
    _, weight, bias, residual, _ = linear.arguments
    x, scale = norm.arguments
    if linear.arguments[0] != norm.outputs[0] or len(fusion.shapes[norm.outputs[0]]) != 2:
        return None
    attributes = (*linear.attributes, *norm.attributes)
    return replace(linear, arguments=(x, weight, bias, residual, scale), attributes=attributes)
