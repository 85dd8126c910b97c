"""How a checkpoint's tensors become those of Hugging Face's layout: rows taken, axes swapped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.tensor import StoredTensor

#: Bytes of a tensor in memory at a time, except for those that are transposed.
PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Source:
    """A tensor as the checkpoint has it, and how it is called there."""

    label: str
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.tensor.fetch(0, 0).dtype


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor to be written: rows of one source (None: all), then transposed if so said.

    `note` says in words which rows.
    """

    name: str
    source: Source
    rows: NDArray[np.intp] | None = None
    transpose: bool = False
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.source.shape
        if self.rows is not None:
            shape = (len(self.rows), *shape[1:])
        return shape[::-1] if self.transpose else shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def pieces(self) -> Iterator[NDArray[Any]]:
        """Its values, row-major, in runs of whole rows of at most about PIECE_BYTES."""
        count = self.source.shape[0] if self.rows is None else len(self.rows)
        per_row = max(1, self.nbytes // max(1, count))
        step = max(1, count if self.transpose else PIECE_BYTES // per_row)
        for start in range(0, count, step):
            piece = self._read(start, min(start + step, count))
            yield np.ascontiguousarray(piece.T) if self.transpose else piece

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *self.source.shape[1:]), self.dtype)
        tensor = self.source.tensor
        if self.rows is None:
            tensor.read(out, slice(start, stop), slice(None), False)
            return out
        wanted = self.rows[start:stop]
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        for run in np.split(np.arange(stop - start), breaks):
            first, last = int(wanted[run[0]]), int(wanted[run[-1]])
            out_run = out[run[0] : run[-1] + 1]
            tensor.read(out_run, slice(first, last + 1), slice(None), False)
        return out


@dataclass
class Conversion:
    """What a checkpoint becomes: its targets, a config.json, and what there is to say of it."""

    config: dict[str, Any]
    targets: dict[str, Target] = field(default_factory=dict)  # by name
    ignored: list[str] = field(default_factory=list)  # sources that serving has no use for
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, source: Source, **how: Any) -> None:
        """Add a target; raises CheckpointError if two sources give the same."""
        if name in self.targets:
            raise CheckpointError(
                f"{source.label} and {self.targets[name].source.label} both are {name}; the "
                f"checkpoint mixes two layouts"
            )
        self.targets[name] = Target(name, source, **how)


def head_rows(heads: int, groups: int, head_dim: int) -> tuple[NDArray[np.intp], ...]:
    """Rows of q, k and v in Megatron's fused projection.

    Rows come by query group: its query heads (heads / groups of them), its key, its value.
    """
    per_group = heads // groups
    rows = np.arange((heads + 2 * groups) * head_dim).reshape(groups, per_group + 2, head_dim)
    parts = rows[:, :per_group], rows[:, per_group], rows[:, per_group + 1]
    return tuple(part.reshape(-1) for part in parts)
