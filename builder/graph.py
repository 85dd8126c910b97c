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
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tensorray.builder.model import Layout, Model, Weight, Weights
from tensorray.builder.ops import Ops, SegmentOps, Tensor, kernel, segment
from tensorray.builder.rope import RopeSpec
from tensorray.builder.shares import weight_shape
from tensorray.kernels.quantized import Kind

#: The dynamic dimension. Negative, as no other dimension is.
ROWS = -1

Shape = tuple[int, ...]
# "compute" is the dtype of products, "residual" that of the residual stream between layers
# (float32 where the compute dtype would overflow); a program is bound to concrete ones at build.
# int4, int8 and float8 are quantized weights' codes.
DType = Literal["compute", "residual", "float32", "int32", "int4", "int8", "float8"]

#: What "compute" and "residual" may be bound to.
FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class DTypes:
    """The dtypes a program is bound to when it is built."""

    compute: str = "bfloat16"
    residual: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in (self.compute, self.residual):
            if name not in FLOATS:
                raise ValueError(f"dtype {name}: must be one of {', '.join(FLOATS)}")

    def of(self, dtype: DType) -> str:
        if dtype == "compute":
            return self.compute
        return self.residual if dtype == "residual" else dtype


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

    def __rsub__(self, other: float) -> Symbol:
        return self * -1.0 + other

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

    def run(
        self, op: SegmentOps, inputs: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> list[Tensor]:
        """Replay on an interpreter: its tensors in, its tensors out."""
        values = [*inputs, *weights]
        for node in self.nodes:
            arguments = [None if index is None else values[index] for index in node.arguments]
            attributes = dict(node.attributes)
            if node.op in ELEMENTWISE:
                values.append(elementwise(node.op, arguments, attributes))
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
    """The forward pass of a definition, or of one pipeline stage's layers.

    Value 0 is what comes in: the step's tokens, or the residual stream of the stage before.
    `result` is what goes out: the logits, or the residual stream for the stage after.
    """

    calls: tuple[SegmentCall | KernelCall, ...]
    result: int

    def segments(self) -> list[Segment]:
        """The distinct segments, in order of first use."""
        found = (call.segment for call in self.calls if isinstance(call, SegmentCall))
        return list(dict.fromkeys(found))


def trace(model: Model, layers: range | None = None) -> Program:
    """Record the layers a pipeline stage holds (None: all), for the definition's layout.

    The embedding comes with the first layer of the model, the head with the last.
    """
    layers = range(model.num_layers) if layers is None else layers
    if not layers or layers[0] < 0 or layers[-1] >= model.num_layers:
        raise ValueError(f"{layers} of a model with {model.num_layers} layers")
    recorder = GraphOps(model.layout)
    if layers[0] == 0:
        tokens = recorder.new(Spec((ROWS,), "int32"))
        x = model.embed(recorder, recorder.weights("embed", model.embed_weights()), tokens)
    else:
        x = recorder.new(Spec((ROWS, model.hidden_size), "residual"))
    for layer in layers:
        x = model.layer(recorder, recorder.weights(layer, model.layer_weights(layer)), x, layer)
    if layers[-1] == model.num_layers - 1:
        x = recorder.select_rows(x)
        x = model.head(recorder, recorder.weights("head", model.head_weights()), x)
    return recorder.program(x)


def trace_segment(
    math: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Spec],
    weights: Sequence[Spec] = (),
) -> Segment:
    """Record a piece of math, `math(op, *inputs, *weights)`, that is one segment by itself.

    Its results are the segment's outputs, in their order.
    """
    recorder = GraphOps(Layout())
    symbols = [recorder.new(spec) for spec in inputs]
    symbols += [recorder.new(spec, WeightRef("", str(i))) for i, spec in enumerate(weights)]
    results: Any = math(recorder, *symbols)
    return recorder.segment(symbols, results if isinstance(results, list | tuple) else [results])


@dataclass(frozen=True)
class _Record:
    op: str
    kind: Literal["segment", "kernel"]
    arguments: tuple[Symbol | None, ...]
    attributes: tuple[tuple[str, Any], ...]
    outputs: tuple[Symbol, ...]


class GraphOps(Ops):
    """Records what a definition calls. Shapes are inferred, nothing is computed."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._tp = layout.tp_size
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
            wider, narrower = (x, other) if len(x.shape) >= len(other.shape) else (other, x)
            if narrower.shape != wider.shape[len(wider.shape) - len(narrower.shape) :]:
                raise ValueError(f"{op} of {x.shape} and {other.shape}")
            joined: Symbol = self._record(op, "segment", (x, other), {}, wider.spec)
            return joined
        shifted: Symbol = self._record(op, "segment", (x,), {"value": float(other)}, x.spec)
        return shifted

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
        if len(x.shape) != 2 or x.shape[1] != weight.shape[1]:
            raise ValueError(f"linear of {x.shape} by {weight.shape}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"linear by {weight.shape} with a bias of {bias.shape}")
        spec = Spec((x.shape[0], weight.shape[0]), "compute")
        return self._record("linear", "segment", (x, weight, bias), {}, spec)

    @segment
    def linear_quantized(
        self,
        x: Tensor,
        values: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        order: Tensor | None,
        groups: Tensor | None,
        bias: Tensor | None = None,
        *,
        kind: Kind,
        group: int,
    ) -> Tensor:
        if len(x.shape) != 2 or x.shape[1] != values.shape[1]:
            raise ValueError(f"linear_quantized of {x.shape} by {values.shape}")
        arguments = (x, values, scales, zeros, order, groups, bias)
        attributes = {"kind": kind, "group": group}
        spec = Spec((x.shape[0], values.shape[0]), "compute")
        return self._record("linear_quantized", "segment", arguments, attributes, spec)

    @segment
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _check_norm("rms_norm", x, weight)
        spec = Spec(x.shape, "compute")
        return self._record("rms_norm", "segment", (x, weight), {"eps": eps}, spec)

    @segment
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        _check_norm("layer_norm", x, weight, bias)
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
        if len(x.shape) != 2 or x.shape[1] % head_dim:
            raise ValueError(f"heads of {head_dim} dims from {x.shape}")
        spec = Spec((x.shape[0], x.shape[1] // head_dim, head_dim), x.spec.dtype)
        return self._record("heads", "segment", (x,), {"head_dim": head_dim}, spec)

    @segment
    def merge_heads(self, x: Tensor) -> Tensor:
        spec = Spec((x.shape[0], x.shape[1] * x.shape[2]), x.spec.dtype)
        return self._record("merge_heads", "segment", (x,), {}, spec)

    @segment
    def add_residual(self, x: Tensor, delta: Tensor) -> Tensor:
        if x.shape != delta.shape:
            raise ValueError(f"add_residual of {x.shape} and {delta.shape}")
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
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Tensor,
        down: Tensor,
        first_expert: int | None = None,
    ) -> Tensor:
        arguments = (x, weights, ids, gate_up, down)
        return self._record("experts", "kernel", arguments, {"first_expert": first_expert}, x.spec)

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

    def program(self, result: Symbol) -> Program:
        """Cut what was recorded at the kernel calls."""
        users = _count(argument for record in self._records for argument in record.arguments)
        users[result.id] = users.get(result.id, 0) + 1
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
        return Program(tuple(calls), result.id)

    def segment(self, arguments: Sequence[Symbol], results: Sequence[Symbol]) -> Segment:
        """What was recorded as one segment: inputs and weights as given, results its outputs."""
        kernels = [record.op for record in self._records if record.kind == "kernel"]
        if kernels:
            raise ValueError(f"{', '.join(kernels)}: kernel ops, which end a segment")
        return _segment(
            self._records,
            inputs=[symbol for symbol in arguments if symbol.weight is None],
            weights=[symbol for symbol in arguments if symbol.weight is not None],
            outputs=results,
        )


def _kernel_call(record: _Record) -> KernelCall:
    arguments = tuple(
        argument.weight or argument.id for argument in record.arguments if argument is not None
    )
    outputs = tuple(symbol.id for symbol in record.outputs)
    return KernelCall(record.op, arguments, record.attributes, outputs)


def _close(run: list[_Record], users: Mapping[int, int]) -> SegmentCall:
    """A run of segment ops as a segment, and its place in the program."""
    made = [symbol for record in run for symbol in record.outputs]
    own = {symbol.id for symbol in made}
    used = [argument for record in run for argument in record.arguments if argument is not None]
    outside = list({symbol.id: symbol for symbol in used if symbol.id not in own}.values())
    inputs = [symbol for symbol in outside if symbol.weight is None]
    weights = [symbol for symbol in outside if symbol.weight is not None]
    inner = _count(used)
    outputs = [symbol for symbol in made if users.get(symbol.id, 0) > inner.get(symbol.id, 0)]
    return SegmentCall(
        _segment(run, inputs, weights, outputs),
        inputs=tuple(symbol.id for symbol in inputs),
        weights=tuple(symbol.weight for symbol in weights if symbol.weight is not None),
        outputs=tuple(symbol.id for symbol in outputs),
    )


def _segment(
    run: Sequence[_Record],
    inputs: Sequence[Symbol],
    weights: Sequence[Symbol],
    outputs: Sequence[Symbol],
) -> Segment:
    """A run of segment ops in local numbers."""
    local = {symbol.id: index for index, symbol in enumerate([*inputs, *weights])}
    nodes = []
    for record in run:
        arguments = tuple(None if a is None else local[a.id] for a in record.arguments)
        for symbol in record.outputs:
            local[symbol.id] = len(local)
        specs = tuple(symbol.spec for symbol in record.outputs)
        nodes.append(Node(record.op, arguments, record.attributes, specs))
    return Segment(
        inputs=tuple(symbol.spec for symbol in inputs),
        weights=tuple(symbol.spec for symbol in weights),
        nodes=tuple(nodes),
        outputs=tuple(local[symbol.id] for symbol in outputs),
    )


def _count(symbols: Iterable[Symbol | None]) -> dict[int, int]:
    """How many times each symbol occurs, by its id."""
    return Counter(symbol.id for symbol in symbols if symbol is not None)


def _check_norm(op: str, x: Symbol, *weights: Symbol) -> None:
    for weight in weights:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"{op} of {x.shape} by {weight.shape}")


_OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
#: Ops that a definition writes as operators.
ELEMENTWISE = tuple(_OPERATORS)


def elementwise(op: str, arguments: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """A node of an elementwise op, computed; its result has its first argument's dtype."""
    left, right = arguments[0], arguments[1] if len(arguments) > 1 else attributes["value"]
    result = _OPERATORS[op](left, right)
    dtype = getattr(left, "dtype", None)
    # CuPy makes float32 of a bfloat16 array and a number.
    return result if getattr(result, "dtype", None) == dtype else result.astype(dtype)


def _only(produced: Any) -> Any:
    return produced[0] if isinstance(produced, list | tuple) else produced
