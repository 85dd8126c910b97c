"""The header of a GGUF file: its metadata, and where each tensor lies (ggml's GGUF specification).

The `gguf` library's own reader maps the file and makes one NumPy view per array element: 30 s and
700 MB for a vocabulary of 262,144 tokens. This one reads the header once, front to back; types,
sizes and dequantization are still the library's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from tensorray.builder.checkpoint.base import CheckpointError

_SCALARS: Mapping[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF file. `shape` is row-major (GGUF itself lists the last axis first)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # of the first byte, from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class Header:
    """All of a GGUF file but its tensors' data."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_metadata(path: str | Path) -> dict[str, Any]:
    """A GGUF file's metadata, by key.

    Numbers, booleans and strings are Python's; an array of numbers is an ndarray, an array of
    strings a list. Tensors are not read. Raises CheckpointError if the file is no sound GGUF.
    """
    return read_header(path).metadata


def read_header(path: str | Path) -> Header:
    """Parse and check a GGUF file's header; every tensor must lie inside the file."""
    path = Path(path)
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return _Parser(path, file).parse()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class _Parser:
    """Reads little-endian GGUF values one after the other; `place` says where, for errors."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = path.stat().st_size
        self.place = "the header"

    def parse(self) -> Header:
        if self.size < 24 or self.take(4) != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file (it does not start with 'GGUF')")
        version = self.number("<I")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path}: a big-endian GGUF file; convert it with gguf-convert-endian"
            )
        if version not in (2, 3):
            raise CheckpointError(
                f"{self.path}: GGUF version {version} is not supported (2 and 3 are)"
            )
        tensor_count, key_count = self.number("<Q"), self.number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            self.place = f"metadata key {key!r}"
            metadata[key] = self.value(self.number("<I"))
        self.place = "the list of tensors"
        infos = [self.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment must be a power of two, not {alignment}"
            )
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {}
        for name, shape, type_, offset in infos:
            if name in tensors:
                raise CheckpointError(f"{self.path}: tensor {name!r} is there twice")
            tensors[name] = self.locate(name, shape, type_, start + offset)
        return Header(metadata, tensors)

    def locate(self, name: str, shape: tuple[int, ...], type_: int, offset: int) -> TensorInfo:
        try:
            kind = GGMLQuantizationType(type_)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has the unknown type {type_}"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: rows of {shape[-1]} values can't be {kind.name}, "
                f"which packs {block}"
            )
        num_bytes = int(np.prod(shape, dtype=object)) // block * block_bytes
        if offset + num_bytes > self.size:
            raise CheckpointError(
                f"{self.path}: truncated: tensor {name!r} ends at byte {offset + num_bytes}, the "
                f"file at {self.size}; download it again"
            )
        return TensorInfo(name, shape, kind, offset, num_bytes)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        dims = self.number("<I")
        if not 1 <= dims <= 4:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {dims} axes, not 1 to 4")
        shape = tuple(self.number("<Q") for _ in range(dims))[::-1]
        return name, shape, self.number("<I"), self.number("<Q")

    def value(self, type_: int) -> Any:
        kind = self.kind(type_)
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is GGUFValueType.ARRAY:
            return self.array()
        return np.frombuffer(self.take(_SCALARS[kind].itemsize), _SCALARS[kind])[0].item()

    def array(self) -> Any:
        type_, count = self.number("<I"), self.number("<Q")
        kind = self.kind(type_)
        if kind in _SCALARS:
            return np.frombuffer(self.take(count * _SCALARS[kind].itemsize), _SCALARS[kind])
        if kind is GGUFValueType.STRING:
            return self.strings(count)
        return [self.value(type_) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """Like `count` calls of `string`, in a tight loop: vocabularies are long."""
        read, length = self.file.read, struct.Struct("<Q").unpack
        values = []
        try:
            for _ in range(count):
                size = length(read(8))[0]
                data = read(size) if size <= self.size else b""
                if len(data) < size:
                    raise self.truncated()
                values.append(data.decode("utf-8", errors="replace"))
        except struct.error:
            raise self.truncated() from None
        return values

    def kind(self, type_: int) -> GGUFValueType:
        try:
            return GGUFValueType(type_)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: {self.place} has the unknown value type {type_}"
            ) from None

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def number(self, format_: str) -> int:
        value: int = struct.unpack(format_, self.take(struct.calcsize(format_)))[0]
        return value

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) < count:
            raise self.truncated()
        return data

    def truncated(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: truncated: it ends inside {self.place}; download it again"
        )
