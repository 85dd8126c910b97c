"""Medusa heads (arXiv 2401.10774) as they are published, in safetensors.

Two layouts are read, with or without a prefix `medusa_head.` or `medusa_heads.`:

    0.0.linear.weight, 0.0.linear.bias, ..., 0.1.weight      the authors': head.layer
    blocks.0.layers.0.weight (and .bias), lm_heads.0.weight  vLLM's

`[hidden, hidden]` residual layers with optional biases, and a projection `[vocab, hidden]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint import pickles
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.safetensors import read_header
from tensorray.builder.checkpoint.tensor import DataFile, FileTensor

#: File names, the one that is looked for first before the others.
FILES = ("medusa_lm_head.safetensors", "model.safetensors")

_PREFIX = re.compile(r"^medusa_heads?\.")
_BLOCK = re.compile(
    r"(?P<head>\d+)\.(?P<layer>\d+)\.linear\.(?P<kind>weight|bias)$"
    r"|blocks\.(?P<vhead>\d+)\.layers\.(?P<vlayer>\d+)\.(?P<vkind>weight|bias)$"
)
_PROJECTION = re.compile(r"(?P<head>\d+)\.\d+\.weight$|lm_heads\.(?P<vhead>\d+)\.weight$")

Array = NDArray[np.float32]


@dataclass(frozen=True)
class MedusaHead:
    """One head, float32: residual layers (weight, bias or None), then the projection."""

    blocks: tuple[tuple[Array, Array | None], ...]
    projection: Array

    @property
    def nbytes(self) -> int:
        layers = sum(w.nbytes + (0 if b is None else b.nbytes) for w, b in self.blocks)
        return layers + self.projection.nbytes


def load_medusa(directory: Path, hidden: int, vocab: int) -> list[MedusaHead]:
    """The heads in a directory, for a model of these sizes, in their order.

    Raises CheckpointError naming file and tensor for what is missing, superfluous or misshapen.
    """
    path = next((directory / name for name in FILES if (directory / name).is_file()), None)
    if path is None:
        if directory.is_dir() and any(f.suffix in pickles.SUFFIXES for f in directory.iterdir()):
            raise CheckpointError(pickles.refusal(directory))
        raise CheckpointError(f"{directory}: no Medusa heads: none of {', '.join(FILES)}")
    file = DataFile(path)
    try:
        return _read(path, read_header(file), hidden, vocab)
    finally:
        file.close()


def _read(
    path: Path, tensors: Mapping[str, FileTensor], hidden: int, vocab: int
) -> list[MedusaHead]:
    blocks: dict[tuple[int, int, str], Array] = {}
    projections: dict[int, Array] = {}
    for name, tensor in tensors.items():
        bare = _PREFIX.sub("", name)
        if found := _BLOCK.match(bare):
            at: dict[str, Any] = {k.removeprefix("v"): v for k, v in found.groupdict().items() if v}
            shape = (hidden, hidden) if at["kind"] == "weight" else (hidden,)
            place = (int(at["head"]), int(at["layer"]), at["kind"])
            blocks[place] = _array(path, name, tensor, shape)
        elif found := _PROJECTION.match(bare):
            projection = _array(path, name, tensor, (vocab, hidden))
            projections[int(found["head"] or found["vhead"])] = projection
        else:
            raise CheckpointError(f"{path}: tensor {name!r} is none of a Medusa head's")
    count = len(projections)
    layers = {head: [] for head in range(count)}  # type: dict[int, list[int]]
    for head, layer, kind in sorted(blocks):
        if head in layers and kind == "weight":
            layers[head].append(layer)
        elif head not in layers or (head, layer, "weight") not in blocks:
            raise CheckpointError(f"{path}: head {head} is incomplete")
    complete = all(found == list(range(len(found))) for found in layers.values())
    if not count or sorted(projections) != list(range(count)) or not complete:
        raise CheckpointError(
            f"{path}: projections of heads {sorted(projections)} and layers {layers}: heads and "
            "their layers have to be numbered from 0 on"
        )
    return [
        MedusaHead(
            tuple((blocks[h, i, "weight"], blocks.get((h, i, "bias"))) for i in layers[h]),
            projections[h],
        )
        for h in range(count)
    ]


def _array(path: Path, name: str, tensor: FileTensor, shape: tuple[int, ...]) -> Array:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {list(tensor.shape)}; the model's heads have "
            f"{list(shape)}"
        )
    array = np.empty(shape, np.float32)
    tensor.read(array, slice(None), slice(None), False)
    return array
