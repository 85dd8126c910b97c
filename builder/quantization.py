"""Quantized weights as declarations see them: which weights of a shard are, and in what arrays.

A definition declares weights and knows nothing of this: how a tensor is stored is its checkpoint's
matter, which says so by a `Scheme` a tensor. A declared weight, which may join several tensors, is
held quantized if all its parts are so in one scheme; else its parts are dequantized as they are
loaded. The embedding, whose rows are looked up, always is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tensorray.builder.model import Layout, Model, ModelConfigError, Part, Weight
from tensorray.builder.shares import slice_of, weight_shape
from tensorray.kernels.quantized import Kind, QuantizedWeight


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's tensor is quantized, seen as `[out, in]`."""

    kind: Kind
    group: int | None = None  # columns that share a scale; None: all of a row
    zeros: bool = False
    ordered: bool = False  # groups follow an order of their own (act-order)


#: A tensor's scheme by its name ("….q_proj.weight"); None where it is not quantized.
SchemeOf = Callable[[str], Scheme | None]


@dataclass(frozen=True)
class Form:
    """A quantized weight as a shard holds it: what its arrays are (kernels/quantized.py)."""

    kind: Kind
    shape: tuple[int, ...]  # [out, in], experts stacked before
    group: int
    count: int  # groups of a row
    zeros: bool
    ordered: bool
    scattered: bool  # a share of the inputs, with any number of each group's

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array, by its name; a dtype of int4 is two values a byte."""
        by_group = (*self.shape[:-1], self.count)
        inputs = (*self.shape[:-2], self.shape[-1])
        arrays: dict[str, tuple[tuple[int, ...], str]] = {
            "values": (self.shape, self.kind),
            "scales": (by_group, "float32"),
        }
        if self.zeros:
            arrays["zeros"] = (by_group, "int8")
        if self.ordered:
            arrays["order"] = (inputs, "int32")
        if self.scattered:
            arrays["groups"] = (inputs, "int32")
        return arrays

    @property
    def nbytes(self) -> int:
        return sum(
            prod(_stored(shape, dtype)) * _DTYPES[dtype].itemsize
            for shape, dtype in self.arrays().values()
        )

    def empty(self, empty: Callable[[tuple[int, ...], np.dtype[Any]], Any]) -> QuantizedWeight:
        """A weight of this form, of arrays that `empty` makes, for the loader to fill."""
        arrays: dict[str, Any] = {
            name: empty(_stored(shape, dtype), _DTYPES[dtype])
            for name, (shape, dtype) in self.arrays().items()
        }
        return QuantizedWeight(self.kind, self.group, **arrays)


#: What arrays of a dtype are in memory.
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "int4": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "float8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
    "float32": np.dtype(np.float32),
}


def _stored(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2) if dtype == "int4" else shape


def weight_forms(
    model: Model, weights: Iterable[Weight], scheme_of: SchemeOf
) -> dict[Weight, Form]:
    """The forms of those weights that a shard of the model holds quantized.

    Raises ModelConfigError where tensor-parallel ranks would cut a group.
    """
    tables = set(model.embed_weights().values())
    found = {
        weight: _form(weight, model.layout, scheme_of) for weight in weights if weight not in tables
    }
    return {weight: form for weight, form in found.items() if form is not None}


def _form(weight: Weight, layout: Layout, scheme_of: SchemeOf) -> Form | None:
    if weight.add or any(len(part.shape) != 2 for part in weight.parts):
        return None
    schemes = {scheme_of(part.name) for part in weight.parts}
    scheme = schemes.pop()
    if scheme is None or schemes:
        return None
    shape = weight_shape(weight, layout)
    inputs = {_inputs(part) for part in weight.parts}
    split = layout.tp_size > 1 and any(part.shard == "columns" for part in weight.parts)
    if len(inputs) > 1 or (scheme.kind == "int4" and shape[-1] % 2):
        return None
    whole = inputs.pop()
    group = scheme.group or whole
    scattered = scheme.ordered and split
    if split and not scheme.ordered and scheme.group:
        for part in weight.parts:
            _check_cut(part, group, layout)
    if scheme.group is None:
        group = shape[-1]
    return Form(
        kind=scheme.kind,
        shape=shape,
        group=group,
        count=-(-(whole if scattered else shape[-1]) // group),
        zeros=scheme.zeros,
        ordered=scheme.ordered,
        scattered=scattered,
    )


def _inputs(part: Part) -> int:
    return part.shape[0] if part.transpose else part.shape[1]


def _check_cut(part: Part, group: int, layout: Layout) -> None:
    columns, inputs = slice_of(part, layout).columns, _inputs(part)
    if columns.start % group or (columns.stop % group and columns.stop != inputs):
        sizes = [n for n in range(1, inputs // group + 1) if inputs % (n * group) == 0]
        raise ModelConfigError(
            f"{part.name}: {layout.tp_size} tensor-parallel ranks would cut its quantized groups "
            f"of {group} columns ({inputs} in all); sizes that do not: "
            f"{', '.join(map(str, sizes or [1]))}"
        )
