"""Random weights for a config without a checkpoint (`--load-format dummy`).

For measuring and testing: a model's speed and memory without its gigabytes. Values depend on the
tensor's name and position only, so every shard of a replica reads slices of the same tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.tensor import PIECE_VALUES, Array, StoredTensor

_SPREAD = 0.035  # uniform in +-0.035: a standard deviation of 0.02, as models are initialized


@dataclass(frozen=True)
class RandomTensor(StoredTensor):
    """Rows made up on demand, in blocks that each have a generator of their own.

    Matrices and biases are uniform around 0, 1-D weights (norms) around 1, so that activations
    stay of order one through any number of layers.
    """

    name: str

    def fetch(self, start: int, stop: int) -> Array:
        block = max(1, PIECE_VALUES // self.width)
        center = 1.0 if len(self.stored) == 1 and self.name.endswith("weight") else 0.0
        pieces = []
        for index in range(start // block, -(-stop // block)):
            seed = [zlib.crc32(self.name.encode()), index]
            values = np.random.Generator(np.random.SFC64(seed)).random(
                (block, self.width), np.float32
            )
            first = index * block
            pieces.append(values[max(start - first, 0) : stop - first])
        rows = np.concatenate(pieces)
        rows *= 2 * _SPREAD
        rows += center - _SPREAD
        return rows

    def slab(self, index: int) -> RandomTensor:
        return RandomTensor(self.stored[1:], f"{self.name}[{index}]")


class DummyCheckpoint:
    """A checkpoint (base.Checkpoint) that has whatever tensors the model declares."""

    def __init__(
        self, path: Path, config: dict[str, Any], generation_config: dict[str, Any]
    ) -> None:
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self._tensors: dict[str, RandomTensor] = {}

    def declare(self, name: str, shape: tuple[int, ...]) -> None:
        """Have a tensor of this name and shape from now on."""
        self._tensors[name] = RandomTensor(shape, name)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def file(self, name: str) -> Path:
        return self.path

    def read(
        self, name: str, out: Array, rows: slice, columns: slice, transpose: bool = False
    ) -> None:
        self._tensor(name).read(out, rows, columns, transpose)

    def close(self) -> None:
        self._tensors.clear()

    def _tensor(self, name: str) -> RandomTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r}: the model does not declare it"
            ) from None
