"""Traced programs: replayed they give the definition's logits; equal layers share segments."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers import tiny_models
from helpers.paged_run import PagedRun

from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.checkpoint.open import open_checkpoint
from tensorray.builder.graph import (
    ROWS,
    KernelCall,
    Program,
    SegmentCall,
    Spec,
    WeightRef,
    trace,
    trace_segment,
)
from tensorray.builder.load import load_weights
from tensorray.builder.model import Layout, Model, ShardWeights
from tensorray.builder.registry import resolve

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def llama(*, layers: int = 4, tp: int = 1, **changes: Any) -> Model:
    config = {**LLAMA, "num_hidden_layers": layers, **changes}
    return resolve(config)(config, Layout(tp_size=tp))


def load(name: str) -> tuple[Model, ShardWeights]:
    checkpoint = open_checkpoint(str(tiny_models.directory(name)))
    try:
        model = resolve(checkpoint.config)(checkpoint.config)
        return model, load_weights(model, checkpoint)
    finally:
        checkpoint.close()


def replay(program: Program, ops: ArrayOps, weights: ShardWeights, value: Any) -> Any:
    """Run a program call by call, keeping only what calls say they take and give."""
    groups = {"embed": weights.embed, "head": weights.head, **weights.layers}
    values = {0: value}

    def fetch(argument: int | WeightRef) -> Any:
        if isinstance(argument, WeightRef):
            return groups[argument.group].arrays[argument.name]
        return values[argument]

    for call in program.calls:
        arguments = [fetch(argument) for argument in call_arguments(call)]
        if isinstance(call, SegmentCall):
            count = len(call.inputs)
            results = call.segment.run(ops, arguments[:count], arguments[count:])
        else:
            produced = getattr(ops, call.op)(*arguments, **dict(call.attributes))
            results = produced if len(call.outputs) > 1 else [produced]
        values.update(zip(call.outputs, results, strict=True))
    return values[program.result]


def call_arguments(call: SegmentCall | KernelCall) -> tuple[int | WeightRef, ...]:
    return call.arguments if isinstance(call, KernelCall) else (*call.inputs, *call.weights)


def outline(program: Program) -> list[str]:
    """The program as words: a kernel's name, or a segment's ops."""
    return [
        call.op
        if isinstance(call, KernelCall)
        else "[" + " ".join(node.op for node in call.segment.nodes) + "]"
        for call in program.calls
    ]


# --- replay ------------------------------------------------------------------------------------


class ReplayRun(PagedRun):
    """A paged run that steps through traced programs, one a pipeline stage."""

    def __init__(self, name: str, stages: int) -> None:
        super().__init__(*load(name))
        ends = np.linspace(0, self.model.num_layers, stages + 1).astype(int)
        self.programs = [trace(self.model, range(first, last)) for first, last in pairwise(ends)]

    def step(self, chunks: Any) -> Any:
        batch = self.ops.batch = self._pack(chunks)
        value = batch.tokens
        for program in self.programs:
            value = replay(program, self.ops, self.weights, value)
        return np.split(value, batch.query_starts[1:-1])


@pytest.mark.parametrize("name", tiny_models.NAMES)
@pytest.mark.parametrize("stages", [1, 2])
def test_replay_gives_the_same_logits(name: str, stages: int) -> None:
    """Bit for bit: prompts at once, then a token each, through pages."""
    plain, replayed = PagedRun(*load(name)), ReplayRun(name, stages)
    prompts = [reference.prompt for reference in tiny_models.references(name)]
    steps = [
        [(str(i), prompt[:-1]) for i, prompt in enumerate(prompts)],
        [(str(i), prompt[-1:]) for i, prompt in enumerate(prompts)],
    ]
    for chunks in steps:
        for found, expected in zip(replayed.step(chunks), plain.step(chunks), strict=True):
            np.testing.assert_array_equal(found, expected)


# --- what is shared ----------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
def test_segments_do_not_grow_with_layers(tp: int) -> None:
    few, many = trace(llama(layers=3, tp=tp)), trace(llama(layers=30, tp=tp))
    assert few.segments() == many.segments()
    assert len(many.calls) > 5 * len(few.calls)


def test_segments_are_equal_on_every_rank() -> None:
    definition = resolve(LLAMA)
    ranks = [definition(LLAMA, Layout(tp_rank=rank, tp_size=4)) for rank in range(4)]
    assert len({tuple(trace(model).segments()) for model in ranks}) == 1


def test_one_rank_runs_from_attention_to_attention_in_one_segment() -> None:
    first = "[rms_norm linear split heads heads heads]"
    middle = "merge_heads linear add_residual rms_norm linear split silu mul linear add_residual"
    assert outline(trace(llama(layers=2))) == [
        "embedding",
        first,
        "rope",
        "attention",
        f"[{middle} {first[1:-1]}]",
        "rope",
        "attention",
        f"[{middle}]",
        "select_rows",
        "[rms_norm linear]",
    ]


def test_tensor_parallel_segments_end_at_all_reduce() -> None:
    assert outline(trace(llama(layers=1, tp=2))) == [
        "embedding",
        "all_reduce",
        "[rms_norm linear split heads heads heads]",
        "rope",
        "attention",
        "[merge_heads linear]",
        "all_reduce",
        "[add_residual rms_norm linear split silu mul linear]",
        "all_reduce",
        "[add_residual]",
        "select_rows",
        "[rms_norm linear]",
        "all_gather",
    ]


def test_values_that_outlive_a_segment_are_its_outputs() -> None:
    """The residual stream passes over the all_reduce that the MLP's partial sum goes through."""
    program = trace(llama(layers=1, tp=2))
    calls = [call for call in program.calls if isinstance(call, SegmentCall)]
    mlp, last = calls[2], calls[3]
    residual, partial = mlp.segment.output_specs
    assert residual == Spec((ROWS, 64), "residual")
    assert partial == Spec((ROWS, 64), "compute")
    assert mlp.outputs[0] in last.inputs  # the residual stream, past the all_reduce
    assert mlp.outputs[1] not in last.inputs
    (reduce,) = [
        call
        for call in program.calls
        if isinstance(call, KernelCall) and call.arguments == (mlp.outputs[1],)
    ]
    assert reduce.op == "all_reduce"
    assert reduce.outputs[0] in last.inputs


def test_stages_cover_the_model() -> None:
    """A stage's program takes the stream that the stage before gives."""
    model = llama(layers=4)
    whole = trace(model)
    first, second = trace(model, range(2)), trace(model, range(2, 4))
    assert outline(first)[0] == "embedding"
    assert outline(second)[-1] == outline(whole)[-1]
    assert sum(name == "attention" for name in outline(first) + outline(second)) == 4
    assert {ref.group for ref in weight_refs(first)} == {"embed", 0, 1}
    assert {ref.group for ref in weight_refs(second)} == {2, 3, "head"}


@pytest.mark.parametrize("layers", [range(0), range(-1, 2), range(3, 5)])
def test_stage_outside_the_model(layers: range) -> None:
    with pytest.raises(ValueError, match="of a model with 4 layers"):
        trace(llama(), layers)


def weight_refs(program: Program) -> list[WeightRef]:
    return [
        argument
        for call in program.calls
        for argument in call_arguments(call)
        if isinstance(argument, WeightRef)
    ]


# --- digests -----------------------------------------------------------------------------------

# The stores of plans out there go by these.
QKV_DIGEST = "d5f39f9f64e4be9f78f15c164cea253f9198221ee62b4069004caa386b1c39bd"


def qkv_segment(**changes: Any) -> Any:
    return trace(llama(**changes)).segments()[0]


def test_digest_is_stable() -> None:
    """In this process, in another one with other hash seeds, and over time."""
    code = (
        "from tensorray.builder.graph import trace; from tensorray.builder.registry import resolve;"
        f"config = {LLAMA!r}; print(trace(resolve(config)(config)).segments()[0].digest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert qkv_segment().digest() == other == QKV_DIGEST


def test_digest_tells_segments_apart() -> None:
    segments = [
        qkv_segment(),
        qkv_segment(rms_norm_eps=1e-6),
        qkv_segment(hidden_size=128),
        qkv_segment(num_key_value_heads=2),
        qkv_segment(attention_bias=True),
        replace(qkv_segment(), outputs=qkv_segment().outputs[::-1]),
    ]
    assert len({segment.digest() for segment in segments}) == len(segments)


# --- single segments and wrong shapes ------------------------------------------------------------

X = Spec((ROWS, 8), "compute")


def test_traced_piece_of_math() -> None:
    def math(op: Any, x: Any, y: Any, w: Any) -> Any:
        return [1.0 - op.linear(x, w), 2.0 * y - x + 3.0]

    weight = Spec((4, 8), "compute")
    segment = trace_segment(math, [X, X], [weight])
    assert segment.inputs == (X, X)
    assert segment.weights == (weight,)
    assert segment.output_specs == [Spec((ROWS, 4), "compute"), X]
    x, y, w = np.ones((2, 8)), np.full((2, 8), 5.0), np.full((4, 8), 0.5)
    first, second = segment.run(ArrayOps(np, []), [x, y], [w])
    np.testing.assert_array_equal(first, np.full((2, 4), -3.0))
    np.testing.assert_array_equal(second, np.full((2, 8), 12.0))


@pytest.mark.parametrize(
    ("math", "message"),
    [
        (lambda op, x: op.linear(x, op.split(x, [4, 4])[0]), "linear of"),
        (lambda op, x: op.heads(x, 3), "heads of 3"),
        (lambda op, x: op.split(x, [4, 5]), "split of"),
        (lambda op, x: op.add_residual(x, op.split(x, [4, 4])[0]), "add_residual of"),
        (lambda op, x: x * op.split(x, [4, 4])[0], "mul of"),
        (lambda op, x: op.select_rows(x), "select_rows: kernel op"),
    ],
)
def test_math_that_does_not_fit(math: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_segment(math, [X])


def test_residual_and_compute_values_meet_in_add_residual_only() -> None:
    residual = Spec(X.shape, "residual")
    with pytest.raises(TypeError, match="add_residual"):
        trace_segment(lambda op, x, y: x + y, [X, residual])
    segment = trace_segment(lambda op, x, y: op.add_residual(y, x), [X, residual])
    assert segment.output_specs == [residual]


class Widening(np.ndarray):
    """An array that is widened by a number, as CuPy's of bfloat16 are."""

    def __mul__(self, other: Any) -> Any:
        return np.asarray(self, np.float32) * other


def test_a_number_widens_nothing() -> None:
    segment = trace_segment(lambda op, x: x * 25.3, [Spec((ROWS, 4), "residual")])
    x = np.ones((2, 4), np.float16).view(Widening)
    (y,) = segment.run(ArrayOps(np, []), [x], [])
    assert y.dtype == np.float16
    np.testing.assert_array_equal(y, np.full((2, 4), 25.3, np.float16))
