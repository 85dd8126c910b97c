"""Files that torch.save wrote: tensors read in place, the pickle beside them never run.

A file is a zip archive of uncompressed entries (pytorch.org/docs/stable/notes/serialization.html):
`NAME/data.pkl`, a pickle in which a storage is a persistent id ("storage", type, key, device,
numel), and `NAME/data/KEY`, the storages' bytes. `unpickle` admits what rebuilds tensors and a few
names that state dicts mention.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint import safetensors
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.extents import Extent, ExtentReader, whole
from tensorray.builder.checkpoint.tensor import FileTensor
from tensorray.builder.checkpoint.unpickle import Global, Maker, record, unpickle

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

_MAX_ENTRIES = 1_000_000
_MAX_VALUES = 1_000_000  # containers and values that are looked at for tensors
_MAX_DEPTH = 16

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")

#: Globals that only stand for themselves.
NAMES = (*_STORAGES, *_UNTYPED, *(f"torch.{name}" for name in DTYPES))

#: Wrappings of a state dict in a training checkpoint.
_WRAPPINGS = ("state_dict", "model_state_dict", "model", "module")


def _size(values: tuple[int, ...] = ()) -> tuple[int, ...]:
    return tuple(values)


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    if pairs:
        raise ValueError("an OrderedDict of pairs")  # torch fills them item by item
    return {}


#: Globals that may be called, of torch's own that describe tensors.
MAKERS: dict[str, Maker] = {
    "collections.OrderedDict": _dict,
    "torch.Size": _size,
    "torch.device": record("torch.device"),
    # What Transformer Engine keeps beside weights (_extra_state), as bytes.
    "_io.BytesIO": record("_io.BytesIO"),
    "_codecs.encode": record("_codecs.encode"),
}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None  # None: bytes


def is_zip(extent: Extent) -> bool:
    """Whether a file is what torch.save writes since PyTorch 1.6."""
    return extent.size >= 4 and extent.read(0, 4) == b"PK\x03\x04"


def open_tensors(directory: Path) -> dict[str, FileTensor]:
    """All tensors of a directory's pytorch_model.bin, or of its shards under an index.

    Empty if there are none; raises CheckpointError for missing shards and for anything that is
    no plain state dict.
    """
    paths = [directory / SINGLE] if (directory / SINGLE).is_file() else []
    if not paths and (directory / INDEX).is_file():
        names = sorted(set(safetensors.read_index(directory / INDEX).values()))
        paths = [directory / name for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{directory / INDEX}: {len(missing)} of {len(paths)} shards missing: "
                f"{', '.join(missing)}; download the checkpoint again"
            )
    tensors: dict[str, FileTensor] = {}
    for path in paths:
        for name, tensor in state_dict(whole(path)).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in another shard as well")
            tensors[name] = tensor
    return tensors


def state_dict(extent: Extent) -> dict[str, FileTensor]:
    """A file's tensors by their names in its state dict, which a training checkpoint may wrap.

    Raises CheckpointError for what is not a state dict, UnsafePickleError for what is not data.
    """
    value = load(extent)
    for _ in range(4):
        inner = (
            next((value[key] for key in _WRAPPINGS if isinstance(value.get(key), dict)), None)
            if isinstance(value, dict) and not _has_tensors(value)
            else None
        )
        if inner is None:
            break
        value = inner
    if not isinstance(value, dict):
        raise CheckpointError(f"{extent.where}: not a state dict but a {type(value).__name__}")
    tensors: dict[str, FileTensor] = {}
    for name, tensor in _walk(value, extent.where):
        if name in tensors:
            raise CheckpointError(f"{extent.where}: two tensors are named {name!r}")
        tensors[name] = tensor
    if not tensors:
        raise CheckpointError(f"{extent.where}: no tensors in it")
    return tensors


def _has_tensors(value: dict[Any, Any]) -> bool:
    return any(isinstance(item, FileTensor) for item in value.values())


def _walk(value: dict[Any, Any], where: str) -> Iterator[tuple[str, FileTensor]]:
    """Tensors in nested dicts, names joined by dots."""
    seen = 0
    waiting: list[tuple[str, dict[Any, Any], int]] = [("", value, 0)]
    while waiting:
        prefix, mapping, depth = waiting.pop()
        seen += len(mapping) + 1
        if seen > _MAX_VALUES or depth > _MAX_DEPTH:
            raise CheckpointError(f"{where}: nested without end")
        for key, item in mapping.items():
            if isinstance(item, FileTensor) and isinstance(key, str):
                yield prefix + key, item
            elif isinstance(item, dict) and isinstance(key, str):
                waiting.append((f"{prefix}{key}.", item, depth + 1))


def load(extent: Extent) -> Any:
    """The value torch.save was given, tensors as FileTensors (data unread, shapes checked)."""
    entries = _entries(extent)
    pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{extent.where}: not a file of torch.save: no data.pkl in it")
    prefix = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{prefix}byteorder")
    if order is not None and order.read(0, min(order.size, 16)) != b"little":
        raise CheckpointError(f"{extent.where}: saved on a big-endian machine; save it on another")

    def rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> FileTensor:
        return _tensor(extent.where, prefix, entries, storage, offset, shape, strides)

    def rebuild_untyped(*arguments: Any) -> FileTensor:
        storage, offset, shape, strides, _, _, dtype, *_ = arguments
        return _tensor(extent.where, prefix, entries, storage, offset, shape, strides, dtype)

    makers: dict[str, Maker] = {
        **MAKERS,
        "torch._utils._rebuild_tensor_v2": rebuild,
        "torch._utils._rebuild_tensor_v3": rebuild_untyped,
        "torch._utils._rebuild_parameter": _parameter,
    }
    pickle = entries[pickles[0]]
    return unpickle(pickle.read(0, pickle.size), extent.where, makers, NAMES, _storage)


def _entries(extent: Extent) -> dict[str, Extent]:
    """The archive's entries, all uncompressed, none twice, none overlapping another."""
    where = extent.where
    if not is_zip(extent):
        raise CheckpointError(
            f"{where}: not a zip archive, so damaged, or saved by a PyTorch before 1.6 (its old "
            f"format is a pickle through and through); save it again: in a process that trusts "
            f"it, torch.save(torch.load(FILE, weights_only=True), NEW)"
        )
    try:
        with zipfile.ZipFile(io.BufferedReader(ExtentReader(extent))) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError) as error:
        raise CheckpointError(
            f"{where}: truncated or damaged: {error}; copy or download it again"
        ) from error
    if len(infos) > _MAX_ENTRIES:
        raise CheckpointError(f"{where}: an archive of {len(infos)} entries")
    found: dict[str, Extent] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(f"{where}: {name!r} is compressed, which torch.save never does")
        if info.flag_bits & 1:
            raise CheckpointError(f"{where}: {name!r} is encrypted")
        if info.header_offset < end:
            raise CheckpointError(f"{where}: {name!r} overlaps the entry before it")
        header = extent.read(info.header_offset, 30)
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        start = info.header_offset + 30 + name_length + extra_length
        if header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{where}: {name!r} is not where the archive says")
        if name in found:
            raise CheckpointError(f"{where}: {name!r} is in the archive twice")
        found[name] = extent.part(start, info.file_size)
        end = start + info.file_size
    return found


def _storage(key: Any) -> _Storage:
    kind, storage, name, _, _ = key
    if kind != "storage" or not isinstance(storage, Global) or not isinstance(name, str):
        raise ValueError("a persistent id that is no storage")
    if storage.name not in _UNTYPED and storage.name not in _STORAGES:
        raise ValueError(f"{storage.name} is no storage")
    return _Storage(name, _STORAGES.get(storage.name))


def _parameter(tensor: Any, *_: Any) -> FileTensor:
    if not isinstance(tensor, FileTensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


def _tensor(
    where: str,
    prefix: str,
    entries: dict[str, Extent],
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    dtype: Global | None = None,
) -> FileTensor:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    kind = dtype.name.removeprefix("torch.") if isinstance(dtype, Global) else storage.dtype
    if kind not in DTYPES:
        raise ValueError(f"a tensor of {kind}")
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape!r}, strides {strides!r}, offset {offset!r}")
    if len(shape) > 8 or max(numbers) > 1 << 48:
        raise ValueError(f"a tensor of shape {shape!r}, strides {strides!r}, offset {offset!r}")
    extent = entries.get(f"{prefix}data/{storage.key}")
    if extent is None:
        raise CheckpointError(f"{where}: there is no storage {storage.key!r}")
    transposed = len(shape) == 2 and not _contiguous(shape, strides)
    stored, steps = (shape[::-1], strides[::-1]) if transposed else (shape, strides)
    if not _contiguous(stored, steps):
        raise CheckpointError(
            f"{where}: a tensor of shape {shape} has strides {strides}; save it contiguous "
            f"(tensor.contiguous())"
        )
    numpy_dtype = DTYPES[kind]
    data = extent.part(offset * numpy_dtype.itemsize, prod(stored) * numpy_dtype.itemsize)
    return plain_tensor(data, stored, numpy_dtype, transposed=transposed)


def plain_tensor(
    data: Extent, shape: tuple[int, ...], dtype: np.dtype[Any], *, transposed: bool = False
) -> FileTensor:
    """A row-major tensor that is all of an extent; a scalar is known as `[1]`."""
    stored = tuple(shape) or (1,)
    if prod(stored) * dtype.itemsize != data.size:
        raise CheckpointError(f"{data.where}: {data.size} bytes for {list(shape)} of {dtype}")
    width = stored[-1] if len(stored) > 1 else 1
    return FileTensor(
        stored=stored,
        file=data.file,
        offset=data.start,
        row_bytes=width * dtype.itemsize,
        decode=partial(_view, dtype),
        transposed=transposed,
    )


def _view(dtype: np.dtype[Any], data: NDArray[np.uint8]) -> NDArray[Any]:
    return data.view(dtype)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if 0 in shape:
        return True
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True
