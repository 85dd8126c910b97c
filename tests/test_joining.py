"""Joined programs: what goes into one call, and that they compute what the plain ones do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.gpu_shards import ArrayRunners
from helpers.running import load
from helpers.tiny_models import NAMES, directory

from tensorray.actors.program import ProgramRunner
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.graph import KernelCall, Program, SegmentCall, trace
from tensorray.builder.joining import ROPE_ATTENTION, join, join_rope
from tensorray.builder.joining_sums import SUM_NORM, join_sums
from tensorray.builder.model import Layout


def kernels(program: Program) -> list[str]:
    return [call.op for call in program.calls if isinstance(call, KernelCall)]


@pytest.mark.parametrize("name", NAMES)
def test_every_rope_is_joined_with_its_attention(name: str) -> None:
    model, _ = load(directory(name))
    plain, joined = trace(model), join_rope(trace(model))
    expected = kernels(plain)
    if "rope" in expected:
        expected = [op for op in expected if op != "rope"]
        expected = [ROPE_ATTENTION if op == "attention" else op for op in expected]
    assert kernels(joined) == expected
    assert joined.result == plain.result


@pytest.mark.parametrize(("name", "normed"), [("qwen3", True), ("gemma3", True), ("llama3", False)])
def test_norms_of_heads_go_into_the_call(name: str, normed: bool) -> None:
    model, _ = load(directory(name))
    program = join_rope(trace(model))
    norms = [
        node
        for segment in program.segments()
        for node in segment.nodes
        if node.op == "rms_norm" and len(node.outputs[0].shape) == 3
    ]
    assert norms == []
    calls = [c for c in program.calls if isinstance(c, KernelCall) and c.op == ROPE_ATTENTION]
    assert all(len(call.arguments) == (5 if normed else 3) for call in calls)
    # A weight that the call takes is one that no segment takes any more.
    taken = {ref for call in program.calls if isinstance(call, SegmentCall) for ref in call.weights}
    assert not any(argument in taken for call in calls for argument in call.arguments)


@pytest.mark.parametrize("name", NAMES)
def test_a_joined_segment_computes_what_is_left_of_it(name: str) -> None:
    """The heads it gives, normed, are those of the plain segment; all else is equal."""
    model, weights = load(directory(name))
    rng = np.random.default_rng(3)
    ops = ArrayOps(np, {})
    groups = {"embed": weights.embed, "head": weights.head, **weights.layers}
    plain, joined = trace(model), join_rope(trace(model))
    ropes = {c.arguments[:2]: c for c in joined.calls if getattr(c, "op", "") == ROPE_ATTENTION}
    pairs = zip(
        *([c for c in each.calls if isinstance(c, SegmentCall)] for each in (plain, joined)),
        strict=True,
    )
    for whole, smaller in pairs:
        assert whole.inputs == smaller.inputs
        assert whole.outputs == smaller.outputs
        inputs = [
            rng.standard_normal((5, *spec.shape[1:])).astype(np.float32)
            for spec in whole.segment.inputs
        ]
        results = [
            each.segment.run(ops, inputs, [groups[w.group].arrays[w.name] for w in each.weights])
            for each in (whole, smaller)
        ]
        for value, theirs, ours in zip(whole.outputs, *results, strict=True):
            for arguments, call in ropes.items():
                if value in arguments and len(call.arguments) == 5:
                    ref = call.arguments[3 + arguments.index(value)]
                    scale = groups[ref.group].arrays[ref.name]
                    ours = ops.rms_norm(ours, scale, dict(call.attributes)["eps"])
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


class Stateless(ArrayOps):
    """Ranks that all hold the same, and calls that need no batch."""

    def embedding(self, tokens: Any, table: Any, first_row: int = 0) -> Any:
        return table[tokens % len(table)].astype(np.float32)

    def position_embedding(self, table: Any) -> Any:
        return table[:5].astype(np.float32)

    def rope_attention(self, q: Any, k: Any, v: Any, *norms: Any, **options: Any) -> Any:
        return q * np.float32(0.5) + v.mean(axis=1, keepdims=True)

    def attention(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return q * np.float32(0.5) + v.mean(axis=1, keepdims=True)

    def select_rows(self, x: Any) -> Any:
        return x[1:]

    def all_reduce(self, x: Any) -> Any:
        return x + x

    def all_gather(self, x: Any) -> Any:
        return np.concatenate([x, x], axis=-1)


@pytest.mark.parametrize("name", NAMES)
def test_sums_are_joined_with_what_follows(name: str) -> None:
    """A call for each norm of the residual stream but the first and the last, where neither a bias
    comes between nor the norm is another one; and equal results."""
    model, weights = load(directory(name), Layout(tp_size=2))
    plain, joined = join_rope(trace(model)), join(trace(model))
    results, norms = [], []
    for program in (plain, joined):
        runner = ProgramRunner(program, Stateless(np, {}), weights, ArrayRunners().get)
        results.append(runner.head(runner.select(runner.body(np.arange(5, dtype=np.int32)))))
        norms.append(kernels(program).count(SUM_NORM))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-5)
    ops = {node.op for segment in plain.segments() for node in segment.nodes}
    apart = "add" in ops or "layer_norm" in ops
    assert norms == [0, 0 if apart else 2 * model.num_layers - 1]
    # Few segments are left, and no more than without.
    assert len(joined.segments()) <= len(plain.segments())


def test_one_rank_has_no_sums_to_join() -> None:
    program = trace(load(directory("llama3"))[0])
    assert join_sums(program) == program


def test_a_sum_that_the_next_segment_does_not_read_stays() -> None:
    plain = join_rope(trace(load(directory("llama3"), Layout(tp_size=2))[0]))
    reads = [i for i, call in enumerate(plain.calls) if isinstance(call, SegmentCall)]
    sums = [i for i, call in enumerate(plain.calls) if getattr(call, "op", "") == "all_reduce"]
    at = next(i for i in sums if i + 1 in reads and i > reads[0])
    other = plain.calls[reads[0]]
    fresh = 1 + max(value for call in plain.calls for value in call.outputs)
    again = replace(other, outputs=tuple(range(fresh, fresh + len(other.outputs))))
    calls = (*plain.calls[: at + 1], again, *plain.calls[at + 1 :])
    joined = join_sums(Program(calls, plain.result))
    assert plain.calls[at] in joined.calls
    assert kernels(joined).count(SUM_NORM) == kernels(join_sums(plain)).count(SUM_NORM) - 1
