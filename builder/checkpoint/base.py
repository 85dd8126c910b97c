"""What every checkpoint format offers: a config, named tensors, slices of them on demand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    from tensorray.builder.checkpoint.quantized import QuantizedTensor


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or not what its config says; names file and tensor."""


class Checkpoint(Protocol):
    """A model's files, opened but not read.

    Names and shapes are Hugging Face's whatever the format (a GGUF reader translates).
    """

    path: Path  # the directory, or the GGUF file
    config: dict[str, Any]  # as in config.json, text model's keys at the top level
    generation_config: dict[str, Any]  # as in generation_config.json; {} if there is none

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def file(self, name: str) -> Path:
        """The file that holds the tensor, for messages."""
        ...

    def read(
        self, name: str, out: NDArray[Any], rows: slice, columns: slice, transpose: bool
    ) -> None:
        """Fill `out` with a slice of the tensor, converted to out's dtype.

        `rows` and `columns` index axes 0 and 1 (columns is ignored for 1-D tensors; further axes
        are whole), after swapping the axes if `transpose`. Reads a bounded piece at a time, so no
        second copy of the tensor ever exists. Safe to call from several threads. Raises
        CheckpointError naming file and tensor.
        """
        ...

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedTensor | None:
        """The tensor ("….weight", `[out, in]`) if it is stored quantized, as several others."""
        ...

    def close(self) -> None: ...
