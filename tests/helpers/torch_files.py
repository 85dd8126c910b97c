"""Files in torch.save's and its trainers' layouts, written without torch.

The pickle is written opcode by opcode, as torch's: protocol 2, storages as persistent ids.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


class Global:
    """An importable name that is pickled as such, whether or not it can be imported."""

    def __init__(self, name: str) -> None:
        self.module, _, self.name = name.rpartition(".")


class Call:
    """What is pickled as a call of a global, or with `new` as an object of a class."""

    def __init__(self, name: str, *arguments: Any, new: bool = False, state: Any = None) -> None:
        self.function, self.arguments = Global(name), arguments
        self.new, self.state = new, state


def encode(value: Any, storages: list[bytes] | None = None, protocol: int = 2) -> bytes:
    """A pickle of plain values, arrays, `Global`s and `Call`s."""
    out = bytearray(b"\x80" + bytes([protocol]))
    _encode(value, out, [] if storages is None else storages)
    return bytes(out + b".")


def _encode(value: Any, out: bytearray, storages: list[bytes]) -> None:
    if isinstance(value, np.ndarray):
        _encode_array(value, out, storages)
    elif isinstance(value, Global):
        out += b"c" + f"{value.module}\n{value.name}\n".encode()
    elif isinstance(value, Call):
        _encode(value.function, out, storages)
        _encode(value.arguments, out, storages)
        out += b"\x81" if value.new else b"R"
        if value.state is not None:
            _encode(value.state, out, storages)
            out += b"b"
    elif isinstance(value, dict):
        out += b"}("
        for key, item in value.items():
            _encode(key, out, storages)
            _encode(item, out, storages)
        out += b"u"
    elif isinstance(value, tuple | list):
        out += b"(" if isinstance(value, tuple) else b"]("
        for item in value:
            _encode(item, out, storages)
        out += b"t" if isinstance(value, tuple) else b"e"
    else:
        plain = pickle.dumps(value, protocol=2)
        end = plain.rindex(b"q\x00") if plain[2:3] in (b"X", b"U") else len(plain) - 1
        out += plain[2:end]


def _encode_array(array: Array, out: bytearray, storages: list[bytes]) -> None:
    """A tensor with a storage of its own; a transposed array keeps its strides."""
    order = array if array.flags.c_contiguous else array.T
    storages.append(order.tobytes())
    kind = Global(f"torch.{_STORAGES[array.dtype.name]}")
    Global_v2 = Global("torch._utils._rebuild_tensor_v2")
    _encode(Global_v2, out, storages)
    out += b"("
    _encode(("storage", kind, str(len(storages) - 1), "cpu", array.size), out, storages)
    out += b"Q"
    strides = tuple(n // array.itemsize for n in array.strides)
    for item in (0, array.shape, strides, False, Call("collections.OrderedDict")):
        _encode(item, out, storages)
    out += b"tR"


def torch_bytes(value: Any, *, pickled: bytes | None = None) -> bytes:
    """A file of torch.save; `pickled` takes the place of the value's own pickle."""
    storages: list[bytes] = []
    data = encode(value, storages)
    entries = {"archive/data.pkl": pickled or data, "archive/byteorder": b"little"}
    entries |= {f"archive/data/{i}": storage for i, storage in enumerate(storages)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_dist(folder: Path, pieces: dict[str, list[tuple[tuple[int, ...], Array]]]) -> None:
    """A distributed checkpoint of PyTorch: by tensor, pieces at their offsets, one file a piece."""
    at = "torch.distributed.checkpoint.metadata."
    folder.mkdir(parents=True)
    tensors: dict[str, Any] = {"extra._extra_state": Call(at + "BytesStorageMetadata", new=True)}
    places: list[Any] = []
    size = Global("torch.Size")
    for name, chunks in pieces.items():
        ends = [np.add(offset, array.shape) for offset, array in chunks]
        shape = tuple(int(n) for n in np.max(ends, axis=0))
        found = []
        for offset, array in chunks:
            file = f"__{len(places)}_0.distcp"
            content = torch_bytes(array)
            (folder / file).write_bytes(b"before" + content)
            state: dict[str, Any] = {"offsets": _sized(size, offset)}
            state["sizes"] = _sized(size, array.shape)
            found.append(Call(at + "ChunkStorageMetadata", new=True, state=state))
            index = {"fqn": name, "offset": _sized(size, offset), "index": 0}
            info = {"relative_path": file, "offset": 6, "length": len(content)}
            place = "torch.distributed.checkpoint.filesystem._StorageInfo"
            places.append(
                (
                    Call(at + "MetadataIndex", new=True, state=index),
                    Call(place, new=True, state=info),
                )
            )
        entry = {"size": _sized(size, shape), "chunks": found, "properties": None}
        tensors[name] = Call(at + "TensorStorageMetadata", new=True, state=entry)
    whole = {"state_dict_metadata": tensors, "storage_data": dict(places)}
    (folder / ".metadata").write_bytes(encode(Call(at + "Metadata", new=True, state=whole)))


def _sized(size: Global, values: tuple[int, ...]) -> Call:
    return Call(f"{size.module}.{size.name}", tuple(values))


def zarr(folder: Path, array: Array, chunks: tuple[int, ...]) -> None:
    """An array of Zarr version 2 as Megatron Core writes it, last chunks padded."""

    folder.mkdir(parents=True)
    dtype = "bfloat16" if array.dtype.name == "bfloat16" else array.dtype.str
    meta = {"zarr_format": 2, "shape": array.shape, "chunks": chunks, "dtype": dtype}
    meta |= {"compressor": None, "filters": None, "order": "C", "fill_value": None}
    (folder / ".zarray").write_text(json.dumps(meta))
    counts = [-(-size // chunk) for size, chunk in zip(array.shape, chunks, strict=True)]
    for place in product(*map(range, counts)):
        full = np.zeros(chunks, array.dtype)
        cut = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, chunks, strict=True))
        piece = array[cut]
        full[tuple(slice(0, n) for n in piece.shape)] = piece
        (folder / ".".join(map(str, place))).write_bytes(full.tobytes())


def local_header_offset(content: bytes, name: str) -> int:
    """Where an entry's header begins in a zip archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.getinfo(name).header_offset


def point_entry_at(content: bytes, name: str, offset: int) -> bytes:
    """The archive with an entry's place in its directory changed."""
    at = content.index(b"PK\x01\x02")
    while content[at : at + 4] == b"PK\x01\x02":
        lengths = struct.unpack_from("<HHH", content, at + 28)
        if content[at + 46 : at + 46 + lengths[0]] == name.encode():
            return content[: at + 42] + struct.pack("<I", offset) + content[at + 46 :]
        at += 46 + sum(lengths)
    raise KeyError(name)
