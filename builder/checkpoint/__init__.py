"""Checkpoints: a model's files, opened by path or Hub id, their weights read slice by slice."""

from tensorray.builder.checkpoint.base import Checkpoint, CheckpointError
from tensorray.builder.checkpoint.config import eos_token_ids
from tensorray.builder.checkpoint.open import (
    ModelFiles,
    open_checkpoint,
    open_files,
    resolve_path,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ModelFiles",
    "eos_token_ids",
    "open_checkpoint",
    "open_files",
    "resolve_path",
]
