"""Products by quantized weights: the C kernel and its twin against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorray.kernels import moe, native
from tensorray.kernels.linear import linear, linear_numpy
from tensorray.kernels.quantized import (
    Kind,
    QuantizedWeight,
    dequantize,
    dequantize_rows,
    linear_quantized_numpy,
    pack_int4,
)

needs_native = pytest.mark.skipif(not native.native_available(), reason="no C kernels")


def random_weight(
    kind: Kind,
    out: int,
    columns: int,
    group: int,
    *,
    zeros: bool = False,
    order: bool = False,
    groups: bool = False,
    stack: int | None = None,
    seed: int = 0,
) -> QuantizedWeight:
    generator = np.random.default_rng(seed)
    outer = () if stack is None else (stack,)
    count = -(-columns // group)
    if kind == "float8":
        values = generator.integers(0, 256, (*outer, out, columns)).astype(np.uint8)
        values[(values & 127) == 127] = 0x81  # no NaN, but subnormals
    else:
        low = -8 if kind == "int4" else -128
        values = generator.integers(low, -low, (*outer, out, columns)).astype(np.int8)
    scales = generator.uniform(0.001, 0.002, (*outer, out, count)).astype(np.float32)
    permutations = [generator.permutation(columns) for _ in range(stack or 1)]
    return QuantizedWeight(
        kind,
        group,
        pack_int4(values) if kind == "int4" else values,
        scales,
        generator.integers(-8, 8, scales.shape).astype(np.int8) if zeros else None,
        np.array(permutations, np.int32).reshape(*outer, columns) if order else None,
        generator.integers(0, count, (*outer, columns)).astype(np.int32) if groups else None,
    )


def plain(weight: QuantizedWeight) -> Any:
    """Its values in float64, one at a time, by what the class says of its arrays."""
    out, columns = weight.shape
    values = np.zeros((out, columns))
    for row in range(out):
        for column in range(columns):
            if weight.kind == "int4":
                byte = int(weight.values[row, column // 2])
                code = byte >> 4 if column % 2 else byte & 15
                code = code - 16 if code > 7 else code
            elif weight.kind == "int8":
                code = int(weight.values[row, column])
            else:
                code = float(weight.values[row, column].view(ml_dtypes.float8_e4m3fn))
            group = column // weight.group if weight.groups is None else weight.groups[column]
            zero = 0 if weight.zeros is None else int(weight.zeros[row, group])
            place = column if weight.order is None else weight.order[column]
            values[row, place] = (code - zero) * float(weight.scales[row, group])
    return values


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
@pytest.mark.parametrize(
    ("columns", "group", "extras"),
    [
        (24, 24, {}),
        (24, 8, {"zeros": True}),
        (24, 8, {"order": True}),
        (24, 16, {"zeros": True}),  # the last group is shorter
        (24, 8, {"zeros": True, "order": True, "groups": True}),
    ],
    ids=str,
)
def test_dequantize(kind: Kind, columns: int, group: int, extras: dict[str, bool]) -> None:
    weight = random_weight(kind, 5, columns, group, **extras)
    found = dequantize(weight)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain(weight), rtol=1e-6)
    rows = dequantize_rows(weight, 2, 4)
    ordered = found[2:4] if weight.order is None else found[2:4][:, weight.order]
    np.testing.assert_array_equal(rows, ordered)


def test_all_float8_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)[None]
    weight = QuantizedWeight("float8", 256, codes, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(
        dequantize(weight), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


SHAPES = [(1, 32, 32), (7, 64, 32), (33, 256, 128), (9, 160, 64), (12, 96, 96)]


@needs_native
@pytest.mark.parametrize(
    "instruction_set", native.library.instruction_sets() if native.library else []
)
@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
def test_native_products(kind: Kind, instruction_set: str) -> None:
    before = native.library.instruction_set()
    native.library.use_instruction_set(instruction_set)
    try:
        generator = np.random.default_rng(1)
        for out, columns, group in SHAPES:
            for zeros in (False, True):
                weight = random_weight(kind, out, columns, group, zeros=zeros, order=zeros)
                values = dequantize(weight).astype(np.float64)
                for rows in (1, 2, 3, 5, 6, 7, 13):
                    x = generator.standard_normal((rows, columns)).astype(np.float32)
                    bias = generator.standard_normal(out).astype(np.float32)
                    found = linear(x, weight, bias)
                    expected = x @ values.T + bias
                    size = np.abs(x) @ np.abs(values).T
                    assert (np.abs(found - expected) <= 2e-6 * size + 1e-6).all()
                    # A row's bits are its own.
                    np.testing.assert_array_equal(linear(x[-1:], weight, bias), found[-1:])
                    wide = np.zeros((rows, 2 * columns), np.float32)
                    wide[:, ::2], wide[:, columns:] = 9.0, x
                    np.testing.assert_array_equal(linear(wide[:, columns:], weight, bias), found)
    finally:
        native.library.use_instruction_set(before)


@needs_native
def test_native_float8_codes() -> None:
    """Each code by itself, subnormals and both zeros among them."""
    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    values = np.zeros((len(codes), 32), np.uint8)
    values[:, 3] = codes
    weight = QuantizedWeight("float8", 32, values, np.ones((len(codes), 1), np.float32))
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = 1.0
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(linear(x, weight)[0], expected)


@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
@pytest.mark.parametrize("rows", [1, 120])
@pytest.mark.parametrize("group", [8, 24, 48])
def test_other_sizes_go_to_the_twin(kind: Kind, rows: int, group: int) -> None:
    weight = random_weight(kind, 50, 48, group, zeros=True)
    x = np.random.default_rng(2).standard_normal((rows, 48)).astype(np.float32)
    expected = x @ dequantize(weight).T
    np.testing.assert_allclose(linear(x, weight), expected, atol=1e-4)
    np.testing.assert_allclose(linear_quantized_numpy(x, weight), expected, atol=1e-4)


def test_what_linear_does_besides() -> None:
    weight = random_weight("int4", 64, 32, 32)
    generator = np.random.default_rng(3)
    x = generator.standard_normal((4, 32)).astype(np.float32)
    residual = generator.standard_normal((4, 32)).astype(np.float32)
    norm = generator.standard_normal(32).astype(np.float32)
    options: dict[str, Any] = {"norm": norm, "eps": 1e-6, "gate": "silu", "residual": residual}
    expected = linear_numpy(x, dequantize(weight), **options)
    np.testing.assert_allclose(linear(x, weight, **options), expected, atol=1e-4)


def test_experts() -> None:
    generator = np.random.default_rng(4)
    gate_up = random_weight("int4", 64, 32, 32, zeros=True, order=True, stack=3)
    down = random_weight("int8", 32, 32, 32, stack=3, seed=1)
    x = generator.standard_normal((6, 32)).astype(np.float32)
    # The only experts, or those of a rank, of which rows choose some or none.
    for all_experts, first in [(3, None), (9, 3), (9, 9)]:
        logits = generator.standard_normal((6, all_experts)).astype(np.float32)
        weights, ids = moe.route(logits, 2, True)
        found = moe.experts(x, weights, ids, gate_up, down, first)
        expected = moe.experts(x, weights, ids, dequantize(gate_up), dequantize(down), first)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@needs_native
def test_the_module_checks_its_arguments() -> None:
    weight = random_weight("int4", 8, 64, 32)
    x, y = np.zeros((2, 64), np.float32), np.zeros((2, 8), np.float32)
    arguments = ["int4", x, weight.values, weight.scales, None, 32, None, y]
    native.library.linear_quantized(*arguments)
    for place, value, message in [
        (0, "int2", "no codes of kind int2"),
        (1, x[:, :62], "columns"),
        (2, weight.values.view(np.int8), "type"),
        (3, weight.scales[:, :1].copy(), "groups"),
        (3, weight.scales[:4], "scales"),
        (4, np.zeros((8, 1), np.int8), "zeros"),
        (5, 16, "groups"),
        (5, 0, "groups"),
        (6, np.zeros(7, np.float32), "bias"),
        (7, y[:1], "another shape"),
    ]:
        changed: list[Any] = [*arguments]
        changed[place] = value
        with pytest.raises((ValueError, TypeError), match=message):
            native.library.linear_quantized(*changed)


def test_a_weight_knows_its_size() -> None:
    weight = random_weight("int4", 8, 64, 32, zeros=True, stack=3)
    assert weight.shape == (3, 8, 64)
    assert weight[1].shape == (8, 64)
    assert weight.nbytes == 3 * 8 * 32 + 3 * 8 * 2 * 4 + 3 * 8 * 2
    copy = weight.copy()
    np.testing.assert_array_equal(copy.values, weight.values)
    assert copy.values is not weight.values
