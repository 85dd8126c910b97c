"""Other trainers' checkpoints, turned into a directory that is served: safetensors, config.json.

`plan` finds out what a source is and how its tensors map; `write` copies them, a bounded piece at a
time. Nothing of a source is run: see `unpickle`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tensorray.builder.checkpoint import distributed, megatron, meta, safetensors, torch_file
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.config import CONFIG
from tensorray.builder.checkpoint.extents import Extent, list_files, whole
from tensorray.builder.checkpoint.mapping import Conversion, Source, Target
from tensorray.builder.checkpoint.safetensors import INDEX, SINGLE
from tensorray.builder.checkpoint.tensor import FileTensor, StoredTensor
from tensorray.builder.registry import resolve

#: Bytes of a file of the result, unless a tensor is larger.
SHARD_BYTES = 5_000_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONFIGS = ("model_config.yaml", "model.yaml", "params.json", CONFIG)
_CONSOLIDATED = re.compile(r"(^|/)consolidated\.\d+\.pth$")
#: Files that are copied beside the weights; a tokenizer's may have a prefix in a .nemo archive.
_COPIED = re.compile(
    r"^(?:[0-9a-f]{32}_)?(tokenizer\.model|tokenizer\.json|tokenizer_config\.json|vocab\.json|"
    r"merges\.txt|special_tokens_map\.json|added_tokens\.json|generation_config\.json|"
    r"chat_template\.jinja)$"
)
_MAX_COPIED = 256 << 20
_MAX_YAML = 16 << 20


@dataclass(frozen=True)
class Plan:
    """A conversion that is ready to be written, and the small files to be copied with it."""

    source: Path
    kind: str  # what the source was taken for
    conversion: Conversion
    copied: Mapping[str, Extent]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.conversion.targets.values())


def plan(source: Path, *, config: Path | None = None, vocab_size: int | None = None) -> Plan:
    """What converting a checkpoint would do; only headers are read.

    `source`: a .nemo archive or a directory it was unpacked into; a directory of a distributed
    checkpoint (NeMo 2, Megatron Core); Meta's directory; a state dict, or a directory of one in
    Hugging Face's layout. `config` takes the place of the source's own config; `vocab_size` cuts
    off rows that a trainer padded the vocabulary with. Raises CheckpointError saying what can't be
    read, and what to do.
    """
    files = _files(source)
    settings, where = _config(files, source, config)
    consolidated = sorted(name for name in files if _CONSOLIDATED.search(name))
    folder = _distributed_folder(files)
    if consolidated and folder is None:
        ranks = [torch_file.state_dict(files[name]) for name in consolidated]
        if not meta.is_meta(list(ranks[0])):
            raise CheckpointError(f"{source}: {consolidated[0]} is not in Meta's layout")
        kind, conversion = "Llama of Meta", meta.convert(ranks, settings, where, vocab_size)
    else:
        kind, tensors = _tensors(files, source, folder)
        if megatron.is_megatron(list(tensors)):
            conversion = megatron.convert(tensors, settings, where, vocab_size)
            kind = f"Megatron model in {kind}"
        elif "architectures" in settings:
            conversion = Conversion(dict(settings))
            for name, tensor in tensors.items():
                conversion.add(name, Source(name, tensor))
            return Plan(source, kind, conversion, _copied(files))
        else:
            names = ", ".join(list(tensors)[:5])
            raise CheckpointError(
                f"{source}: tensors of no layout known here ({names}); for those in Hugging "
                f"Face's names, add the model's {CONFIG}"
            )
    _check(conversion, source)
    return Plan(source, kind, conversion, _copied(files))


def write(
    job: Plan,
    target: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[Target], None] | None = None,
) -> None:
    """Write the result as a new directory; it appears when it is complete.

    `progress` is called with each tensor once it is written. Raises CheckpointError if `target`
    exists, and leaves nothing behind where it fails.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _write_weights(job, partial, shard_bytes, progress)
        text = json.dumps(job.conversion.config, indent=2)
        (partial / CONFIG).write_text(text + "\n", "utf-8")
        for name, extent in job.copied.items():
            (partial / name).write_bytes(extent.read(0, extent.size))
        refuse_existing(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(target: Path) -> None:
    """Raise CheckpointError if there is anything at the path."""
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: exists already; give a new path, nothing is overwritten")


def _files(source: Path) -> dict[str, Extent]:
    """The files of a source; those beside it, for a single file of weights."""
    if source.is_file() and source.suffix in _PICKLES:
        beside = (*_CONFIGS, "tokenizer.model", "tokenizer.json", "tokenizer_config.json")
        found = [source, *(source.parent / name for name in beside)]
        return {path.name: whole(path) for path in found if path.is_file()}
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or directory")
    return list_files(source)


def _config(
    files: dict[str, Extent], source: Path, given: Path | None
) -> tuple[dict[str, Any], str]:
    """The source's config, in whichever of its forms, and its name."""
    extent = whole(given) if given else None
    for name in _CONFIGS:
        places = [path for path in files if PurePosixPath(path).name == name]
        if extent is None and places:
            extent = files[min(places, key=len)]
    if extent is None:
        raise CheckpointError(
            f"{source}: no config: none of {', '.join(_CONFIGS)} is in it; give one with --config"
        )
    if extent.where.endswith(".json"):
        return extent.json(), extent.where
    try:
        if extent.size > _MAX_YAML:
            raise CheckpointError(f"{extent.where}: {extent.size} bytes of YAML")
        value = yaml.safe_load(extent.read(0, extent.size))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{extent.where}: not plain YAML: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{extent.where}: a mapping was expected")
    return value, extent.where


def _distributed_folder(files: dict[str, Extent]) -> str | None:
    """The folder of a distributed checkpoint, with its slash; None if there is none."""
    for path in sorted(files, key=len):
        if PurePosixPath(path).name == distributed.METADATA:
            return path.removesuffix(distributed.METADATA)
        if path.endswith(f"/{distributed.ZARR}"):
            return path.removesuffix(f"/{distributed.ZARR}").rpartition("/")[0] + (
                "/" if path.count("/") > 1 else ""
            )
    return None


def _tensors(
    files: dict[str, Extent], source: Path, folder: str | None
) -> tuple[str, dict[str, StoredTensor]]:
    """What a source is called, and its tensors by its own names."""
    if folder is not None:
        if folder + distributed.METADATA in files:
            return "a PyTorch distributed checkpoint", distributed.open_torch_dist(files, folder)
        return "a Zarr distributed checkpoint", distributed.open_zarr(files, folder)
    if source.is_dir():
        shards: Mapping[str, FileTensor] = torch_file.open_tensors(source)
        if shards:
            return "a state dict in Hugging Face's layout", dict(shards)
    names = [name for name in files if PurePosixPath(name).suffix in _PICKLES]
    weights = [name for name in names if PurePosixPath(name).name == "model_weights.ckpt"] or names
    if not weights:
        raise CheckpointError(
            f"{source}: no weights that can be converted: neither {torch_file.SINGLE}, "
            f"model_weights.ckpt, *.pt, *.pth nor a distributed checkpoint"
        )
    if len(weights) > 1:
        raise CheckpointError(
            f"{source}: {len(weights)} files of weights ({', '.join(weights[:3])}); if they are "
            f"shares of model-parallel ranks, save the model with tensor and pipeline parallel "
            f"sizes of 1, or as a distributed checkpoint; else give one of them"
        )
    return "a state dict", dict(torch_file.state_dict(files[weights[0]]))


def _copied(files: dict[str, Extent]) -> dict[str, Extent]:
    found: dict[str, Extent] = {}
    for path in sorted(files, key=len):
        match = _COPIED.match(PurePosixPath(path).name)
        if match and match[1] not in found and files[path].size <= _MAX_COPIED:
            found[match[1]] = files[path]
    return found


def _check(conversion: Conversion, source: Path) -> None:
    """Every tensor that the definition declares is there, in its shape."""
    model = resolve(conversion.config)(conversion.config)
    groups = [model.embed_weights(), model.head_weights()]
    groups += [model.layer_weights(layer) for layer in range(model.num_layers)]
    for group in groups:
        for weight in group.values():
            for part in weight.parts:
                target = conversion.targets.get(part.name)
                if target is None:
                    raise CheckpointError(f"{source}: nothing becomes {part.name}")
                if target.shape != part.shape:
                    raise CheckpointError(
                        f"{source}: {target.source.label} becomes {part.name} of "
                        f"{list(target.shape)}, but by its config it has {list(part.shape)}"
                    )


def _write_weights(
    job: Plan, directory: Path, shard_bytes: int, progress: Callable[[Target], None] | None
) -> None:
    shards: list[list[Target]] = [[]]
    size = 0
    for target in job.conversion.targets.values():
        if shards[-1] and size + target.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(shard, directory / name, progress)
        weight_map.update(dict.fromkeys((target.name for target in shard), name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": job.nbytes}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_shard(
    targets: list[Target], path: Path, progress: Callable[[Target], None] | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for target in targets:
        header[target.name] = {
            "dtype": safetensors.dtype_name(target.dtype),
            "shape": target.shape,
            "data_offsets": [end, end + target.nbytes],
        }
        end += target.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for target in targets:
            for piece in target.pieces():
                file.write(piece.tobytes())
            if progress:
                progress(target)
