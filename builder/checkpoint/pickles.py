"""Pickled weights: recognized, and never loaded, since reading a pickle can run any code."""

from __future__ import annotations

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refusal(where: object) -> str:
    """The message for a model whose weights are pickles only."""
    return (
        f"{where}: the weights are pickles ({', '.join(SUFFIXES[:3])}), which can run code when "
        f"they are read, so they are never loaded; convert them to safetensors, say with "
        f"transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    )
