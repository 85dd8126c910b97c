"""A peephole pass: a segment's ops, joined where one kernel does the work of several.

What can be joined with what follows from where the values go: an intermediate that one op makes
and one op reads need never be written to memory.

    linear, + bias                     -> linear with a bias
    linear, split, silu(gate) * up     -> gated linear
    linear, add_residual               -> linear that adds to a residual       (few rows)
    rms_norm, linear                   -> linear that norms its input          (few rows)
    rms_norm, add_residual, rms_norm   -> add_rms_norm, with or without the first
    rms_norm of q, rms_norm of k       -> qk_norm

With few rows a linear is bound by reading its weight, and what is joined to it is free: a decode
layer of Llama's is four calls. With many it is the best matrix product there is, with the rest
joined among itself; a gate stays with its linear, which makes it in whatever way is fastest.
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

    The latter, some of whose arguments may be None, as kernels/ describes them:
    `linear(x, weight, bias, residual, norm; eps, gate)`,
    `add_rms_norm(x, delta, weight, delta_weight; eps)`, `qk_norm(q, k, q_weight, k_weight; eps)`.
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
    fusion.add_norms()
    fusion.qk_norms()
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

    def add_norms(self) -> None:
        """Join additions to the residual stream with the norms that follow, and with one of what
        is added.

        Others read the sum as well, so the joined call takes the addition's place.
        """
        for add in [call for call in self.calls if call.op == "add_residual"]:
            (total,), (stream, delta) = add.outputs, add.arguments
            norm = self.norm(reads=total)
            if norm is None or norm.arguments[1] not in self.weights:
                continue
            before = self.norm(makes=delta)
            delta_weight = None
            if before and self.reader(before) is add and before.attributes == norm.attributes:
                delta, delta_weight = before.arguments
                self.calls.remove(before)
            self.calls.remove(norm)
            arguments = (stream, delta, norm.arguments[1], delta_weight)
            outputs = (total, *norm.outputs)
            self.replace(add, Call("add_rms_norm", arguments, norm.attributes, outputs))

    def qk_norms(self) -> None:
        """Join two norms of heads that follow each other."""
        for q, k in zip(self.calls, self.calls[1:], strict=False):
            if (
                q.op == k.op == "rms_norm"
                and q.attributes == k.attributes
                and all(self.is_heads(call.outputs[0]) for call in (q, k))
                and q.outputs[0] != k.arguments[0]
            ):
                (q_heads, q_weight), (k_heads, k_weight) = q.arguments, k.arguments
                arguments = (q_heads, k_heads, q_weight, k_weight)
                self.calls.remove(q)
                self.replace(k, Call("qk_norm", arguments, q.attributes, q.outputs + k.outputs))
                return  # a segment has the heads of one attention

    def is_heads(self, value: int) -> bool:
        return len(self.shapes[value]) == 3

    def norm(self, *, reads: int | None = None, makes: int | None = None) -> Call | None:
        """The first RMS norm of a value, or the one that makes a value."""
        norms = (call for call in self.calls if call.op == "rms_norm")
        return next((n for n in norms if n.arguments[0] == reads or n.outputs[0] == makes), None)

    def reader(self, call: Call, value: int | None = None) -> Call | None:
        """The one call that reads a value, once (None: the call's only one); else None."""
        value = call.outputs[0] if value is None else value
        if value in self.kept:
            return None
        uses = Counter({i: each.arguments.count(value) for i, each in enumerate(self.calls)})
        return self.calls[uses.most_common(1)[0][0]] if uses.total() == 1 else None

    def replace(self, call: Call, by: Call) -> None:
        self.calls[self.calls.index(call)] = by


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
    if linear.arguments[0] != norm.outputs[0]:
        return None
    attributes = (*linear.attributes, *norm.attributes)
    return replace(linear, arguments=(x, weight, bias, residual, scale), attributes=attributes)
