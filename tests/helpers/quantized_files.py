"""Quantized checkpoints of tiny models, written after each tool's own description of its layout.

A writer rounds a layer's weight by its scheme's formula and stores the result. Beside the files it
gives the values they stand for, taken from the rounded numbers before they are packed: what a
reader has to arrive at, exactly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

Array = NDArray[Any]
#: A module's tensors by suffix, and the values they stand for, float32 `[out, in]`.
Written = tuple[dict[str, Array], Array]


@dataclass(frozen=True)
class Layout:
    """One way to quantize a checkpoint."""

    config: Mapping[str, Any]  # quantization_config
    write: Callable[[str, Array], Written]  # for a module's name and weight [out, in]
    skip: tuple[str, ...] = ("lm_head", "gate")  # modules left alone, by their last name
    extra: Mapping[str, Array] = field(default_factory=dict)  # further tensors a module, by suffix
    files: Mapping[str, Any] = field(default_factory=dict)  # JSON files beside config.json


def quantize_model(source: Path, target: Path, layout: Layout) -> dict[str, Array]:
    """Write a quantized copy of a float checkpoint; all tensors' values by their float name."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    if layout.config:
        config["quantization_config"] = layout.config
    (target / "config.json").write_text(json.dumps(config))
    for name, content in layout.files.items():
        (target / name).write_text(json.dumps(content))
    stored: dict[str, Array] = {}
    values: dict[str, Array] = {}
    conv1d = config["model_type"] == "gpt2"  # stores [in, out]
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        embedding = last in ("embed_tokens", "wte", "wpe")
        if kind != "weight" or tensor.ndim != 2 or embedding or last in layout.skip:
            stored[name] = tensor
            values[name] = tensor.astype(np.float32)
            continue
        weight = (tensor.T if conv1d else tensor).astype(np.float32)
        tensors, dequantized = layout.write(module, np.ascontiguousarray(weight))
        for suffix, array in {**tensors, **layout.extra}.items():
            stored[module + suffix] = np.ascontiguousarray(array)
        values[name] = np.ascontiguousarray(dequantized.T if conv1d else dequantized)
    save_file(stored, target / "model.safetensors")
    return values


def load_tensors(directory: Path) -> dict[str, Array]:
    """A checkpoint's tensors, those of dtypes that NumPy has not included."""
    names = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F32": "float32", "F16": "float16"}
    names |= {"I8": "int8", "I32": "int32", "I64": "int64"}
    stored = deserialize((directory / "model.safetensors").read_bytes())
    return {
        name: np.frombuffer(bytearray(entry["data"]), np.dtype(names[entry["dtype"]])).reshape(
            entry["shape"]
        )
        for name, entry in stored
    }


def write_plain(source: Path, target: Path, values: dict[str, Array]) -> None:
    """The same model with these values, not quantized."""
    shutil.copytree(source, target)
    save_file(values, target / "model.safetensors")


# --- rounding ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """A weight in whole numbers: `(codes - zeros) * scales` by groups of columns."""

    codes: Array  # int [out, in], from 0 on
    zeros: Array  # int [out, groups]
    scales: Array  # [out, groups]
    group_of: Array  # int [in]

    def values(self) -> Array:
        zeros = self.zeros[:, self.group_of].astype(np.float32)
        scales = self.scales.astype(np.float32)[:, self.group_of]
        return (self.codes.astype(np.float32) - zeros) * scales


def round_integers(
    weight: Array, bits: int, group_of: Array, *, symmetric: bool, dtype: Any = np.float16
) -> Rounded:
    """To the nearest of 2^bits steps between each group's extremes."""
    count, top = int(group_of.max()) + 1, (1 << bits) - 1
    low = np.stack([weight[:, group_of == g].min(axis=1) for g in range(count)], axis=1)
    high = np.stack([weight[:, group_of == g].max(axis=1) for g in range(count)], axis=1)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scales = np.maximum((high - low) / top, 1e-5).astype(dtype)
    wide = scales.astype(np.float32)
    middle = 1 << (bits - 1)
    zeros = np.full(wide.shape, middle) if symmetric else np.clip(np.rint(-low / wide), 0, top)
    codes = np.rint(weight / wide[:, group_of]) + zeros[:, group_of]
    return Rounded(
        np.clip(codes, 0, top).astype(np.int64), zeros.astype(np.int64), scales, group_of
    )


def neighbours(inputs: int, group: int) -> Array:
    """The group of each input where groups are of neighbours; -1 is one group."""
    return np.arange(inputs) // (inputs if group == -1 else group)


def shuffled(inputs: int, group: int, seed: int = 7) -> Array:
    """The group of each input where groups are of inputs in some order of their own."""
    groups = np.empty(inputs, np.int64)
    groups[np.random.default_rng(seed).permutation(inputs)] = np.arange(inputs) // group
    return groups


def pack_words(codes: Array, bits: int, order: list[int] | None = None) -> Array:
    """Unsigned codes along axis 0 into int32, lowest bits first; `order` is of those in a word."""
    per_word = 32 // bits
    padded = -(-len(codes) // per_word) * per_word
    full = np.zeros((padded, *codes.shape[1:]), np.uint64)
    full[: len(codes)] = codes
    words = np.zeros((padded // per_word, *codes.shape[1:]), np.uint64)
    for place, index in enumerate(order or range(per_word)):
        words |= full[index::per_word] << np.uint64(place * bits)
    return words.astype(np.uint32).view(np.int32)


# --- GPTQ --------------------------------------------------------------------------------------


def gptq(
    *,
    bits: int = 4,
    group: int = 16,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
    **config: Any,
) -> Layout:
    """AutoGPTQ's layout; version 2 is GPTQModel's, which stores zeros as they are."""

    def write(module: str, weight: Array) -> Written:
        groups = (shuffled if act_order else neighbours)(weight.shape[1], group)
        rounded = round_integers(weight, bits, groups, symmetric=symmetric)
        zeros = rounded.zeros.T  # [groups, out]
        if version == 1:
            zeros = (zeros - 1) % (1 << bits)
        tensors = {
            ".qweight": pack_words(rounded.codes.T, bits),
            ".qzeros": pack_words(zeros.T, bits).T,
            ".scales": rounded.scales.T,
            ".g_idx": groups.astype(np.int32),
        }
        return tensors, rounded.values()

    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": act_order,
        **({"checkpoint_format": "gptq_v2"} if version == 2 else {}),
        **config,
    }
    return Layout(settings, write)


# --- AWQ ---------------------------------------------------------------------------------------

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(*, group: int = 16, **config: Any) -> Layout:
    """AutoAWQ's GEMM layout: packed along the outputs, in an order of its own."""

    def write(module: str, weight: Array) -> Written:
        groups = neighbours(weight.shape[1], group)
        rounded = round_integers(weight, 4, groups, symmetric=False)
        tensors = {
            ".qweight": pack_words(rounded.codes, 4, _AWQ_ORDER).T,
            ".qzeros": pack_words(rounded.zeros, 4, _AWQ_ORDER).T,
            ".scales": rounded.scales.T,
        }
        return tensors, rounded.values()

    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["gate"],
        **config,
    }
    return Layout(settings, write)


# --- compressed-tensors ------------------------------------------------------------------------


def _compressed(weights: Mapping[str, Any], form: str, **config: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate$"],
        **config,
    }


def packed(
    *,
    bits: int = 4,
    group: int = 16,
    symmetric: bool = True,
    act_order: bool = False,
    **config: Any,
) -> Layout:
    """pack-quantized: along the inputs, codes offset to be unsigned."""

    def write(module: str, weight: Array) -> Written:
        groups = (shuffled if act_order else neighbours)(weight.shape[1], group)
        rounded = round_integers(
            weight, bits, groups, symmetric=symmetric, dtype=ml_dtypes.bfloat16
        )
        tensors = {
            ".weight_packed": pack_words(rounded.codes.T, bits).T,
            ".weight_scale": rounded.scales,
            ".weight_shape": np.array(weight.shape, np.int64),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = pack_words(rounded.zeros, bits)
        if act_order:
            tensors[".weight_g_idx"] = groups.astype(np.int32)
        return tensors, rounded.values()

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "actorder": "group" if act_order else None,
    }
    return Layout(_compressed(weights, "pack-quantized", **config), write)


def int8_channel(*, symmetric: bool = True, **config: Any) -> Layout:
    """int-quantized: int8, a scale a row."""

    def write(module: str, weight: Array) -> Written:
        groups = neighbours(weight.shape[1], -1)
        rounded = round_integers(weight, 8, groups, symmetric=symmetric, dtype=np.float32)
        tensors = {
            ".weight": (rounded.codes - 128).astype(np.int8),
            ".weight_scale": rounded.scales,
        }
        if not symmetric:
            tensors[".weight_zero_point"] = (rounded.zeros - 128).astype(np.int8)
        return tensors, rounded.values()

    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    return Layout(_compressed(weights, "int-quantized", **config), write)


# --- float8 ------------------------------------------------------------------------------------

FLOAT8 = ml_dtypes.float8_e4m3fn


def round_float8(weight: Array, block: tuple[int, int]) -> tuple[Array, Array, Array]:
    """Codes, a float32 scale a block (448 stands for its largest value), and the values."""
    height, width = weight.shape
    rows = np.arange(height) // block[0]
    columns = np.arange(width) // block[1]
    scales = np.empty((rows[-1] + 1, columns[-1] + 1), np.float32)
    for row in range(len(scales)):
        for column in range(scales.shape[1]):
            tile = weight[rows == row][:, columns == column]
            scales[row, column] = max(np.abs(tile).max(), 1e-6) / 448
    spread = scales[rows][:, columns]
    codes = (weight / spread).astype(FLOAT8)
    return codes, scales, codes.astype(np.float32) * spread


def _float8(suffix: str, block_of: Callable[[Array], tuple[int, int]], shape: Any) -> Any:
    def write(module: str, weight: Array) -> Written:
        codes, scales, values = round_float8(weight, block_of(weight))
        return {".weight": codes, suffix: scales.reshape(shape(scales))}, values

    return write


def float8_compressed(strategy: str, **config: Any) -> Layout:
    """float-quantized, by strategy "tensor", "channel" or "block" (of 16 x 16)."""
    blocks: dict[str, Callable[[Array], tuple[int, int]]] = {
        "tensor": lambda w: w.shape,
        "channel": lambda w: (1, w.shape[1]),
        "block": lambda w: (16, 16),
    }
    write = _float8(
        ".weight_scale", blocks[strategy], lambda s: (1,) if strategy == "tensor" else s.shape
    )
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [16, 16]
    scale = {".input_scale": np.ones(1, np.float32)} if strategy == "tensor" else {}
    return Layout(_compressed(weights, "float-quantized", **config), write, extra=scale)


def modelopt(*, in_config: bool = False) -> Layout:
    """ModelOpt's FP8: a scale a tensor, as a tensor without axes; k and v scales beside it."""
    write = _float8(".weight_scale", lambda w: w.shape, lambda s: ())
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head", "*.gate"],
    }
    content = {"producer": {"name": "modelopt"}, "quantization": quantization}
    extra = {
        ".input_scale": np.ones((), np.float32),
        ".k_scale": np.ones((), np.float32),
        ".v_scale": np.ones((), np.float32),
    }
    if in_config:
        return Layout({"quant_method": "modelopt", **quantization}, write, extra=extra)
    return Layout({}, write, extra=extra, files={"hf_quant_config.json": content})


def float8_blocks(**config: Any) -> Layout:
    """DeepSeek's: a scale for each block of 16 x 16 (theirs are of 128)."""
    write = _float8(".weight_scale_inv", lambda w: (16, 16), lambda s: s.shape)
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [16, 16],
        "modules_to_not_convert": ["lm_head", "gate"],
        **config,
    }
    return Layout(settings, write)


def float8_tensor(**config: Any) -> Layout:
    """AutoFP8's: a scale a tensor."""
    write = _float8(".weight_scale", lambda w: w.shape, lambda s: ())
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": ["lm_head", "gate"],
        **config,
    }
    return Layout(settings, write, extra={".input_scale": np.ones((), np.float32)})
