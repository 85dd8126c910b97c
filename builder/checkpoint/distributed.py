"""Distributed checkpoints: each tensor in pieces, as the ranks of a training job saved them.

Two layouts: PyTorch's (torch.distributed.checkpoint, Megatron Core's "torch_dist"): `.metadata`, a
pickle that says which range of which `.distcp` file holds which piece, each piece a file of
torch.save on its own; and Zarr's (version 2 of the format, Megatron Core's "zarr"): a folder a
tensor, `.zarray` in JSON and a raw file a chunk.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import numpy as np

from tensorray.builder.checkpoint import torch_file
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.chunked import Chunk, join
from tensorray.builder.checkpoint.extents import Extent
from tensorray.builder.checkpoint.tensor import FileTensor, StoredTensor
from tensorray.builder.checkpoint.unpickle import Maker, Record, record, unpickle

METADATA = ".metadata"
ZARR = ".zarray"

_MAX_CHUNKS = 1_000_000

_DCP = "torch.distributed.checkpoint.metadata."
_RECORDS = (
    *(
        _DCP + name
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib.Path",
    "pathlib._local.PosixPath",
)
_MAKERS: dict[str, Maker] = {**torch_file.MAKERS, **{name: record(name) for name in _RECORDS}}


def open_torch_dist(files: dict[str, Extent], folder: str) -> dict[str, StoredTensor]:
    """The tensors of a folder (a prefix of `files`, with its slash) that holds `.metadata`."""
    source = files[folder + METADATA]
    metadata = unpickle(source.read(0, source.size), source.where, _MAKERS, torch_file.NAMES)
    try:
        return _tensors(files, folder, source.where, metadata)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source.where}: not as PyTorch writes it: {error!r}") from error


def _tensors(
    files: dict[str, Extent], folder: str, where: str, metadata: Record
) -> dict[str, StoredTensor]:
    places: dict[tuple[str, tuple[int, ...]], Record] = {}
    for index, place in metadata.get("storage_data").items():
        offset = index.get("offset")
        places[index.get("fqn"), tuple(offset or ())] = place
    tensors = {}
    for name, entry in metadata.get("state_dict_metadata").items():
        if not isinstance(entry, Record) or not entry.kind.endswith(".TensorStorageMetadata"):
            continue  # bytes: an optimizer's or a layer's other state
        shape = tuple(entry.get("size"))
        found = []
        for chunk in entry.get("chunks"):
            offsets, sizes = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
            place = places.get((name, offsets))
            if place is None:
                raise CheckpointError(f"{where}: nothing says where {name!r} at {offsets} lies")
            tensor = _piece(files, folder, where, place)
            if tensor.shape != (sizes or (1,)):
                raise CheckpointError(
                    f"{where}: {name!r} at {offsets}: a piece of {sizes}, but its file holds "
                    f"{tensor.shape}"
                )
            found.append(Chunk(offsets or (0,), sizes or (1,), tensor))
        tensors[name] = join(f"{where}: tensor {name!r}", shape or (1,), found)
    return tensors


def _piece(files: dict[str, Extent], folder: str, where: str, place: Record) -> FileTensor:
    if place.get("transform_descriptors"):
        raise CheckpointError(
            f"{where}: pieces are transformed ({place.get('transform_descriptors')}); save the "
            f"checkpoint without compression"
        )
    path = place.get("relative_path")
    file = files.get(f"{folder}{path}")
    if file is None:
        raise CheckpointError(f"{where}: {path!r} is missing; copy the checkpoint again")
    tensor = torch_file.load(file.part(place.get("offset"), place.get("length")))
    if not isinstance(tensor, FileTensor):
        raise CheckpointError(f"{file.where}: a piece is no tensor")
    return tensor


def zarr_folders(files: dict[str, Extent], folder: str) -> list[str]:
    """Names of the Zarr arrays right under a folder."""
    names = [path.removeprefix(folder) for path in files if path.startswith(folder)]
    return [name.removesuffix(f"/{ZARR}") for name in names if name.endswith(f"/{ZARR}")]


def open_zarr(files: dict[str, Extent], folder: str) -> dict[str, StoredTensor]:
    """The tensors of a folder that has a Zarr array a tensor."""
    return {name: _array(files, f"{folder}{name}/") for name in zarr_folders(files, folder)}


def _array(files: dict[str, Extent], at: str) -> StoredTensor:
    source = files[at + ZARR]
    meta = source.json()
    try:
        shape, chunks = tuple(meta["shape"]), tuple(meta["chunks"])
        kind, version = str(meta["dtype"]), meta["zarr_format"]
        separator = str(meta.get("dimension_separator") or ".")
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source.where}: not as Zarr writes it: {error!r}") from error
    for key, accepted in (("compressor", None), ("filters", None), ("order", "C")):
        if (meta.get(key) or accepted) != accepted:
            raise CheckpointError(
                f"{source.where}: {key} {meta[key]!r} is not supported, only {accepted!r}"
            )
    sizes = (*shape, *chunks)
    if version != 2 or len(shape) != len(chunks) or any(type(n) is not int for n in sizes):
        raise CheckpointError(f"{source.where}: not an array of Zarr version 2")
    if min(sizes, default=1) < 1:
        raise CheckpointError(f"{source.where}: impossible shape {shape} or chunks {chunks}")
    dtype = _zarr_dtype(source, kind)
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    if prod(counts) > _MAX_CHUNKS:
        raise CheckpointError(f"{source.where}: {prod(counts)} chunks")
    found = []
    for place in product(*map(range, counts)):
        file = files.get(at + (separator.join(map(str, place)) or "0"))
        if file is None:
            raise CheckpointError(f"{source.where}: chunk {place} is missing")
        offsets = tuple(i * chunk for i, chunk in zip(place, chunks, strict=True))
        fit = tuple(map(min, chunks, (s - o for s, o in zip(shape, offsets, strict=True))))
        tensor = torch_file.plain_tensor(file, chunks, dtype)
        found.append(Chunk(offsets or (0,), fit or (1,), tensor))
    return join(source.where, shape or (1,), found)


def _zarr_dtype(source: Extent, kind: str) -> np.dtype[Any]:
    if kind == "bfloat16":  # as Megatron Core spells it
        return torch_file.DTYPES["bfloat16"]
    try:
        dtype = np.dtype(kind)
    except TypeError as error:
        raise CheckpointError(f"{source.where}: unknown dtype {kind!r}") from error
    if dtype not in torch_file.DTYPES.values():
        raise CheckpointError(f"{source.where}: dtype {kind!r} is not supported")
    return dtype
