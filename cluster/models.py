"""`tensorray models`: the architectures with definitions, or what one model resolves to."""

from __future__ import annotations

import json
from typing import Any

from tensorray.builder.checkpoint import open_files
from tensorray.builder.load import plan_bytes
from tensorray.builder.registry import DEFINITIONS, resolve


def run(path: str | None, *, as_json: bool) -> None:
    """Print the known architectures, or a description of the model at `path`.

    Raises CheckpointError or ModelConfigError when the model can't be opened or has no definition.
    """
    found = families() if path is None else describe(path)
    if as_json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):{width}}  {shown}")


def families() -> dict[str, list[str]]:
    """Definition -> the checkpoint architectures it answers to."""
    return {each.__name__: list(each.architectures) for each in DEFINITIONS}


def describe(path: str) -> dict[str, Any]:
    """What serving this model would run; of its files only config and metadata are read."""
    files = open_files(path)
    definition = resolve(files.config)
    model = definition(files.config)
    windows = {model.kv_spec(layer).window for layer in range(model.num_layers)} - {None}
    return {
        "path": str(files.path),
        "format": "GGUF" if files.is_gguf else "Hub layout",
        "architecture": ", ".join(files.config.get("architectures") or []),
        "definition": f"{definition.__module__}:{definition.__name__}",
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "vocabulary": model.vocab_size,
        "context_length": model.max_positions,
        "sliding_windows": sorted(map(str, windows)) or ["none"],
        "weights_gib_float32": round(plan_bytes(model) / 2**30, 3),
    }
