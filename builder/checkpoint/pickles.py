"""Weights that are pickles in another layout than what is served: recognized, and explained."""

from __future__ import annotations

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refusal(where: object) -> str:
    """The message for a model whose weights are pickles only."""
    return (
        f"{where}: the weights are pickles ({', '.join(SUFFIXES[:3])}), which are never loaded, "
        f"since loading one can run any code; convert them to safetensors, which reads them as "
        f"data: tensorray convert SOURCE DEST"
    )
