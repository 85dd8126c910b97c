"""Opening a model by path or Hub id, whatever its format."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tensorray.builder.checkpoint import gguf, pickles, safetensors, torch_file
from tensorray.builder.checkpoint.base import Checkpoint, CheckpointError
from tensorray.builder.checkpoint.config import CONFIG, read_config, read_generation_config
from tensorray.builder.checkpoint.dummy import DummyCheckpoint
from tensorray.builder.checkpoint.names import canonical_names
from tensorray.builder.checkpoint.quantization_config import read_quantization
from tensorray.builder.checkpoint.tensor import TensorCheckpoint

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]


@dataclass(frozen=True)
class ModelFiles:
    """A model's files but its weights: what an ingress needs.

    `path` is the local directory, or the GGUF file (the first, if it is split).
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()


def resolve_path(
    model: str,
    *,
    weights: bool = True,
    load_format: LoadFormat = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    progress: bool = False,
) -> Path:
    """Where a model lies on this machine: a directory in Hub layout, or a GGUF file.

    `model` is a path or a Hub id; a Hub model is fetched into the cache first, without `weights`
    only its small files. Raises CheckpointError saying what was tried and what to do.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _one_file(path, load_format)
    if path.is_dir():
        return _directory(path, load_format)
    if model.startswith(("/", ".", "~")) or "\\" in model:
        raise CheckpointError(
            f"{model}: no such file or directory (a Hub model is named as org/name)"
        )
    from tensorray.builder.checkpoint import hub  # takes a second to import

    path = hub.download(
        model,
        weights=weights and load_format != "dummy",
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        progress=progress,
    )
    return _one_file(path, load_format) if path.is_file() else path


def open_files(
    model: str,
    *,
    load_format: LoadFormat = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> ModelFiles:
    """A model's config and place, without fetching or opening its weights.

    Arguments and errors are `open_checkpoint`'s. (A GGUF file is one piece: it is there whole.)
    """
    path = resolve_path(
        model,
        weights=False,
        load_format=load_format,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        progress=progress,
    )
    overrides = hf_overrides or {}
    if path.is_file():
        config, generation_config = gguf.read_configs(path, overrides)
        return ModelFiles(path, config, generation_config)
    return ModelFiles(path, read_config(path, overrides), read_generation_config(path))


def open_checkpoint(
    model: str,
    *,
    load_format: LoadFormat = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Checkpoint:
    """Open a model's checkpoint: headers are read and checked, weights stay in their files.

    `model`: a GGUF file (the first of a split one), a local directory in Hub layout (or one that
    just holds a GGUF file), or a Hub id. `load_format` forces a format; "dummy" makes random
    weights and needs the config only. `revision`, `token`, `cache_dir` and `offline` are the
    Hub's; `hf_overrides` sets keys of the config; `progress` shows download bars. Close the
    result after use. Raises CheckpointError for everything that is wrong with the files.
    """
    path = resolve_path(
        model,
        load_format=load_format,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        progress=progress,
    )
    overrides = hf_overrides or {}
    if path.is_file():
        if load_format == "dummy":
            return DummyCheckpoint(path, *gguf.read_configs(path, overrides))
        return gguf.open_gguf(path, overrides)
    config, generation_config = read_config(path, overrides), read_generation_config(path)
    if load_format == "dummy":
        return DummyCheckpoint(path, config, generation_config)
    quantization = read_quantization(config, path)
    tensors = safetensors.open_tensors(path) or torch_file.open_tensors(path)
    if not tensors:
        if any(file.suffix in pickles.SUFFIXES for file in path.iterdir()):
            raise CheckpointError(pickles.refusal(path))
        raise CheckpointError(f"{path}: no weights: no {safetensors.SINGLE} and no .gguf file")
    tensors = canonical_names(tensors, config.get("model_type"))
    for note in quantization.notes(tensors) if quantization else ():
        logger.warning("%s: %s", path, note)
    return TensorCheckpoint(path, config, generation_config, tensors, quantization)


def _one_file(path: Path, load_format: LoadFormat) -> Path:
    """Check that a file given as the model is one that can be opened."""
    if path.suffix != ".gguf":
        hint = (
            f"; pass its directory, {path.parent}"
            if path.suffix in (".safetensors", ".json")
            else ""
        )
        if path.suffix in pickles.SUFFIXES:
            raise CheckpointError(pickles.refusal(path))
        raise CheckpointError(f"{path}: a model file must be a .gguf file{hint}")
    if load_format == "safetensors":
        raise CheckpointError(f"{path}: a GGUF file, but the load format asked for is safetensors")
    return path


def _directory(path: Path, load_format: LoadFormat) -> Path:
    """A directory in Hub layout itself, or the GGUF file it holds."""
    if load_format == "gguf" or (load_format != "safetensors" and not (path / CONFIG).is_file()):
        files = [file for file in sorted(path.glob("*.gguf")) if gguf.is_first_part(file)]
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files[:5])
            raise CheckpointError(f"{path}: several GGUF files; pass one of them: {names}")
        if load_format == "gguf":
            raise CheckpointError(f"{path}: no .gguf file in the directory")
    return path
