"""A model's config.json and generation_config.json, in the form definitions read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorray.builder.checkpoint.base import CheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
#: The config's key that says how weights are quantized.
QUANTIZATION = "quantization_config"

#: Files that say how, where config.json does not, and the method that writes them.
_QUANTIZATION_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


# Of models that attend to earlier tokens only.
_HEADLESS = {
    f"{family}Model": f"{family}ForCausalLM"
    for family in ("GPT2", "Gemma2", "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe")
}


def read_config(directory: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The directory's config.json, as `flatten_config` gives it.

    With a `quantization_config`, wherever in the directory its tool wrote it.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no {CONFIG}; a model directory holds {CONFIG}, its tokenizer's files "
            f"and *.safetensors (or a single .gguf file)"
        )
    config = read_json(path)
    quantization = _read_quantization(directory, config)
    if quantization is not None:
        config[QUANTIZATION] = quantization
    return flatten_config(config, overrides)


def _read_quantization(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the directory's weights are quantized; None if nothing in it says that they are."""
    section = config.get(QUANTIZATION) or config.get("compression_config")
    if isinstance(section, Mapping):
        return section
    text = config.get("text_config")
    if isinstance(text, Mapping) and text.get(QUANTIZATION):
        return None  # it is found there
    for name, method in _QUANTIZATION_FILES.items():
        if (directory / name).is_file():
            return {"quant_method": method, **read_json(directory / name)}
    return None


def flatten_config(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the text model's keys at the top level, then the user's own keys set.

    Multimodal configs (Gemma3ForConditionalGeneration) keep those keys under `text_config`; the
    top level's `architectures` stays.
    """
    flat = {**config, **overrides}
    text = flat.pop("text_config", None)
    if isinstance(text, Mapping):
        inner = {key: value for key, value in text.items() if key != "architectures"}
        flat = {**flat, **inner, **overrides}
        flat.pop("text_config", None)
    return _with_head(flat)


def _with_head(config: dict[str, Any]) -> dict[str, Any]:
    """A headless model, as those for embeddings are saved, as the one with a head that it is part
    of: with the embedding in the head's place, which only generation would use."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and len(architectures) == 1:
        whole = _HEADLESS.get(str(architectures[0]))
        if whole is not None:
            return {**config, "architectures": [whole], "tie_word_embeddings": True}
    return config


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The directory's generation_config.json; {} if there is none."""
    path = directory / GENERATION_CONFIG
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError naming it if it isn't one."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def eos_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> list[int]:
    """Every token id that ends a sequence, the generation config's first, none twice."""
    ids: list[int] = []
    for source in (generation_config or {}, config):
        value = source.get("eos_token_id")
        listed = value if isinstance(value, list) else [value]
        ids += [int(id_) for id_ in listed if isinstance(id_, int)]
    return list(dict.fromkeys(ids))
