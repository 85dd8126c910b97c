"""A tensor that lies in several pieces, as the ranks of a training job saved their shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.tensor import Array, FileTensor, StoredTensor


@dataclass(frozen=True)
class Chunk:
    """A piece: where it begins in the whole, how much of it counts, and its values.

    `sizes` may be less than the tensor's own along an axis (a padded last chunk).
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: FileTensor

    def slab(self, index: int) -> Chunk:
        """The piece of the whole's slab that a global index of axis 0 picks."""
        tensor = self.tensor.slab(index - self.offsets[0])
        return Chunk(self.offsets[1:], self.sizes[1:], tensor)


@dataclass(frozen=True)
class ChunkedTensor(StoredTensor):
    """A tensor put together of chunks that cover it exactly; see `join`."""

    chunks: tuple[Chunk, ...]
    dtype: np.dtype[np.generic]

    def fetch(self, start: int, stop: int) -> Array:
        out = np.empty((stop - start, self.width), self.dtype)
        for chunk in self.chunks:
            first = chunk.offsets[0]
            low, high = max(start, first), min(stop, first + chunk.sizes[0])
            if low >= high:
                continue
            rows = slice(low - first, high - first)
            if len(self.stored) == 1:
                chunk.tensor.read(out[low - start : high - start, 0], rows, slice(None), False)
                continue
            left, width = chunk.offsets[1], chunk.sizes[1]
            target = out[low - start : high - start, left : left + width]
            chunk.tensor.read(target, rows, slice(0, width), False)
        return out

    def slab(self, index: int) -> ChunkedTensor:
        chunks = tuple(
            chunk.slab(index)
            for chunk in self.chunks
            if chunk.offsets[0] <= index < chunk.offsets[0] + chunk.sizes[0]
        )
        return replace(self, stored=self.stored[1:], chunks=chunks)


def join(where: str, shape: tuple[int, ...], chunks: list[Chunk]) -> StoredTensor:
    """The tensor of this shape that chunks make up; raises CheckpointError unless they cover it
    exactly, each value once, all of one dtype."""
    dtypes = {chunk.tensor.fetch(0, 0).dtype for chunk in chunks}
    if len(dtypes) != 1:
        raise CheckpointError(f"{where}: its pieces have dtypes {sorted(map(str, dtypes))}")
    for chunk in chunks:
        ranks = {len(shape), len(chunk.offsets), len(chunk.sizes), len(chunk.tensor.shape)}
        if len(ranks) != 1 or any(
            not 0 <= offset <= offset + size <= whole or size > own
            for offset, size, whole, own in zip(
                chunk.offsets, chunk.sizes, shape, chunk.tensor.shape, strict=True
            )
        ):
            raise CheckpointError(
                f"{where}: a piece of {list(chunk.tensor.shape)} at {list(chunk.offsets)} does not "
                f"fit into {list(shape)}"
            )
    begins = np.array([chunk.offsets for chunk in chunks], np.int64)
    ends = begins + np.array([chunk.sizes for chunk in chunks], np.int64)
    for i in range(len(chunks)):
        if ((begins[:i] < ends[i]) & (begins[i] < ends[:i])).all(axis=1).any():
            raise CheckpointError(f"{where}: two pieces overlap")
    if sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise CheckpointError(f"{where}: pieces are missing; copy the checkpoint again")
    if len(chunks) == 1 and chunks[0].tensor.shape == shape:
        return chunks[0].tensor
    return ChunkedTensor(shape, chunks=tuple(chunks), dtype=dtypes.pop())
