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
from tensorray.builder.checkpoint.quantization_config import schemes_of
from tensorray.builder.checkpoint.quantized import QuantizedTensor
from tensorray.builder.checkpoint.tensor import PIECE_VALUES, Array, StoredTensor
from tensorray.builder.quantization import Scheme

_SPREAD = 0.035  # uniform in +-0.035: a standard deviation of 0.02, as models are initialized
_DEVICE_PIECE = 1 << 24  # values made at a time where a call costs more than its work


@dataclass(frozen=True)
class RandomTensor(StoredTensor):
    """Rows made up on demand, as arrays of the module `xp`.

    Matrices and biases are uniform around 0, 1-D weights (norms) around 1, so that activations
    stay of order one through any number of layers.
    """

    name: str
    xp: Any = np

    @property
    def piece_values(self) -> int:
        return PIECE_VALUES if self.xp is np else _DEVICE_PIECE

    def fetch(self, start: int, stop: int) -> Array:
        seed = zlib.crc32(self.name.encode())
        values = _uniform(self.xp, seed, start * self.width, stop * self.width)
        values *= np.float32(2 * _SPREAD)
        center = 1.0 if len(self.stored) == 1 and self.name.endswith("weight") else 0.0
        values += np.float32(center - _SPREAD)
        return values.reshape(stop - start, self.width)

    def slab(self, index: int) -> RandomTensor:
        return RandomTensor(self.stored[1:], f"{self.name}[{index}]", self.xp)


def _uniform(xp: Any, seed: int, start: int, stop: int) -> Array:
    """float32 in [0, 1) for each index: a hash (MurmurHash3's finalizer) of index and seed."""
    x = xp.arange(start, stop, dtype=np.uint32)
    x *= np.uint32(0x9E3779B1)
    x ^= np.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    values: Array = (x >> np.uint32(8)).astype(np.float32)
    values *= np.float32(2**-24)
    return values


class RandomQuantized(QuantizedTensor):
    """A quantized weight with codes made up on demand, as large as others are."""

    def __init__(self, scheme: Scheme, random: RandomTensor) -> None:
        out, inputs = random.shape
        super().__init__(scheme, (out, inputs))
        self._random = random
        self._largest = {"int4": 7.0, "int8": 127.0, "float8": 1.0}[scheme.kind]

    def codes(self, rows: slice, columns: slice) -> Array:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        values = self._random.xp.empty(shape, np.float32)
        self._random.read(values, rows, columns, False)
        values *= np.float32(self._largest / _SPREAD)
        if self.scheme.kind != "float8":
            codes: Array = values.astype(np.int8)
            return codes
        # From 0.5, which is 0x30, to 0.9375, seven codes on, with either sign.
        codes = (abs(values) * np.float32(7.99)).astype(np.uint8)
        codes += np.uint8(0x30)
        codes[values < 0] |= np.uint8(0x80)
        return codes

    def scales(self, rows: slice, groups: slice) -> Array:
        shape = (rows.stop - rows.start, groups.stop - groups.start)
        scales: Array = self._random.xp.full(shape, _SPREAD / self._largest, np.float32)
        return scales

    def zeros(self, rows: slice, groups: slice) -> Array:
        shape = (rows.stop - rows.start, groups.stop - groups.start)
        zeros: Array = self._random.xp.zeros(shape, np.int8)
        return zeros

    def groups(self) -> Array:
        groups: Array = np.arange(self.shape[1], dtype=np.int32) // np.int32(self.group)
        return groups

    def read(self, out: Array, rows: slice, columns: slice) -> None:
        self._random.read(out, rows, columns, False)


class DummyCheckpoint:
    """A checkpoint (base.Checkpoint) that has whatever tensors the model declares.

    They are made by the array module `xp`, which is that of the arrays they are read into.
    """

    xp: Any = np

    def __init__(
        self, path: Path, config: dict[str, Any], generation_config: dict[str, Any]
    ) -> None:
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self._tensors: dict[str, RandomTensor] = {}
        self._scheme_of = schemes_of(config)

    def declare(self, name: str, shape: tuple[int, ...]) -> None:
        """Have a tensor of this name and shape from now on."""
        self._tensors[name] = RandomTensor(shape, name, self.xp)

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

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedTensor | None:
        scheme = self._scheme_of(name)
        return (
            None if scheme is None else RandomQuantized(scheme, RandomTensor(shape, name, self.xp))
        )

    def close(self) -> None:
        self._tensors.clear()

    def _tensor(self, name: str) -> RandomTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r}: the model does not declare it"
            ) from None
