"""Segments as fused calls: the same numbers as op by op, and as few calls as there should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import tiny_models

from tensorray.actors.array_segment import ArraySegment
from tensorray.actors.fused_segment import FusedSegment
from tensorray.actors.fusion import fuse
from tensorray.builder.checkpoint.config import read_config
from tensorray.builder.graph import ROWS, Segment, Spec, trace, trace_segment
from tensorray.builder.model import Layout, ModelConfigError
from tensorray.builder.registry import resolve
from tensorray.kernels.cuda.linear import FEW_ROWS


def family_segments() -> Iterator[Any]:
    """Every segment of every tiny model, on one rank and on two, once."""
    seen = set()
    for name in tiny_models.NAMES:
        config = read_config(tiny_models.directory(name), {})
        for ranks in (1, 2):
            try:
                model = resolve(config)(config, Layout(tp_size=ranks))
            except ModelConfigError:
                continue  # a size that does not divide this model
            for index, segment in enumerate(trace(model).segments()):
                if segment not in seen:
                    seen.add(segment)
                    yield pytest.param(segment, id=f"{name}-tp{ranks}-{index}")


def random_arrays(
    segment: Segment, rows: int, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    inputs = [
        generator.standard_normal((rows, *spec.shape[1:]), np.float32) for spec in segment.inputs
    ]
    weights = [
        generator.standard_normal(spec.shape, np.float32) / spec.shape[-1] ** 0.5
        for spec in segment.weights
    ]
    return inputs, weights


@pytest.mark.parametrize("rows", [1, FEW_ROWS + 5])
@pytest.mark.parametrize("segment", list(family_segments()))
def test_fused_segments_compute_what_their_ops_do(segment: Segment, rows: int) -> None:
    inputs, weights = random_arrays(segment, rows)
    copies = [each.copy() for each in inputs]
    expected = ArraySegment(segment, np).run(inputs, weights)
    found = FusedSegment(segment, rows, np).run(inputs, weights)
    for one, other, spec in zip(found, expected, segment.output_specs, strict=True):
        assert one.shape == other.shape == (rows, *spec.shape[1:])
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)
    for one, other in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(one, other)  # an input is the caller's


def test_weights_of_gated_products() -> None:
    segment = middle("llama3")
    _, weights = random_arrays(segment, 1)
    for rows in (FEW_ROWS, FEW_ROWS + 1):
        (gate_up,) = FusedSegment(segment, rows, np).gated_weights(weights)
        assert gate_up is max(weights, key=len)
    plain = trace_segment(lambda op, x, w: op.linear(x, w), [X], [SQUARE])
    assert FusedSegment(plain, 32, np).gated_weights(weights[:1]) == []


def ops(segment: Segment, *, few_rows: bool) -> list[str]:
    views = ("split", "heads", "merge_heads")
    return [call.op for call in fuse(segment, few_rows=few_rows) if call.op not in views]


def middle(name: str) -> Segment:
    """The segment between two layers' attentions, which most of a step's time goes to."""
    config = read_config(tiny_models.directory(name), {})
    return max(trace(resolve(config)(config)).segments(), key=lambda each: len(each.nodes))


def test_a_decode_layer_is_four_calls() -> None:
    for name in ("llama3", "llama-biased", "mistral", "qwen2"):
        assert ops(middle(name), few_rows=True) == ["linear"] * 4
    calls = fuse(middle("llama-biased"), few_rows=True)
    o, gate_up, down, qkv = (call for call in calls if call.op == "linear")
    assert None not in o.arguments[:4]  # bias and residual
    assert dict(gate_up.attributes) == {"gate": "silu", "eps": 1e-6}
    assert gate_up.arguments[4] is not None  # the norm
    assert None not in down.arguments[:4]
    assert None not in (qkv.arguments[2], qkv.arguments[4])


def test_many_rows_keep_norms_and_residuals_apart() -> None:
    assert ops(middle("llama3"), few_rows=False) == [
        "linear",
        "add_rms_norm",
        "linear",
        "linear",
        "add_rms_norm",
        "linear",
    ]


def test_other_shapes_of_layer() -> None:
    assert ops(middle("qwen3"), few_rows=True) == ["linear"] * 4 + ["qk_norm"]
    # Norms on both sides of a block: what is added is normed first.
    assert ops(middle("gemma2"), few_rows=True) == ["linear", "add_rms_norm", "linear"] * 2
    adds = [call for call in fuse(middle("gemma3"), few_rows=True) if call.op == "add_rms_norm"]
    assert all(None not in add.arguments for add in adds)


X = Spec((ROWS, 8), "compute")
SQUARE = Spec((8, 8), "compute")
ROW = Spec((8,), "compute")


def test_what_others_read_stays() -> None:
    def two_readers(op: Any, x: Any, w: Any, n: Any) -> Any:
        normed = op.rms_norm(x, n, 1e-6)
        return [op.linear(normed, w), normed]

    segment = trace_segment(two_readers, [X], [SQUARE, ROW])
    assert ops(segment, few_rows=True) == ["rms_norm", "linear"]

    def used_twice(op: Any, x: Any, y: Any, w: Any) -> Any:
        product = op.linear(y, w)
        return op.add_residual(op.add_residual(x, product), product)

    segment = trace_segment(used_twice, [X, X], [SQUARE])
    assert ops(segment, few_rows=True) == ["linear", "add_residual", "add_residual"]

    def squared(op: Any, x: Any, w: Any) -> Any:
        y = op.linear(x, w)
        return y + y

    assert ops(trace_segment(squared, [X], [SQUARE]), few_rows=True) == ["linear", "add"]


def test_what_only_looks_alike_stays() -> None:
    def normed_apart(op: Any, x: Any, y: Any, n: Any) -> Any:
        total = op.add_residual(x, op.rms_norm(y, n, 1e-5))
        return [total, op.rms_norm(total, n, 1e-6)]

    segment = trace_segment(normed_apart, [X, X], [ROW])
    assert ops(segment, few_rows=True) == ["rms_norm", "add_rms_norm"]

    def norms_in_a_row(op: Any, x: Any, n: Any) -> Any:
        return op.rms_norm(op.rms_norm(op.heads(x, 4), n, 1e-6), n, 1e-6)

    segment = trace_segment(norms_in_a_row, [X], [Spec((4,), "compute")])
    assert ops(segment, few_rows=True) == ["rms_norm", "rms_norm"]

    def gates_itself(op: Any, x: Any, w: Any) -> Any:
        gate, up = op.split(op.linear(x, w), [4, 4])
        return op.silu(gate) * gate + up

    segment = trace_segment(gates_itself, [X], [SQUARE])
    assert ops(segment, few_rows=True) == ["linear", "silu", "mul", "add"]

    def gates_by_the_second(op: Any, x: Any, w: Any) -> Any:
        up, gate = op.split(op.linear(x, w), [4, 4])
        return op.silu(gate) * up

    segment = trace_segment(gates_by_the_second, [X], [SQUARE])
    assert ops(segment, few_rows=True) == ["linear", "silu", "mul"]

    def delta_first(op: Any, x: Any, y: Any, w: Any) -> Any:
        return op.add_residual(op.linear(x, w), y)

    segment = trace_segment(delta_first, [X, X], [SQUARE])
    assert ops(segment, few_rows=True) == ["linear", "add_residual"]
