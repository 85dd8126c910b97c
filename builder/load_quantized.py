"""Filling a quantized weight from its parts: each brings its own scales, zeros and order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.quantized import QuantizedTensor
from tensorray.builder.model import Layout, Part, Weight
from tensorray.builder.shares import slice_of
from tensorray.kernels.quantized import QuantizedWeight, pack_int4

#: Codes of an ordered weight that are put in place at a time.
_PIECE_CODES = 1 << 24

#: Has a call write an array, which may be elsewhere than in host memory (load.Placement).
Fill = Callable[[Any, Callable[[Any], None]], None]


def fill_quantized(
    weight: Weight,
    target: QuantizedWeight,
    layout: Layout,
    quantized: Mapping[str, QuantizedTensor],
    fill: Fill,
) -> Iterator[Callable[[], int]]:
    """The reads that fill a weight, each of bounded memory; each returns the bytes it filled.

    `quantized` has every part.
    """
    per_run = len(weight.parts) // (weight.stack or 1)
    for first in range(0, len(weight.parts), per_run):
        parts = weight.parts[first : first + per_run]
        run = target if weight.stack is None else target[first // per_run]
        if run.order is not None:
            yield partial(_fill_ordered, run, parts, layout, quantized, fill)
        else:
            for part, into in _places(run, parts, layout):
                yield from _fill(part, into, layout, quantized[part.name], fill)


def _places(
    run: QuantizedWeight, parts: tuple[Part, ...], layout: Layout
) -> Iterator[tuple[Part, QuantizedWeight]]:
    """Each part with the rows that it fills. (Order and groups are of all rows.)"""
    row = 0
    for part in parts:
        height = slice_of(part, layout).shape[0]
        rows = slice(row, row + height)
        yield (
            part,
            QuantizedWeight(
                run.kind,
                run.group,
                run.values[rows],
                run.scales[rows],
                None if run.zeros is None else run.zeros[rows],
            ),
        )
        row += height


def _fill(
    part: Part, into: QuantizedWeight, layout: Layout, tensor: QuantizedTensor, fill: Fill
) -> Iterator[Callable[[], int]]:
    piece = slice_of(part, layout)
    first_group = piece.columns.start // tensor.group
    groups = slice(first_group, first_group + into.scales.shape[1])
    yield partial(_fill_scales, into, tensor, piece.rows, groups, fill)
    for rows, columns in tensor.cuts(piece.rows, piece.columns):
        start, stop = (end - piece.columns.start for end in (columns.start, columns.stop))
        if into.kind == "int4":
            start, stop = start // 2, stop // 2
        cut = slice(rows.start - piece.rows.start, rows.stop - piece.rows.start)
        yield partial(_fill_codes, into.values[cut, start:stop], tensor, rows, columns, fill)


def _fill_scales(
    into: QuantizedWeight, tensor: QuantizedTensor, rows: slice, groups: slice, fill: Fill
) -> int:
    def read_scales(out: Any) -> None:
        out[...] = tensor.scales(rows, groups)

    def read_zeros(out: Any) -> None:
        out[...] = tensor.zeros(rows, groups)

    fill(into.scales, read_scales)
    if into.zeros is None:
        return int(into.scales.nbytes)
    fill(into.zeros, read_zeros)
    return int(into.scales.nbytes + into.zeros.nbytes)


def _fill_codes(
    target: Any, tensor: QuantizedTensor, rows: slice, columns: slice, fill: Fill
) -> int:
    def read(out: Any) -> None:
        codes = tensor.codes(rows, columns)
        out[...] = pack_int4(codes) if tensor.scheme.kind == "int4" else codes

    fill(target, read)
    return int(target.nbytes)


def _fill_ordered(
    run: QuantizedWeight,
    parts: tuple[Part, ...],
    layout: Layout,
    quantized: Mapping[str, QuantizedTensor],
    fill: Fill,
) -> int:
    """Parts whose groups have an order of their own, which must be the same for all."""
    columns = slice_of(parts[0], layout).columns
    by_input = quantized[parts[0].name].groups()[columns]
    order = np.argsort(by_input, kind="stable").astype(np.int32)
    sorted_groups = by_input[order]
    _fill_with(run.order, order, fill)
    if run.groups is not None:
        _fill_with(run.groups, sorted_groups, fill)
    elif not np.array_equal(sorted_groups, np.arange(len(order)) // run.group):
        raise CheckpointError(
            f"{parts[0].name}: its inputs are not in groups of {run.group} each, as its "
            "quantization_config says"
        )
    place = np.empty_like(order)  # of an input among the codes
    place[order] = np.arange(len(order), dtype=np.int32)
    for part, into in _places(run, parts, layout):
        tensor, rows = quantized[part.name], slice_of(part, layout).rows
        if not np.array_equal(tensor.groups()[columns], by_input):
            raise CheckpointError(
                f"{part.name} and {parts[0].name} order their inputs differently (g_idx), so they "
                "can't be one matrix; quantize them together, or without activation ordering"
            )
        _fill_scales(into, tensor, rows, slice(0, tensor.count), fill)
        # A piece of the outputs at a time: codes of any input may go to any place in a row.
        step = max(1, _PIECE_CODES // len(order))
        for start in range(rows.start, rows.stop, step):
            some = slice(start, min(start + step, rows.stop))
            target = into.values[some.start - rows.start : some.stop - rows.start]
            fill(target, partial(_read_ordered, tensor, some, columns, place))
    return run.nbytes


def _fill_with(target: Any, values: NDArray[Any], fill: Fill) -> None:
    def read(out: Any) -> None:
        out[...] = values

    fill(target, read)


def _read_ordered(
    tensor: QuantizedTensor, rows: slice, columns: slice, place: NDArray[np.int32], out: Any
) -> None:
    """Rows of codes, each put in its place."""
    out[...] = 0
    for cut_rows, cut in tensor.cuts(rows, columns):
        at = place[cut.start - columns.start : cut.stop - columns.start]
        some = out[cut_rows.start - rows.start : cut_rows.stop - rows.start]
        codes = tensor.codes(cut_rows, cut)
        if tensor.scheme.kind != "int4":
            some[:, at] = codes
            continue
        bits, high = codes.view(np.uint8) & 15, at % 2 == 1
        some[:, at[~high] // 2] |= bits[:, ~high]
        some[:, at[high] // 2] |= bits[:, high] << 4
