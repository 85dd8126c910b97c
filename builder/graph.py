"""The tracing interpreter: a definition's calls, recorded and cut into segments.

`trace` runs a definition on symbols. What it records is a `Program`: kernel calls in order, and
between them *segments*, maximal runs of segment ops. A segment is a closed piece of dense math:
its inputs, weights and outputs are all it touches, and it is written in local numbers, so the
same run of ops in another layer is an equal segment. That is what makes one compiled plan serve
every layer, every rank and every fine-tune. `Segment.run` replays it on any interpreter.

One dimension of a segment's values is dynamic: the number of rows (packed tokens, or the rows
whose logits are wanted), written as ROWS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tensorray.builder.load import weight_shape
from tensorray.builder.model import Model, Weight, Weights
from tensorray.builder.ops import Ops, Tensor, kernel, segment
from tensorray.builder.rope import RopeSpec

#: The dynamic dimension. Negative, as no other dimension is.
ROWS = -1

Shape = tuple[int, ...]
# "compute" is the dtype of products, "residual" that of the residual stream between layers
# (float32 where the compute dtype would overflow); a program is bound to concrete ones at build.
DType = Literal["compute", "residual", "float32", "int32"]


@dataclass(frozen=True)
class Spec:
    """A value's shape and dtype."""

    shape: Shape
    dtype: DType


@dataclass(frozen=True)
class WeightRef:
    """Which of a shard's weights: its group ("embed", a layer's index, "head") and name."""

    group: str | int
    name: str


class Symbol:
    """A value that a definition handles while it is traced."""

    __slots__ = ("_recorder", "id", "spec", "weight")

    def __init__(
        self, recorder: GraphOps, id: int, spec: Spec, weight: WeightRef | None = None
    ) -> None:
        self._recorder = recorder
        self.id = id
        self.spec = spec
        self.weight = weight

    @property
    def shape(self) -> Shape:
        return self.spec.shape

    def __add__(self, other: Symbol | float) -> Symbol:
        return self._recorder.elementwise("add", self, other)

    def __radd__(self, other: float) -> Symbol:
        return self + other

    def __sub__(self, other: Symbol | float) -> Symbol:
        return self._recorder.elementwise("sub", self, other)

    def __mul__(self, other: Symbol | float) -> Symbol:
        return self._recorder.elementwise("mul", self, other)

    def __rmul__(self, other: float) -> Symbol:
        return self * other


@dataclass(frozen=True)
class Node:
    """One op of a segment, over the segment's local values.

    Values are numbered: inputs first, then weights, then each node's outputs in turn. `None`
    stands for an argument that was not given (a linear without bias).
    """

    op: str
    arguments: tuple[int | None, ...]
    attributes: tuple[tuple[str, Any], ...]  # sorted; numbers and tuples of numbers
    outputs: tuple[Spec, ...]


@dataclass(frozen=True)
class Segment:
    """A closed run of segment ops; equal segments are the same math on the same shapes."""

    inputs: tuple[Spec, ...]
    weights: tuple[Spec, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]  # local values that are used outside

    def digest(self) -> str:
        """A name for the segment's content, stable across processes and machines."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def output_specs(self) -> list[Spec]:
        specs = [*self.inputs, *self.weights, *(s for node in self.nodes for s in node.outputs)]
        return [specs[index] for index in self.outputs]

    def run(self, op: Ops, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Replay on an interpreter: its tensors in, its tensors out."""
        values = [*inputs, *weights]
        for node in self.nodes:
            arguments = [None if index is None else values[index] for index in node.arguments]
            attributes = dict(node.attributes)
            if node.op in _ELEMENTWISE:
                values.append(_elementwise(node.op, arguments, attributes))
            else:
                produced = getattr(op, node.op)(*arguments, **attributes)
                values += produced if len(node.outputs) > 1 else [_only(produced)]
        return [values[index] for index in self.outputs]


@dataclass(frozen=True)
class SegmentCall:
    """A segment at its place in the program: program values in and out."""

    segment: Segment
    inputs: tuple[int, ...]
    weights: tuple[WeightRef, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class KernelCall:
    """A kernel op at its place in the program; weights it reads are named, values numbered."""

    op: str
    arguments: tuple[int | WeightRef, ...]
    attributes: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A definition's whole forward pass. Value 0 is the step's tokens, `logits` its result."""

    calls: tuple[SegmentCall | KernelCall, ...]
    logits: int

    def segments(self) -> list[Segment]:
        """The distinct segments, in order of first use."""
        found = (call.segment for call in self.calls if isinstance(call, SegmentCall))
        return list(dict.fromkeys(found))


def trace(model: Model) -> Program:
    """Record embed, every layer and head of a definition, for its layout's rank."""
    recorder = GraphOps(model)
    tokens = recorder.new(Spec((ROWS,), "int32"))
    x = model.embed(recorder, recorder.weights("embed", model.embed_weights()), tokens)
    for layer in range(model.num_layers):
        x = model.layer(recorder, recorder.weights(layer, model.layer_weights(layer)), x, layer)
    x = recorder.select_rows(x)
    logits = model.head(recorder, recorder.weights("head", model.head_weights()), x)
    return recorder.program(logits)


@dataclass(frozen=True)
class _Record:
    op: str
    kind: Literal["segment", "kernel"]
    arguments: tuple[Symbol | None, ...]
    attributes: tuple[tuple[str, Any], ...]
    outputs: tuple[Symbol, ...]


class GraphOps(Ops):
    """Records what a definition calls. Shapes are inferred, nothing is computed."""

    def __init__(self, model: Model) -> None:
        self._layout = model.layout
        self._tp = model.layout.tp_size
        self._records: list[_Record] = []
        self._count = 0

    def new(self, spec: Spec, weight: WeightRef | None = None) -> Symbol:
        symbol = Symbol(self, self._count, spec, weight)
        self._count += 1
        return symbol

    def weights(self, group: str | int, declared: Mapping[str, Weight]) -> Weights:
        """The declared weights as symbols."""
        return Weights(
            {
                name: self.new(
                    Spec(weight_shape(weight, self._layout), "compute"), WeightRef(group, name)
                )
                for name, weight in declared.items()
            }
        )

    def elementwise(self, op: str, x: Symbol, other: Symbol | float) -> Symbol:
        if isinstance(other, Symbol):
            if x.spec.dtype != other.spec.dtype:
                raise TypeError(
                    f"{op} of a {x.spec.dtype} and a {other.spec.dtype} value; "
                    "add_residual is the op that joins the two"
                )
            wider = x if len(x.shape) >= len(other.shape) else other
            return self._record(op, "segment", (x, other), {}, wider.spec)
        return self._record(op, "segment", (x,), {"value": float(other)}, x.spec)

    def _record(
        self,
        op: str,
        kind: Literal["segment", "kernel"],
        arguments: Sequence[Symbol | None],
        attributes: dict[str, Any],
        *specs: Spec,
    ) -> Any:
        outputs = tuple(self.new(spec) for spec in specs)
        items = tuple(sorted(attributes.items()))
        self._records.append(_Record(op, kind, tuple(arguments), items, outputs))
        return outputs[0] if len(outputs) == 1 else outputs

    # --- segment ops ---------------------------------------------------------------------

    @segment
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[-1] != weight.shape[1]:
            raise ValueError(f"linear of {x.shape} by {weight.shape}")
        spec = Spec((*x.shape[:-1], weight.shape[0]), "compute")
        return self._record("linear", "segment", (x, weight, bias), {}, spec)

    @segment
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        spec = Spec(x.shape, "compute")
        return self._record("rms_norm", "segment", (x, weight), {"eps": eps}, spec)

    @segment
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        spec = Spec(x.shape, "compute")
        return self._record("layer_norm", "segment", (x, weight, bias), {"eps": eps}, spec)

    @segment
    def silu(self, x: Tensor) -> Tensor:
        return self._record("silu", "segment", (x,), {}, x.spec)

    @segment
    def gelu_tanh(self, x: Tensor) -> Tensor:
        return self._record("gelu_tanh", "segment", (x,), {}, x.spec)

    @segment
    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return self._record("softcap", "segment", (x,), {"cap": cap}, x.spec)

    @segment
    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        if sum(sizes) != x.shape[-1]:
            raise ValueError(f"split of {x.shape} into {list(sizes)}")
        specs = [Spec((*x.shape[:-1], size), x.spec.dtype) for size in sizes]
        pieces = self._record("split", "segment", (x,), {"sizes": tuple(sizes)}, *specs)
        return list(pieces) if len(specs) > 1 else [pieces]

    @segment
    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        spec = Spec((x.shape[0], x.shape[1] // head_dim, head_dim), x.spec.dtype)
        return self._record("heads", "segment", (x,), {"head_dim": head_dim}, spec)

    @segment
    def merge_heads(self, x: Tensor) -> Tensor:
        spec = Spec((x.shape[0], x.shape[1] * x.shape[2]), x.spec.dtype)
        return self._record("merge_heads", "segment", (x,), {}, spec)

    @segment
    def add_residual(self, x: Tensor, delta: Tensor) -> Tensor:
        return self._record("add_residual", "segment", (x, delta), {}, x.spec)

    # --- kernel ops ----------------------------------------------------------------------

    @kernel
    def embedding(self, tokens: Tensor, table: Tensor, first_row: int = 0) -> Tensor:
        spec = Spec((ROWS, table.shape[1]), "residual")
        return self._record("embedding", "kernel", (tokens, table), {"first_row": first_row}, spec)

    @kernel
    def position_embedding(self, table: Tensor) -> Tensor:
        spec = Spec((ROWS, table.shape[1]), "residual")
        return self._record("position_embedding", "kernel", (table,), {}, spec)

    @kernel
    def rope(self, q: Tensor, k: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
        rotated: tuple[Tensor, Tensor] = self._record(
            "rope", "kernel", (q, k), {"spec": spec}, q.spec, k.spec
        )
        return rotated

    @kernel
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        attributes = {"layer": layer, "scale": scale, "softcap": softcap}
        return self._record("attention", "kernel", (q, k, v), attributes, q.spec)

    @kernel
    def select_rows(self, x: Tensor) -> Tensor:
        return self._record("select_rows", "kernel", (x,), {}, x.spec)

    @kernel
    def route(self, logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        shape = (ROWS, top_k)
        chosen: tuple[Tensor, Tensor] = self._record(
            "route",
            "kernel",
            (logits,),
            {"top_k": top_k, "renormalize": renormalize},
            Spec(shape, "float32"),
            Spec(shape, "int32"),
        )
        return chosen

    @kernel
    def experts(
        self, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        return self._record("experts", "kernel", (x, weights, ids, gate_up, down), {}, x.spec)

    @kernel
    def all_reduce(self, x: Tensor) -> Tensor:
        # On one rank there is nothing to add: no call, and the segment goes on.
        return x if self._tp == 1 else self._record("all_reduce", "kernel", (x,), {}, x.spec)

    @kernel
    def all_gather(self, x: Tensor) -> Tensor:
        if self._tp == 1:
            return x
        spec = Spec((*x.shape[:-1], x.shape[-1] * self._tp), x.spec.dtype)
        return self._record("all_gather", "kernel", (x,), {}, spec)

    # --- cutting -------------------------------------------------------------------------

    def program(self, logits: Symbol) -> Program:
        """Cut what was recorded at the kernel calls."""
        users: dict[int, int] = {logits.id: 1}
        for record in self._records:
            for argument in record.arguments:
                if argument is not None:
                    users[argument.id] = users.get(argument.id, 0) + 1
        calls: list[SegmentCall | KernelCall] = []
        run: list[_Record] = []
        for record in self._records:
            if record.kind == "segment":
                run.append(record)
                continue
            if run:
                calls.append(_close(run, users))
                run = []
            calls.append(_kernel_call(record))
        if run:
            calls.append(_close(run, users))
        return Program(tuple(calls), logits.id)


def _kernel_call(record: _Record) -> KernelCall:
    arguments = tuple(
        argument.weight or argument.id for argument in record.arguments if argument is not None
    )
    outputs = tuple(symbol.id for symbol in record.outputs)
    return KernelCall(record.op, arguments, record.attributes, outputs)


def _close(run: list[_Record], users: Mapping[int, int]) -> SegmentCall:
    """A run of segment ops as a segment in local numbers, and its place in the program."""
    made = {symbol.id for record in run for symbol in record.outputs}
    used = [argument for record in run for argument in record.arguments if argument is not None]
    outside = {symbol.id: symbol for symbol in used if symbol.id not in made}
    inputs = [symbol for symbol in outside.values() if symbol.weight is None]
    weights = [symbol for symbol in outside.values() if symbol.weight is not None]

    local: dict[int, int] = {}
    for symbol in [*inputs, *weights]:
        local[symbol.id] = len(local)
    nodes = []
    for record in run:
        arguments = tuple(None if a is None else local[a.id] for a in record.arguments)
        for symbol in record.outputs:
            local[symbol.id] = len(local)
        specs = tuple(symbol.spec for symbol in record.outputs)
        nodes.append(Node(record.op, arguments, record.attributes, specs))

    inner: dict[int, int] = {}
    for symbol in used:
        inner[symbol.id] = inner.get(symbol.id, 0) + 1
    outputs = [
        symbol
        for record in run
        for symbol in record.outputs
        if users.get(symbol.id, 0) > inner.get(symbol.id, 0)
    ]
    return SegmentCall(
        Segment(
            inputs=tuple(symbol.spec for symbol in inputs),
            weights=tuple(symbol.spec for symbol in weights),
            nodes=tuple(nodes),
            outputs=tuple(local[symbol.id] for symbol in outputs),
        ),
        inputs=tuple(symbol.id for symbol in inputs),
        weights=tuple(symbol.weight for symbol in weights if symbol.weight is not None),
        outputs=tuple(symbol.id for symbol in outputs),
    )


_ELEMENTWISE = ("add", "sub", "mul")


def _elementwise(op: str, arguments: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    left, right = arguments[0], arguments[1] if len(arguments) > 1 else attributes["value"]
    if op == "add":
        return left + right
    return left - right if op == "sub" else left * right


def _only(produced: Any) -> Any:
    return produced[0] if isinstance(produced, list | tuple) else produced
