"""LoRA adapters as PEFT saves them, made here, and the same merged into their base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from .tiny_models import directory, references

#: What PEFT calls "all-linear", by the ends of module names: not the head.
ALL_LINEAR = ("_proj", "c_attn", "c_proj", "c_fc")
_PREFIX = "base_model.model."

# Eight adapters as different as they come. Those of three endings adapt parts of fused matrices.
KINDS: list[dict[str, Any]] = [
    {},
    {"rank": 1, "alpha": 2.0},
    {"rank": 16, "alpha": 16.0, "spread": 0.2},
    {"rslora": True, "alpha": 4.0},
    {"modules": ("q_proj", "v_proj", "c_attn"), "spread": 0.6},
    {"modules": ("up_proj", "down_proj", "c_fc"), "spread": 0.6},
    {"modules": ("k_proj", "o_proj", "gate_proj", "attn.c_proj"), "rank": 8, "alpha": 16.0},
    {
        "rank_pattern": {"q_proj": 2, "mlp.c_proj": 2},
        "alpha_pattern": {"up_proj": 32.0, "c_fc": 32.0},
    },
]


def write_adapter(
    base: Path,
    target: Path,
    *,
    seed: int,
    rank: int = 4,
    alpha: float = 8.0,
    rslora: bool = False,
    modules: Sequence[str] = ALL_LINEAR,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    spread: float = 0.3,
    **config: Any,
) -> Path:
    """A random adapter for the linear layers of a base whose names end with one of `modules`.

    Patterns are ends of names. `config` are further keys of adapter_config.json.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (outputs, inputs) in linear_sizes(base).items():
        if not module.endswith(tuple(modules)):
            continue
        own = _by_end(rank_pattern, module, rank)
        for letter, shape in (("A", (own, inputs)), ("B", (outputs, own))):
            values = random.normal(0, spread, shape).astype(np.float32)
            tensors[f"{_PREFIX}{module}.lora_{letter}.weight"] = values
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": list(modules),
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "bias": "none",
        "fan_in_fan_out": _is_gpt2(base),
        **config,
    }
    return write_files(target, written, tensors)


def write_files(
    target: Path, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), target / "adapter_model.safetensors")
    return target


def read_files(adapter: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return config, load_file(adapter / "adapter_model.safetensors")


def linear_sizes(base: Path) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a base's matrices, by module."""
    swapped = _is_gpt2(base)
    sizes = {}
    for name, value in load_file(base / "model.safetensors").items():
        if value.ndim == 2 and name.endswith(".weight"):
            first, second = value.shape
            sizes[name.removesuffix(".weight")] = (second, first) if swapped else (first, second)
    return sizes


def merge(base: Path, adapter: Path, target: Path) -> Path:
    """The base with the adapter added to its weights, in float64, as a checkpoint of its own."""
    config, tensors = read_files(adapter)
    merged = load_file(base / "model.safetensors")
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
        alpha = _by_end(config["alpha_pattern"], module, config["lora_alpha"])
        scale = alpha / (sqrt(len(a)) if config["use_rslora"] else len(a))
        delta = scale * b @ a.astype(np.float64)
        weight = merged[f"{module}.weight"].astype(np.float64)
        weight += delta.T if _is_gpt2(base) else delta
        merged[f"{module}.weight"] = weight.astype(np.float32)
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors", "*.npz"))
    save_file(merged, target / "model.safetensors")
    return target


def _by_end(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    found = (value for end, value in (patterns or {}).items() if module.endswith(f".{end}"))
    return next(found, default)


def _is_gpt2(base: Path) -> bool:
    """Whether the checkpoint stores matrices `[in, out]`."""
    return bool(json.loads((base / "config.json").read_text())["model_type"] == "gpt2")


def write_adapters(name: str, root: Path) -> list[Path]:
    """A family's eight adapters."""
    return [
        write_adapter(directory(name), root / f"adapter-{i}", seed=i, **kind)
        for i, kind in enumerate(KINDS)
    ]


def prompt(name: str) -> list[int]:
    return references(name)[0].prompt.tolist()
