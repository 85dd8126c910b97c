"""One name for each tensor, whichever class of transformers saved the checkpoint."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

_HEADLESS_STARTS = ("embed_tokens.", "layers.", "norm.")
_GPT2_STARTS = ("h.", "wte.", "wpe.", "ln_f.")


def canonical_names(tensors: dict[str, T], model_type: str | None) -> dict[str, T]:
    """The same tensors under the names of the causal language model's own class."""
    headless = "embed_tokens.weight" in tensors
    return {canonical_name(name, model_type, headless): tensor for name, tensor in tensors.items()}


def canonical_name(name: str, model_type: str | None, headless: bool) -> str:
    """A tensor's name without the marks of a wrapping or a headless model.

    Text models inside multimodal ones were saved under either of two prefixes; the Hub's gpt2 was
    saved without its LM head, so without a prefix, and so are models for embeddings: `headless`.
    """
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    if name.startswith("language_model."):
        return name.removeprefix("language_model.")
    if model_type == "gpt2" and name.startswith(_GPT2_STARTS):
        return "transformer." + name
    if headless and name.startswith(_HEADLESS_STARTS):
        return "model." + name
    return name
