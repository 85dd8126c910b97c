"""Quantized tensors as checkpoints store them, whichever tool wrote them.

A linear layer's weight is several tensors then: codes, scales, maybe zeros, maybe an order of the
inputs. `QuantizedTensor` offers them as one weight `[out, in]`, by slices, with codes as signed
integers (or float8 bits) and zeros to match; a subclass a layout knows how they are stored.
`Quantization` is what a model's config says of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.quantization import Scheme
from tensorray.kernels.quantized import QuantizedWeight, dequantize_rows, pack_int4

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
#: Dtypes that scales come in.
SCALES = ("float32", "float16", "bfloat16", "float64")

#: Codes that are unpacked at a time: some megabytes, while they are.
PIECE_CODES = 1 << 21


class Files(Protocol):
    """The tensors of a checkpoint as they are stored (tensor.TensorCheckpoint)."""

    path: Path

    def has(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype[Any]: ...

    def file(self, name: str) -> Path: ...

    def read(
        self, name: str, out: NDArray[Any], rows: slice, columns: slice, transpose: bool = False
    ) -> None: ...


@dataclass(frozen=True)
class Stored:
    """What one of a weight's tensors has to be: one of some shapes, of one of some dtypes."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


class QuantizedTensor(ABC):
    """One linear layer's weight, `[out, in]`."""

    #: Whether rows of the file run along the inputs, so that cutting those reads no row twice.
    by_inputs: bool = False

    def __init__(self, scheme: Scheme, shape: tuple[int, int]) -> None:
        self.scheme = scheme
        self.shape = shape

    @property
    def names(self) -> list[str]:
        """The tensors of the checkpoint that it consists of."""
        return []

    def missing(self) -> list[str]:
        """Those of them that are not there."""
        return []

    def wrong(self) -> list[str]:
        """What is wrong with those that are."""
        return []

    @property
    def group(self) -> int:
        return self.scheme.group or self.shape[1]

    @property
    def count(self) -> int:
        """Groups of a row."""
        return -(-self.shape[1] // self.group)

    @abstractmethod
    def codes(self, rows: slice, columns: slice) -> NDArray[Any]:
        """int8 for the integer kinds, bits as uint8 for float8."""

    @abstractmethod
    def scales(self, rows: slice, groups: slice) -> NDArray[np.float32]: ...

    def zeros(self, rows: slice, groups: slice) -> NDArray[np.int8]:
        """The zeros of a scheme that has them."""
        raise AssertionError(f"{self.scheme} has no zeros")

    def groups(self) -> NDArray[np.int32]:
        """Of an ordered scheme, the group of each input, `[in]`."""
        raise AssertionError(f"{self.scheme} has no order")

    def cuts(self, rows: slice, columns: slice) -> list[tuple[slice, slice]]:
        """A slice in pieces of bounded size, cut along the file's rows."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if self.by_inputs:
            step = max(8, PIECE_CODES // max(1, height) // 8 * 8)
            return [(rows, cut) for cut in _steps(columns, step)]
        return [(cut, columns) for cut in _steps(rows, max(1, PIECE_CODES // max(1, width)))]

    def read(self, out: NDArray[Any], rows: slice, columns: slice) -> None:
        """Fill a plain array with a slice, dequantized."""
        by_column = self.groups() if self.scheme.ordered else None
        for some_rows, some in self.cuts(rows, columns):
            codes = self.codes(some_rows, some)
            weight = QuantizedWeight(
                self.scheme.kind,
                self.group,
                pack_int4(_even(codes)) if self.scheme.kind == "int4" else codes,
                self.scales(some_rows, slice(0, self.count)),
                self.zeros(some_rows, slice(0, self.count)) if self.scheme.zeros else None,
                groups=_even(self._group_of(by_column, some))
                if self.scheme.kind == "int4"
                else self._group_of(by_column, some),
            )
            values = dequantize_rows(weight, 0, len(codes))[:, : some.stop - some.start]
            first_row, first_column = some_rows.start - rows.start, some.start - columns.start
            height, width = values.shape
            out[first_row : first_row + height, first_column : first_column + width] = values

    def _group_of(self, by_column: NDArray[np.int32] | None, columns: slice) -> NDArray[np.int32]:
        if by_column is not None:
            return by_column[columns]
        return (np.arange(columns.start, columns.stop) // self.group).astype(np.int32)


class FileTensors(QuantizedTensor):
    """A weight in the files of a checkpoint, under the name of its module."""

    def __init__(self, files: Files, module: str, scheme: Scheme, shape: tuple[int, int]) -> None:
        super().__init__(scheme, shape)
        self._files = files
        self._module = module

    @abstractmethod
    def stored(self) -> dict[str, Stored]:
        """What it consists of, by suffix (".qweight")."""

    @property
    def names(self) -> list[str]:
        return [self._module + suffix for suffix in self.stored()]

    def missing(self) -> list[str]:
        return [name for name in self.names if not self._files.has(name)]

    def wrong(self) -> list[str]:
        found = []
        for suffix, expected in self.stored().items():
            name = self._module + suffix
            if not self._files.has(name):
                continue
            where = f"{self._files.file(name)}: tensor {name!r} has"
            shape, dtype = self._files.shape(name), self._files.dtype(name).name
            if shape not in expected.shapes:
                shapes = " or ".join(str(list(each)) for each in expected.shapes)
                found.append(f"{where} shape {list(shape)}, but by its config it needs {shapes}")
            if dtype not in expected.dtypes:
                found.append(f"{where} dtype {dtype}, but needs {' or '.join(expected.dtypes)}")
        return found

    def fetch(self, suffix: str, dtype: Any, rows: slice, columns: slice) -> NDArray[Any]:
        """A slice of one of the tensors."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        out = np.empty((height, width), dtype)
        self._files.read(self._module + suffix, out, rows, columns)
        return out

    def fetch_all(self, suffix: str, dtype: Any) -> NDArray[Any]:
        """The whole of a small tensor, in its own shape."""
        name = self._module + suffix
        shape = self._files.shape(name)
        out = np.empty(shape, dtype)
        whole = slice(0, shape[0]), slice(0, shape[1] if len(shape) > 1 else None)
        self._files.read(name, out, *whole)
        return out

    def error(self, suffix: str, problem: str) -> CheckpointError:
        name = self._module + suffix
        return CheckpointError(f"{self._files.file(name)}: tensor {name!r} {problem}")


class Ordered(FileTensors):
    """A weight whose inputs say which group they belong to, in a tensor of their own."""

    groups_suffix = ".g_idx"

    @cached_property
    def _groups(self) -> NDArray[np.int32]:
        groups: NDArray[np.int32] = self.fetch_all(self.groups_suffix, np.int32)
        if groups.min() < 0 or groups.max() >= self.count:
            raise self.error(self.groups_suffix, f"names groups outside 0 to {self.count - 1}")
        return groups

    def groups(self) -> NDArray[np.int32]:
        return self._groups


class Quantization(ABC):
    """A checkpoint's `quantization_config`."""

    def __init__(self, where: str) -> None:
        self.where = where  # for messages

    @abstractmethod
    def scheme(self, module: str) -> Scheme | None:
        """A linear layer's scheme as far as the config tells; the files may know better."""

    @abstractmethod
    def tensor(self, files: Files, module: str, shape: tuple[int, int]) -> FileTensors | None:
        """A linear layer's weight `[out, in]` if it is quantized in the files."""

    def notes(self, names: Iterable[str]) -> list[str]:
        """What a user should know of what is left out, given the names of all tensors."""
        notes = []
        if any(name.endswith(KV_SCALES) for name in names):
            notes.append(
                "its scales for a quantized KV cache are not used: an 8-bit cache has none here"
            )
        if any(name.endswith(INPUT_SCALES) for name in names):
            notes.append(
                "its scales for quantized activations are not used: only weights are quantized, "
                "activations keep their precision"
            )
        return notes

    def refusal(self, what: str, supported: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {what} is not supported; supported: {supported}. "
            "Use a checkpoint quantized so, the unquantized model, or a GGUF file of it"
        )


KV_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".k_zero_point", ".v_zero_point", ".q_scale")
INPUT_SCALES = (".input_scale", ".input_zero_point", ".activation_scale", ".output_scale")
#: Tensors of quantized checkpoints that nothing reads: the above, and what is known without them.
IGNORED = (*KV_SCALES, *INPUT_SCALES, ".weight_shape", ".g_idx")


def unpack(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Unsigned codes of 4 or 8 bits, the first in the lowest bits: `[..., n]` ->
    `[..., n * 32 / bits]`."""
    codes = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return codes
    codes = codes.repeat(2, axis=-1)
    codes[..., 0::2] &= 15
    codes[..., 1::2] >>= 4
    return codes


def signed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """Unsigned codes with their middle moved to 0."""
    moved: NDArray[np.int8] = (codes - np.uint8(1 << (bits - 1))).view(np.int8)
    return moved


def word_span(span: slice, per_word: int) -> tuple[slice, slice]:
    """The words that hold a span of codes, and the span within what they hold."""
    first, last = span.start // per_word, -(-span.stop // per_word)
    start = span.start - first * per_word
    return slice(first, last), slice(start, start + span.stop - span.start)


def _steps(span: slice, step: int) -> list[slice]:
    return [
        slice(start, min(start + step, span.stop)) for start in range(span.start, span.stop, step)
    ]


def _even(array: NDArray[Any]) -> NDArray[Any]:
    """With one column more if their number is odd."""
    if array.shape[-1] % 2 == 0:
        return array
    return np.concatenate([array, array[..., -1:]], axis=-1)
