"""The share of each declared weight that a tensor-parallel rank holds: slices and shapes."""

from __future__ import annotations

from dataclasses import dataclass

from tensorray.builder.model import Layout, Part, Weight


def weight_shape(weight: Weight, layout: Layout) -> tuple[int, ...]:
    """The shape of a weight as a shard holds it."""
    shapes = [slice_of(part, layout).shape for part in weight.parts]
    per_run, rest = divmod(len(shapes), weight.stack or 1)
    if not per_run or rest:
        raise ValueError(f"parts don't come in {weight.stack or 1} equal runs: {weight}")
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"parts of different widths can't be concatenated: {weight}")
    runs = [shapes[i : i + per_run] for i in range(0, len(shapes), per_run)]
    rows = {sum(shape[0] for shape in run) for run in runs}
    if len(rows) > 1:
        raise ValueError(f"stacked runs of different heights {sorted(rows)}: {weight}")
    shape = (rows.pop(), *shapes[0][1:])
    return shape if weight.stack is None else (weight.stack, *shape)


@dataclass(frozen=True)
class Slice:
    """The share of a part that a shard holds: a slice of the tensor, after any transposition."""

    rows: slice
    columns: slice
    shape: tuple[int, ...]


def slice_of(part: Part, layout: Layout) -> Slice:
    if part.transpose and len(part.shape) != 2:
        raise ValueError(f"{part.name}: only a tensor of two axes can be transposed")
    shape = part.shape[::-1] if part.transpose else part.shape
    rows = _share(part, part.rows or (0, shape[0]), "rows", layout)
    if len(shape) == 1:
        if part.shard == "columns":
            raise ValueError(f"{part.name}: a tensor of one axis has no columns to split")
        return Slice(rows, slice(None), (rows.stop - rows.start,))
    columns = _share(part, (0, shape[1]), "columns", layout)
    return Slice(rows, columns, (rows.stop - rows.start, columns.stop - columns.start, *shape[2:]))


def _share(part: Part, span: tuple[int, int], axis: str, layout: Layout) -> slice:
    """This rank's share of a span if the part is split on that axis, else the span."""
    start, stop = span
    if part.shard != axis:
        return slice(start, stop)
    size, rest = divmod(stop - start, layout.tp_size)
    if rest:
        raise ValueError(
            f"{part.name}: {stop - start} {axis} can't be split evenly over "
            f"{layout.tp_size} tensor-parallel ranks"
        )
    return slice(start + layout.tp_rank * size, start + (layout.tp_rank + 1) * size)
