"""Tensors that stay in their file: slices are read, decoded and copied a bounded piece at a time.

Plain positioned reads, not a memory map: a map's pages count as the process's memory, and a file
that shrinks under a map kills the process instead of raising.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.quantized import Quantization, QuantizedTensor

#: Values decoded at a time: a megabyte of float32, which stays in a core's cache.
PIECE_VALUES = 1 << 18

Array = NDArray[Any]
T = TypeVar("T", bound="StoredTensor")


class DataFile:
    """A file open for positioned reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes from `offset` on; raises CheckpointError where the file ends before."""
        buffer = np.empty(count, np.uint8)
        view = buffer.data
        done = 0
        while done < count:
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
            if got == 0:
                raise CheckpointError(f"{self.path}: truncated at byte {offset + done}")
            done += got
        return buffer

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class StoredTensor(ABC):
    """A row-major tensor whose rows (along its last axis) can be fetched in any range.

    Formats that store a tensor otherwise than Hugging Face does say how: `order`, for tensors of
    one or two axes, has row i stored as row `order[i]`; `transposed`, for two axes, has them
    swapped (`stored` is the shape as stored, `shape` as the tensor is known).
    """

    stored: tuple[int, ...]
    order: NDArray[np.intp] | None = field(default=None, kw_only=True)
    transposed: bool = field(default=False, kw_only=True)

    @abstractmethod
    def fetch(self, start: int, stop: int) -> Array:
        """Stored rows start to stop, decoded: `[stop - start, width]`."""

    @abstractmethod
    def slab(self: T, index: int) -> T:
        """The tensor at an index of axis 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored[::-1] if self.transposed else self.stored

    @property
    def piece_values(self) -> int:
        """Values decoded at a time."""
        return PIECE_VALUES

    @property
    def width(self) -> int:
        """Values in a stored row; a 1-D tensor is stored as rows of one value."""
        return self.stored[-1] if len(self.stored) > 1 else 1

    def read(self, out: Array, rows: slice, columns: slice, transpose: bool) -> None:
        """Fill `out` with a slice; the arguments are `Checkpoint.read`'s."""
        if out.size == 0:
            return
        if transpose != self.transposed:
            out, rows, columns = out.T, columns, rows
        if len(self.stored) > 2:
            for i, index in enumerate(range(*rows.indices(self.stored[0]))):
                self.slab(index).read(out[i], columns, slice(None), False)
            return
        if len(self.stored) == 1:
            out, columns = out[:, None], slice(None)
        first, last, _ = rows.indices(self.stored[0])
        low, high = first, last
        place: NDArray[np.intp] | None = None
        if self.order is not None:
            low = int(self.order[first:last].min())
            high = int(self.order[first:last].max()) + 1
            place = np.full(high - low, -1, np.intp)
            wanted = self.order[first:last] - low
            place[wanted] = np.arange(last - first)
        step = max(1, self.piece_values // self.width)
        if step > 16:  # the gguf library works on 16 rows at a time
            step -= step % 16
        for start in range(low, high, step):
            stop = min(start + step, high)
            piece = self.fetch(start, stop)[:, columns]
            if place is None:
                out[start - low : stop - low] = piece
            else:
                target = place[start - low : stop - low]
                out[target[target >= 0]] = piece[target >= 0]


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """A tensor at an offset of a file. `decode` turns `[rows, row_bytes]` bytes into values."""

    file: DataFile
    offset: int
    row_bytes: int
    decode: Callable[[NDArray[np.uint8]], Array]

    def fetch(self, start: int, stop: int) -> Array:
        data = self.file.read(self.offset + start * self.row_bytes, (stop - start) * self.row_bytes)
        return self.decode(data.reshape(stop - start, self.row_bytes))

    def slab(self, index: int) -> FileTensor:
        rest = self.stored[1:]
        step = prod(rest[:-1]) * self.row_bytes
        # What is left of two axes is rows of one value.
        row_bytes = self.row_bytes if len(rest) > 1 else self.row_bytes // max(1, rest[0])
        return replace(self, stored=rest, offset=self.offset + index * step, row_bytes=row_bytes)


class TensorCheckpoint:
    """A checkpoint (base.Checkpoint) over a table of stored tensors, by Hugging Face name."""

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        generation_config: dict[str, Any],
        tensors: dict[str, FileTensor],
        quantization: Quantization | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.generation_config = generation_config
        self._tensors = tensors
        self._quantization = quantization

    def has(self, name: str) -> bool:
        return name in self._tensors

    def renamed(self, names: Mapping[str, str]) -> TensorCheckpoint:
        """Of the same files the tensors that `names` lists, a new name for each old one."""
        tensors = {new: self._tensor(old) for new, old in names.items()}
        return TensorCheckpoint(
            self.path, self.config, self.generation_config, tensors, self._quantization
        )

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """What the tensor's values are read as."""
        return self._tensor(name).fetch(0, 0).dtype

    def file(self, name: str) -> Path:
        return self._tensor(name).file.path

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedTensor | None:
        if self._quantization is None or not name.endswith(".weight"):
            return None
        return self._quantization.tensor(self, name.removesuffix(".weight"), shape)

    def read(
        self, name: str, out: Array, rows: slice, columns: slice, transpose: bool = False
    ) -> None:
        try:
            self._tensor(name).read(out, rows, columns, transpose)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (tensor {name!r})") from error

    def close(self) -> None:
        for file in {id(tensor.file): tensor.file for tensor in self._tensors.values()}.values():
            file.close()

    def _tensor(self, name: str) -> FileTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}") from None
