"""LoRA adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint

What an adapter asks for that would change its answers and is not done here is refused by name.
Which modules are adapted is what the file has tensors for: `target_modules`, whether names, a
regular expression or "all-linear", has done its work when the adapter was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

from tensorray.builder.checkpoint import pickles
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.names import canonical_name
from tensorray.builder.checkpoint.safetensors import read_header
from tensorray.builder.checkpoint.tensor import DataFile, FileTensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

T = TypeVar("T")

_MOST_CONFIG_BYTES = 1 << 20
_MODULE = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

_OFF: tuple[object, ...] = (None, False, [], {}, "", "none")
# Keys that change what an adapter computes: only values that ask for nothing are taken.
_REFUSED = {
    "bias": "trained biases are not supported; train with bias='none'",
    "lora_bias": "trained biases are not supported; train with lora_bias=False",
    "use_dora": "DoRA (arXiv 2402.09353) is not supported; merge it into the base",
    "modules_to_save": "whole trained modules are not supported; merge the adapter into the base",
    "trainable_token_indices": "trained embeddings are not supported",
    "target_parameters": "parameters that are no linear layer's (experts) are not supported",
    "layer_replication": "replicated layers are not supported",
}
# Keys that only say how the adapter was made.
_HISTORY = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # matters to merging: A is [r, in] and B is [out, r] either way
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
    "velora_config",
}
_READ = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
# Ways to begin that change the base's weights too, so that an adapter fits that base only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What of adapter_config.json says how an adapter computes."""

    rank: int
    alpha: float
    rslora: bool = False  # arXiv 2312.03732
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base: str = ""  # what it was trained on, as far as it says

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B @ A is multiplied by."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class AdapterModule:
    """One adapted module: a `[r, in]`, b `[out, r]`."""

    a: FileTensor
    b: FileTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's files, opened, their headers checked; values stay in the file."""

    path: Path
    config: AdapterConfig
    modules: dict[str, AdapterModule]  # by the module's name in the base


def open_adapter(directory: Path, model_type: str | None = None) -> AdapterFiles:
    """Open the adapter in a directory; `model_type` is the base's, for its tensors' names.

    Raises CheckpointError naming file and key or tensor.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    config = read_adapter_config(directory)
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / PICKLE).is_file():
            raise CheckpointError(
                f"{directory / PICKLE}: a pickle, which is never loaded; save the adapter again "
                f"as safetensors (PEFT's default since 0.7)"
            )
        raise CheckpointError(f"{directory}: no {WEIGHTS}")
    pairs: dict[str, dict[str, FileTensor]] = {}  # by the name of the module that PEFT adapted
    for name, tensor in read_header(DataFile(path)).items():
        found = _MODULE.fullmatch(name)
        if found is None:
            raise CheckpointError(f"{path}: tensor {name!r}: {_why_not(name)}")
        pairs.setdefault(found[1], {})[found[2]] = tensor
    if not pairs:
        raise CheckpointError(f"{path}: it has no tensors")
    modules = {}
    for module, pair in pairs.items():
        for letter in "AB":
            if letter not in pair:
                raise CheckpointError(f"{path}: {module} has no lora_{letter}.weight")
        a, b = pair["A"], pair["B"]
        for letter, tensor in pair.items():
            if len(tensor.shape) != 2 or tensor.fetch(0, 0).dtype.kind in "iub":
                raise CheckpointError(
                    f"{path}: {module}: lora_{letter} of shape {list(tensor.shape)} is no matrix "
                    "of floats"
                )
        rank = config.rank_of(module)
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise CheckpointError(
                f"{path}: {module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, but by "
                f"{CONFIG} its rank is {rank}"
            )
        name = canonical_name(module, model_type, headless=True)
        modules[name] = AdapterModule(a, b, config.scale_of(module))
    return AdapterFiles(directory, config, modules)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read and check adapter_config.json; see `open_adapter`."""
    path = directory / CONFIG
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; an adapter is a directory with {CONFIG} "
            f"and {WEIGHTS}"
        ) from error
    if len(text) > _MOST_CONFIG_BYTES:
        raise CheckpointError(f"{path}: more than {_MOST_CONFIG_BYTES} bytes")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object")

    def refuse(key: str, why: str) -> CheckpointError:
        return CheckpointError(f"{path}: {key} is {config.get(key)!r}: {why}")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "only LORA is supported")
    for key, value in config.items():
        if key in _REFUSED and value not in _OFF:
            raise refuse(key, _REFUSED[key])
        if key not in _HISTORY | _READ | _REFUSED.keys() and value not in _OFF:
            raise refuse(key, "this option of PEFT is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise refuse(
            "init_lora_weights",
            "it changes the base's weights as well; convert the adapter for the plain base "
            "(PEFT's path_initial_model_for_weight_conversion)",
        )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise refuse("r", "the rank is an integer from 1 on")
    if not _is_number(alpha):
        raise refuse("lora_alpha", "must be a number")
    if not isinstance(config.get("use_rslora", False), bool):
        raise refuse("use_rslora", "must be true or false")
    patterns: dict[str, dict[str, Any]] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        found = patterns[key] = config.get(key) or {}
        if not isinstance(found, dict) or not all(map(_is_number, found.values())):
            raise refuse(key, "must give a number for each module's name")
        if key == "rank_pattern" and not all(type(v) is int and v > 0 for v in found.values()):
            raise refuse(key, "ranks are integers from 1 on")
        for pattern in found:
            if not _is_simple(pattern):
                raise refuse(key, f"{pattern!r} is no simple regular expression")
    return AdapterConfig(
        rank,
        float(alpha),
        config.get("use_rslora", False),
        patterns["rank_pattern"],
        patterns["alpha_pattern"],
        str(config.get("base_model_name_or_path") or ""),
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e9 < value < 1e9


def _is_simple(pattern: str) -> bool:
    """Whether a pattern compiles, and can't take long to match: no repeated groups, few repeats."""
    repeats = len(re.findall("[*+{]", pattern))
    if len(pattern) > 200 or repeats > 2 or re.search(r"\)[*+?{]", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    """As PEFT looks a module up: the first pattern that its name, or the end of it, matches."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _why_not(name: str) -> str:
    if "lora_embedding" in name:
        return "adapters of embeddings are not supported"
    if "lora_magnitude" in name:
        return _REFUSED["use_dora"]
    if name.endswith(".base_layer.weight"):
        return "a copy of the base's weights; save with save_embedding_layers=False"
    if name.endswith((".lora_A.bias", ".lora_B.bias")):
        return _REFUSED["lora_bias"]
    if ".lora_" in name:
        return "not a tensor that PEFT saves for LoRA on linear layers"
    return _REFUSED["modules_to_save"]


def adapter_directory(
    path: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
) -> Path:
    """Where an adapter lies on this machine: a local directory, or one of the Hub, fetched first.

    Raises CheckpointError saying what was tried and what to do.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        hint = pickles.refusal(path) if local.suffix in pickles.SUFFIXES else "pass its directory"
        raise CheckpointError(f"{path}: an adapter is a directory with {CONFIG}; {hint}")
    if path.startswith(("/", ".", "~")) or "\\" in path or path.count("/") != 1:
        raise CheckpointError(f"{path}: no such directory (one of the Hub is named as org/name)")
    from tensorray.builder.checkpoint import hub  # takes a second to import

    return hub.download_files(
        path,
        [CONFIG, WEIGHTS],
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
    )
