"""GGUF checkpoints (ggml's single-file format)."""

from tensorray.builder.checkpoint.gguf_header import read_metadata

__all__ = ["read_metadata"]
