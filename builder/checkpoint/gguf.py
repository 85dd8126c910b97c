"""GGUF checkpoints (ggml's single-file format)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.gguf_header import read_header, read_metadata
from tensorray.builder.checkpoint.tensor import TensorCheckpoint

__all__ = ["is_first_part", "open_gguf", "read_configs", "read_metadata"]


def is_first_part(path: Path) -> bool:
    """Whether a file is a whole GGUF file, or the first part of a split one."""
    return "-of-" not in path.stem or "-00001-of-" in path.stem


def read_configs(path: Path, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json as the file's metadata gives them."""
    architecture = read_header(path).metadata.get("general.architecture")
    raise CheckpointError(f"{path}: architecture {architecture!r} is not supported")


def open_gguf(path: Path, overrides: Mapping[str, Any]) -> TensorCheckpoint:
    """Open a GGUF file, all its parts if it is split."""
    return TensorCheckpoint(path, *read_configs(path, overrides), {})
