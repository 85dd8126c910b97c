"""Loading: from a checkpoint's tensors to the arrays one shard computes with.

Each declared weight is allocated once, in its final shape, where a `Placement` says, and the slices
its parts name are read straight into it; what is in memory is never more than the weights and a few
bounded pieces.
Everything is checked against the checkpoint before the first byte is read.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tensorray.builder.checkpoint.base import Checkpoint, CheckpointError
from tensorray.builder.checkpoint.dummy import DummyCheckpoint
from tensorray.builder.checkpoint.quantization_config import schemes_of
from tensorray.builder.checkpoint.quantized import IGNORED, QuantizedTensor
from tensorray.builder.load_quantized import fill_quantized
from tensorray.builder.model import Layout, Model, Part, ShardWeights, Weight, Weights
from tensorray.builder.quantization import weight_forms
from tensorray.builder.shares import slice_of, weight_shape
from tensorray.kernels.quantized import QuantizedWeight

logger = logging.getLogger(__name__)

#: Bytes of weights a reading thread fills per task: what progress moves by.
_TASK_BYTES = 16 << 20
_MAX_THREADS = 8

#: Tensors of checkpoints that no definition uses, for good reason: constants that old versions
#: of transformers saved, vision towers, and the rotary factors that config keys give too.
_IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|^lm_head\.weight$|^rope_freqs\."
    r"|^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector)\."
)


class Placement(Protocol):
    """Where weights live. Its methods may be called from several threads at once."""

    xp: Any  # the array module of the weights

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """A new array that nothing has been written to."""
        ...

    def fill(self, array: Any, read: Callable[[Any], None], *, anywhere: bool) -> None:
        """Have `read` write an array of this shape and dtype, and `array` have its content once
        `finish` returns. `anywhere`: read takes arrays of `xp`; else host memory only."""
        ...

    def finish(self) -> None:
        """Return when all arrays are filled."""


class HostPlacement:
    """Weights in this process's memory."""

    xp: Any = np

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        return np.empty(shape, dtype)

    def fill(self, array: Any, read: Callable[[Any], None], *, anywhere: bool) -> None:
        read(array)

    def finish(self) -> None:
        pass


def load_weights(
    model: Model,
    checkpoint: Checkpoint,
    *,
    layers: range | None = None,
    dtype: DTypeLike = np.float32,
    place: Placement | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ShardWeights:
    """Read a shard's weights: those of `layers` (None: all; an empty range: the embedding and the
    head alone), sliced as `model.layout` says.

    The embedding comes with the first layer of the model, the head with the last. Equal
    declarations (tied weights) share one array. `place` says where they go (None: host memory).
    `progress(done, total)` is called in bytes, from one thread at a time. Raises CheckpointError
    naming every missing tensor and every wrong shape, before anything is read.
    """
    place = place or HostPlacement()
    groups = _groups(model, layers)
    if isinstance(checkpoint, DummyCheckpoint):
        checkpoint.xp = place.xp
        for part in _parts(_groups(model, None)):
            checkpoint.declare(part.name, part.shape)
    quantized = _quantized(_groups(model, None), checkpoint)
    _check(groups, checkpoint, quantized)
    if not model.layout.expert_parallel:  # where a rank does not know the others' experts
        _report_unused(model, checkpoint, quantized)
    schemes = {name: tensor.scheme for name, tensor in quantized.items()}
    forms = weight_forms(model, _unique(groups), schemes.get)
    arrays = {
        weight: forms[weight].empty(place.empty)
        if weight in forms
        else place.empty(weight_shape(weight, model.layout), dtype)
        for weight in _unique(groups)
    }
    total = sum(array.nbytes for array in arrays.values())
    done = 0
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        tasks = [
            pool.submit(task)
            for weight, array in arrays.items()
            for task in _reads(weight, array, model.layout, checkpoint, quantized, place)
        ]
        try:
            for task in tasks:
                done += task.result()
                if progress:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    place.finish()
    filled = {
        key: Weights({name: arrays[weight] for name, weight in group.items()})
        for key, group in groups.items()
    }
    return ShardWeights(
        embed=filled.pop("embed", Weights()),
        head=filled.pop("head", Weights()),
        layers={key: weights for key, weights in filled.items() if isinstance(key, int)},
    )


def plan_bytes(model: Model, *, layers: range | None = None, dtype: DTypeLike = np.float32) -> int:
    """Bytes the shard's weights will take, before any of them is loaded.

    What is quantized is as the model's config tells.
    """
    itemsize = np.dtype(dtype).itemsize
    weights = _unique(_groups(model, layers))
    forms = weight_forms(model, weights, schemes_of(model.config))
    return sum(
        forms[weight].nbytes
        if weight in forms
        else prod(weight_shape(weight, model.layout)) * itemsize
        for weight in weights
    )


def _groups(model: Model, layers: range | None) -> dict[str | int, dict[str, Weight]]:
    """Declarations by group: "embed", layer indices, "head"."""
    layers = range(model.num_layers) if layers is None else layers
    groups: dict[str | int, dict[str, Weight]] = {}
    if 0 in layers or not layers:
        groups["embed"] = model.embed_weights()
    for layer in layers:
        groups[layer] = model.layer_weights(layer)
    if model.num_layers - 1 in layers or not layers:
        groups["head"] = model.head_weights()
    return groups


def _unique(groups: dict[str | int, dict[str, Weight]]) -> list[Weight]:
    return list(dict.fromkeys(weight for group in groups.values() for weight in group.values()))


def _parts(groups: dict[str | int, dict[str, Weight]]) -> Iterator[Part]:
    for weight in _unique(groups):
        yield from weight.parts


def _quantized(
    groups: dict[str | int, dict[str, Weight]], checkpoint: Checkpoint
) -> dict[str, QuantizedTensor]:
    """Of the tensors that weights are made of, those that the checkpoint has quantized."""
    found = {}
    for part in _parts(groups):
        if len(part.shape) == 2 and part.name not in found:
            first, second = part.shape
            shape = (second, first) if part.transpose else (first, second)
            tensor = checkpoint.quantized(part.name, shape)
            if tensor is not None:
                found[part.name] = tensor
    return found


def _check(
    groups: dict[str | int, dict[str, Weight]],
    checkpoint: Checkpoint,
    quantized: dict[str, QuantizedTensor],
) -> None:
    there = set(checkpoint.names())
    declared = {part.name: part.shape for part in _parts(groups)}
    plain = {name: shape for name, shape in declared.items() if name not in quantized}
    tensors = [tensor for name, tensor in quantized.items() if name in declared]
    missing = [name for name in plain if name not in there]
    missing += [name for tensor in tensors for name in tensor.missing()]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} tensors of the model are missing: "
            f"{_some(missing)}; the checkpoint is not complete, or not of this architecture"
        )
    wrong = [
        f"{checkpoint.file(name)}: tensor {name!r} has shape {list(checkpoint.shape(name))}, "
        f"but by its config the model needs {list(shape)}"
        for name, shape in plain.items()
        if checkpoint.shape(name) != shape
    ]
    wrong += [problem for tensor in tensors for problem in tensor.wrong()]
    if wrong:
        raise CheckpointError(_some(wrong, limit=3, separator="; "))


def _report_unused(
    model: Model, checkpoint: Checkpoint, quantized: dict[str, QuantizedTensor]
) -> None:
    used = {part.name for part in _parts(_groups(model, None))}
    used.update(name for tensor in quantized.values() for name in tensor.names)
    known = IGNORED if quantized else ()
    unused = [
        name
        for name in checkpoint.names()
        if name not in used and not name.endswith(known) and not _IGNORED.search(name)
    ]
    if unused:
        logger.warning(
            "%s: %d tensors are not used by the model: %s",
            checkpoint.path,
            len(unused),
            _some(unused),
        )


def _some(items: list[str], limit: int = 10, separator: str = ", ") -> str:
    more = len(items) - limit
    return separator.join(items[:limit]) + (f"{separator}and {more} more" if more > 0 else "")


def _reads(
    weight: Weight,
    array: Any,
    layout: Layout,
    checkpoint: Checkpoint,
    quantized: dict[str, QuantizedTensor],
    place: Placement,
) -> Iterator[Callable[[], int]]:
    """The reads that fill a weight, each of bounded size; each returns the bytes it filled."""
    if isinstance(array, QuantizedWeight):
        fill = partial(place.fill, anywhere=isinstance(checkpoint, DummyCheckpoint))
        yield from fill_quantized(weight, array, layout, quantized, fill)
        return
    for task in _tasks(weight, array, layout):
        yield partial(_read, checkpoint, quantized.get(task.name), task, place)


@dataclass(frozen=True)
class _Task:
    """A slice of a tensor to be read into its place in a weight."""

    name: str
    out: Any
    rows: slice
    columns: slice
    transpose: bool
    add: float


def _tasks(weight: Weight, array: Any, layout: Layout) -> Iterator[_Task]:
    """The reads that fill a weight, each of bounded size."""
    per_run = len(weight.parts) // (weight.stack or 1)
    row = 0
    for i, part in enumerate(weight.parts):
        run, index = divmod(i, per_run)
        target = array if weight.stack is None else array[run]
        if index == 0:
            row = 0
        piece = slice_of(part, layout)
        out = target[row : row + piece.shape[0]]
        row += piece.shape[0]
        # Cut along the axis that is rows in the file, so that no row is read twice.
        axis = 1 if part.transpose else 0
        step = max(1, _TASK_BYTES * out.shape[axis] // max(1, out.nbytes))
        for start in range(0, out.shape[axis], step):
            cut = slice(start, min(start + step, out.shape[axis]))
            rows = piece.rows if axis else _within(piece.rows, cut)
            columns = _within(piece.columns, cut) if axis else piece.columns
            target_cut = out[:, cut] if axis else out[cut]
            yield _Task(part.name, target_cut, rows, columns, part.transpose, weight.add)


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def _read(
    checkpoint: Checkpoint, quantized: QuantizedTensor | None, task: _Task, place: Placement
) -> int:
    """Do one task; returns the bytes it filled."""
    generated = isinstance(checkpoint, DummyCheckpoint)

    def read_plain(out: Any) -> None:
        if quantized:  # which is [out, in] already
            quantized.read(out, task.rows, task.columns)
        else:
            checkpoint.read(task.name, out, task.rows, task.columns, task.transpose)

    def read(out: Any) -> None:
        if not task.add:
            read_plain(out)
            return
        # In float32, so that a narrow dtype rounds once.
        exact = (place.xp if generated else np).empty(out.shape, np.float32)
        read_plain(exact)
        out[...] = exact + np.float32(task.add)

    place.fill(task.out, read, anywhere=generated)
    return int(task.out.nbytes)
