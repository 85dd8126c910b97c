"""Segments whose weights are quantized: what plans are made of where a checkpoint is.

A definition is traced without regard to how its weights are stored, and own kernels run what was
traced on quantized weights as they are. A compiler has to be told: here each `linear` by such a
weight becomes a `linear_quantized` by its arrays, which take the weight's place among the
segment's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensorray.builder.graph import Node, Program, Segment, SegmentCall, Spec, WeightRef
from tensorray.builder.model import Model, Weight
from tensorray.builder.quantization import Form, SchemeOf, weight_forms
from tensorray.kernels.quantized import Kind, QuantizedWeight

#: The arrays of a quantized weight that `linear_quantized` takes, in its order.
_ARRAYS = ("values", "scales", "zeros", "order", "groups")


def quantize_program(program: Program, forms: Mapping[WeightRef, Form]) -> Program:
    """The program with segments for quantized weights; calls name weights as before."""
    return replace(
        program,
        calls=tuple(
            replace(
                call,
                segment=quantized_segment(call.segment, [forms.get(ref) for ref in call.weights]),
            )
            if isinstance(call, SegmentCall)
            else call
            for call in program.calls
        ),
    )


def model_forms(model: Model, layers: range, scheme_of: SchemeOf) -> dict[WeightRef, Form]:
    """The forms of a stage's weights that are held quantized, by where they are used."""
    groups: dict[str | int, dict[str, Weight]] = {"head": model.head_weights()}
    groups.update((layer, model.layer_weights(layer)) for layer in layers)
    declared = {
        WeightRef(group, name): weight
        for group, weights in groups.items()
        for name, weight in weights.items()
    }
    forms = weight_forms(model, declared.values(), scheme_of)
    return {ref: forms[weight] for ref, weight in declared.items() if weight in forms}


def quantized_segment(segment: Segment, forms: Sequence[Form | None]) -> Segment:
    """The segment for weights of some forms, None for those that are not quantized."""
    if not any(forms):
        return segment
    number = len(segment.inputs)
    moved: dict[int | None, Any] = {None: None}
    moved.update((index, index) for index in range(number))
    weights: list[Spec] = []
    quantized: dict[int, tuple[Form, list[int | None]]] = {}
    for index, (spec, form) in enumerate(zip(segment.weights, forms, strict=True), number):
        if form is None:
            moved[index] = number + len(weights)
            weights.append(spec)
            continue
        if form.shape != spec.shape:
            raise ValueError(f"a quantized weight of {form.shape}, not {spec.shape}")
        places: dict[str, int] = {}
        for name, (shape, dtype) in form.arrays().items():
            places[name] = number + len(weights)
            weights.append(Spec(shape, dtype))  # type: ignore[arg-type]
        quantized[index] = (form, [places.get(name) for name in _ARRAYS])
    shift = len(weights) - len(segment.weights)
    first = number + len(segment.weights)
    made = sum(len(node.outputs) for node in segment.nodes)
    moved.update({index: index + shift for index in range(first, first + made)})
    return Segment(
        inputs=segment.inputs,
        weights=tuple(weights),
        nodes=tuple(_node(node, moved, quantized) for node in segment.nodes),
        outputs=tuple(moved[index] for index in segment.outputs),
    )


def _node(
    node: Node,
    moved: Mapping[int | None, Any],
    quantized: Mapping[int, tuple[Form, list[int | None]]],
) -> Node:
    if node.op == "linear" and node.arguments[1] in quantized:
        x, weight, bias = node.arguments
        assert weight is not None
        form, arrays = quantized[weight]
        return Node(
            "linear_quantized",
            (moved[x], *arrays, moved[bias]),
            (("group", form.group), ("kind", form.kind)),
            node.outputs,
        )
    if any(index in quantized for index in node.arguments):
        raise ValueError(f"{node.op} by a quantized weight; only linears take one")
    return replace(node, arguments=tuple(moved[index] for index in node.arguments))


def form_of(weight: Any) -> Form | None:
    """The form of a weight that is held; None if it is not quantized."""
    if not isinstance(weight, QuantizedWeight):
        return None
    return Form(
        kind=weight.kind,
        shape=weight.shape,
        group=weight.group,
        count=weight.scales.shape[-1],
        zeros=weight.zeros is not None,
        ordered=weight.order is not None,
        scattered=weight.groups is not None,
    )


def flat(weights: Iterable[Any]) -> list[Any]:
    """Weights as a quantized segment takes them: the arrays of each quantized one in its place."""
    arrays: list[Any] = []
    for weight in weights:
        if isinstance(weight, QuantizedWeight):
            arrays += weight.arrays().values()
        else:
            arrays.append(weight)
    return arrays


@dataclass(frozen=True)
class Product:
    """What a TensorRT has to have for a quantized linear, whatever its size."""

    kind: Kind
    group: int | None  # None: a scale a row
    zeros: bool
    ordered: bool
    scattered: bool

    def __str__(self) -> str:
        scales = f"groups of {self.group}" if self.group else "a scale a row"
        extras = [" and zeros"] * self.zeros + [", act-order"] * self.ordered
        extras += [" with inputs split over ranks"] * self.scattered
        return f"{self.kind} weights with {scales}{''.join(extras)}"

    def example(self) -> Form:
        """A small weight of this kind."""
        group = self.group or 64
        count = 2 if self.group else 1
        shape = (32, count * group)
        return Form(self.kind, shape, group, count, self.zeros, self.ordered, self.scattered)


def products(segment: Segment) -> list[Product]:
    """The kinds of quantized linears in a segment."""
    specs = [*segment.inputs, *segment.weights]
    found = []
    for node in segment.nodes:
        if node.op == "linear_quantized":
            _, _, scales, zeros, order, groups, _ = node.arguments
            assert scales is not None
            attributes = dict(node.attributes)
            one = specs[scales].shape[1] == 1
            group = None if one else attributes["group"]
            present = [each is not None for each in (zeros, order, groups)]
            found.append(Product(attributes["kind"], group, *present))
    return list(dict.fromkeys(found))
