"""GGUF checkpoints (ggml's single-file format), as if they were Hugging Face's own.

Metadata becomes a config (gguf_config.py), tensors get the names and the layout definitions know;
quantized weights are dequantized a piece at a time, on read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.config import flatten_config
from tensorray.builder.checkpoint.gguf_config import Source, generation_config, model_config
from tensorray.builder.checkpoint.gguf_header import TensorInfo, read_header, read_metadata
from tensorray.builder.checkpoint.tensor import DataFile, FileTensor, TensorCheckpoint

__all__ = ["is_first_part", "open_gguf", "read_configs", "read_metadata"]

_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

_PLAIN: Mapping[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}

# GGUF name -> Hugging Face's, without ".weight" and ".bias". Inside a layer:
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_MIXTRAL_LAYER = {
    **_LAYER,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
}
_QWEN_MOE_LAYER = {
    **_LAYER,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
}
_GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_LAYERS = {
    "mixtral": _MIXTRAL_LAYER,
    "qwen3_moe": _QWEN_MOE_LAYER,
    "gemma2": _GEMMA_LAYER,
    "gemma3_text": _GEMMA_LAYER,
    "gpt2": _GPT2_LAYER,
}
# Outside the layers:
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}


def is_first_part(path: Path) -> bool:
    """Whether a file is a whole GGUF file, or the first part of a split one, by its name."""
    part = _PART.search(path.name)
    return part is None or int(part[1]) == 1


def read_configs(path: Path, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json as the file's metadata gives them."""
    checkpoint = open_gguf(path, overrides)
    checkpoint.close()
    return checkpoint.config, checkpoint.generation_config


def open_gguf(path: Path, overrides: Mapping[str, Any]) -> TensorCheckpoint:
    """Open a GGUF file, all its parts if it is split. Raises CheckpointError if it is damaged."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, FileTensor] = {}
    for part in _part_paths(path):
        header = read_header(part)
        metadata = metadata or header.metadata
        file = DataFile(part)
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part}: tensor {name!r} is in an earlier part as well")
            tensors[name] = _tensor(file, info)

    def read(name: str) -> NDArray[np.float32]:
        values = np.empty(tensors[name].shape, np.float32)
        tensors[name].read(values, slice(None), slice(None), False)
        return values

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = model_config(Source(path, metadata, shapes, read))
    renamed = dict(_renamed(tensors, config))
    return TensorCheckpoint(
        path, flatten_config(config, overrides), generation_config(metadata), renamed
    )


def _part_paths(path: Path) -> list[Path]:
    part = _PART.search(path.name)
    if part is None:
        return [path]
    if int(part[1]) != 1:
        raise CheckpointError(f"{path}: part {int(part[1])} of a split file; pass part 1")
    stem, count = path.name[: part.start()], int(part[2])
    paths = [path.with_name(f"{stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        raise CheckpointError(f"{path}: parts of the file are missing: {', '.join(missing)}")
    return paths


def _tensor(file: DataFile, info: TensorInfo) -> FileTensor:
    block, block_bytes = GGML_QUANT_SIZES[info.type]
    where = f"{file.path}: tensor {info.name!r}"
    if not _can_decode(info.type):
        raise CheckpointError(f"{where}: type {info.type.name} is not supported")
    if len(info.shape) == 1 and block > 1:
        raise CheckpointError(f"{where}: a tensor of one axis can't be quantized")
    width = info.shape[-1] if len(info.shape) > 1 else 1
    return FileTensor(
        stored=info.shape,
        file=file,
        offset=info.offset,
        row_bytes=width // block * block_bytes,
        decode=partial(_decode, info.type),
    )


@cache
def _can_decode(type_: GGMLQuantizationType) -> bool:
    if type_ in _PLAIN:
        return True
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def _decode(type_: GGMLQuantizationType, data: NDArray[np.uint8]) -> NDArray[Any]:
    """Stored rows `[rows, row_bytes]` -> values `[rows, width]`."""
    if type_ in _PLAIN:
        return data.view(_PLAIN[type_])
    # The library dequantizes 16 rows at a time: make them long ones.
    grouped = data.reshape(16, -1) if len(data) % 16 == 0 else data
    return dequantize(grouped, type_).reshape(len(data), -1)


def _renamed(
    tensors: Mapping[str, FileTensor], config: Mapping[str, Any]
) -> Iterator[tuple[str, FileTensor]]:
    """Tensors under Hugging Face's names, laid out as there; unknown ones keep their name."""
    for name, tensor in tensors.items():
        known = _known_name(name, config["model_type"])
        tensor = _known_layout(name, tensor, config)
        if "{}" in known and len(tensor.stored) == 3:
            for expert in range(tensor.stored[0]):
                yield known.format(expert), tensor.slab(expert)
        else:
            yield known, tensor


def _known_name(name: str, model_type: str) -> str:
    """Hugging Face's name; of stacked experts, with {} for the expert's index."""
    in_layer = _IN_LAYER.fullmatch(name)
    if in_layer:
        layer, part, kind = in_layer.groups()
        known = _LAYERS.get(model_type, _LAYER).get(part)
        prefix = "transformer.h" if model_type == "gpt2" else "model.layers"
        return f"{prefix}.{layer}.{known}.{kind}" if known else name
    part, _, kind = name.rpartition(".")
    known = (_GPT2_TOP if model_type == "gpt2" else _TOP).get(part)
    return f"{known}.{kind}" if known else name


def _known_layout(name: str, tensor: FileTensor, config: Mapping[str, Any]) -> FileTensor:
    """Undo what llama.cpp's converter does to some tensors' values."""
    model_type = config["model_type"]
    if model_type == "gpt2":
        in_layer = name.startswith("blk.") and len(tensor.stored) == 2
        return replace(tensor, transposed=True) if in_layer else tensor
    if model_type.startswith("gemma") and name.endswith("norm.weight"):
        return replace(tensor, decode=partial(_decode_minus_one, tensor.decode))
    # llama.cpp's architecture "llama" is the only one with q and k permuted.
    if model_type in ("llama", "mistral", "mixtral"):
        rows = tensor.stored[0]
        for part, key in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
            if f".attn_{part}." in name and rows % (2 * config[key]) == 0:
                return replace(tensor, order=_half_rotation_order(rows, config[key]))
    return tensor


def _decode_minus_one(
    decode: Callable[[NDArray[np.uint8]], NDArray[Any]], data: NDArray[np.uint8]
) -> NDArray[Any]:
    """Gemma's norm weights: stored as the 1 + weight that is multiplied by."""
    values: NDArray[Any] = decode(data).astype(np.float32) - np.float32(1)
    return values


def _half_rotation_order(rows: int, heads: int) -> NDArray[np.intp]:
    """Where llama.cpp stores each row of Llama's q or k: it interleaves the halves of each head,
    for rotary embeddings of adjacent pairs."""
    stored = np.arange(rows, dtype=np.intp).reshape(heads, rows // heads // 2, 2)
    order: NDArray[np.intp] = stored.swapaxes(1, 2).reshape(rows)
    return order
