"""Safetensors files: one, or shards under an index (huggingface/safetensors' format).

A file is eight bytes (the header's length), a JSON header, then the tensors' bytes. Everything
the header claims is checked against the file at open, before a byte of data is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.tensor import DataFile, FileTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_MAX_HEADER = 100_000_000  # the reference implementation's limit, in bytes

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The format's name of a dtype; raises CheckpointError if it has none."""
    for name, known in _DTYPES.items():
        if known == dtype:
            return name
    raise CheckpointError(f"safetensors files have no dtype {dtype}")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory in Hub layout, shards of an index included.

    Empty if there are none; raises CheckpointError if the index names a missing shard or several
    files come without an index.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        files = sorted({directory / file for file in read_index(directory / INDEX).values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{directory / INDEX}: {len(missing)} of {len(files)} shards missing: "
                f"{', '.join(missing)}; download the checkpoint again"
            )
        return files
    found = [
        file
        for file in sorted(directory.glob("*.safetensors"))
        if not file.name.startswith(("consolidated", "adapter_"))
    ]
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: {len(found)} safetensors files but neither {SINGLE} nor {INDEX}; "
            f"add the index, or keep one file"
        )
    return found


def read_index(path: Path) -> dict[str, str]:
    """An index's weight map: tensor name -> file name."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors index: {error!r}") from error
    for name, file in files.items():
        if Path(file).name != file:
            raise CheckpointError(f"{path}: tensor {name!r}: {file!r} is not a plain file name")
    return files


def open_tensors(directory: Path) -> dict[str, FileTensor]:
    """All tensors of a directory's safetensors files, by the files' own names, headers checked."""
    tensors: dict[str, FileTensor] = {}
    for path in weight_files(directory):
        for name, tensor in read_header(DataFile(path)).items():
            if name in tensors:
                other = tensors[name].file.path
                raise CheckpointError(f"{path}: tensor {name!r} is in {other.name} as well")
            tensors[name] = tensor
    if not (directory / SINGLE).is_file() and (directory / INDEX).is_file():
        for name, file in read_index(directory / INDEX).items():
            if name not in tensors:
                raise CheckpointError(f"{directory / file}: tensor {name!r} of {INDEX} is missing")
    return tensors


def read_header(file: DataFile) -> dict[str, FileTensor]:
    """A file's tensors. Raises CheckpointError naming file and tensor if anything is off."""
    path = file.path
    if file.size < 8:
        raise CheckpointError(f"{path}: not a safetensors file: {file.size} bytes only")
    length = int(file.read(0, 8).view("<u8")[0])
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path}: not a safetensors file: its header claims {length} bytes")
    start = 8 + length
    if start > file.size:
        raise CheckpointError(
            f"{path}: truncated inside the header: {file.size} bytes of at least {start}; "
            f"download it again"
        )
    try:
        header = json.loads(file.read(8, length).tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _tensor(file, start, name, entry) for name, entry in header.items()}


def _tensor(file: DataFile, start: int, name: str, entry: Any) -> FileTensor:
    where = f"{file.path}: tensor {name!r}"
    try:
        kind = str(entry["dtype"])
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: malformed header entry: {error!r}") from error
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise CheckpointError(f"{where}: dtype {kind!r} is not supported ({', '.join(_DTYPES)})")
    if min(shape, default=0) < 0 or not 0 <= begin <= end:
        raise CheckpointError(f"{where}: impossible shape {shape} or offsets {begin}..{end}")
    if prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(
            f"{where}: {end - begin} bytes of data for shape {list(shape)} of {kind}"
        )
    if start + end > file.size:
        raise CheckpointError(
            f"{where}: truncated: it ends at byte {start + end}, the file at {file.size}; "
            f"download it again"
        )
    width = shape[-1] if len(shape) > 1 else 1
    return FileTensor(
        stored=shape or (1,),
        file=file,
        offset=start + begin,
        row_bytes=width * dtype.itemsize,
        decode=partial(_view, dtype),
    )


def _view(dtype: np.dtype[Any], data: NDArray[np.uint8]) -> NDArray[Any]:
    return data.view(dtype)
