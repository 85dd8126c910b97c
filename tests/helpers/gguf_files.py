"""Write tiny GGUF files from checkpoints in Hub layout, as llama.cpp's converter would.

Tensor names come from the gguf library's own map, so that the reader's table is checked by it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

Array = npt.NDArray[Any]

_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "GPT2LMHeadModel": gguf.MODEL_ARCH.GPT2,
}


def write_gguf(
    path: Path, model: Path, matrices: Type = Type.F32, *, tensors_per_part: int = 0
) -> Path:
    """Convert a directory to a GGUF file; matrices get the given type, vectors stay float32.

    With `tensors_per_part` the file is split; the first part's path is returned.
    """
    config = json.loads((model / "config.json").read_text())
    architecture = _ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(
        path, gguf.MODEL_ARCH_NAMES[architecture], split_max_tensors=tensors_per_part
    )
    _add_metadata(writer, config)
    for name, tensor in _converted(config, architecture, load_file(model / "model.safetensors")):
        kind = matrices if tensor.ndim > 1 else Type.F32
        data = gguf.quants.quantize(np.ascontiguousarray(tensor), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tensors_per_part:
        return sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]
    return path


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """What convert_hf_to_gguf writes; windows and their patterns where it could."""
    if config["model_type"] == "gpt2":
        writer.add_block_count(config["n_layer"])
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    rope = config["rope_parameters"]
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if experts := config.get("num_local_experts") or config.get("num_experts"):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
            writer.add_expert_weights_norm(config["norm_topk_prob"])
    if config.get("sliding_window") and "qwen" not in config["model_type"]:
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "gemma3_text":
        kinds = config["layer_types"]
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _converted(
    config: dict[str, Any], architecture: gguf.MODEL_ARCH, tensors: dict[str, Array]
) -> list[tuple[str, Array]]:
    layers = config["n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"]
    names = [gguf.get_tensor_name_map(architecture, layers)]
    if architecture is gguf.MODEL_ARCH.QWEN3MOE:  # dense layers among the sparse ones
        names.append(gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers))
    stacked: dict[str, list[tuple[int, Array]]] = defaultdict(list)
    result = []
    for name, tensor in tensors.items():
        if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+\.weight)", name):
            merged = f"{expert[1]}.{expert[3]}".removeprefix("model.")
            merged = merged.replace("block_sparse_moe", "feed_forward")
            merged = f"model.{merged}" if ".mlp." in merged else merged
            stacked[merged].append((int(expert[2]), tensor))
            continue
        if architecture is gguf.MODEL_ARCH.LLAMA:
            if re.search(r"q_proj\.(weight|bias)$", name):
                tensor = _interleave(tensor, config["num_attention_heads"])
            if re.search(r"k_proj\.(weight|bias)$", name):
                tensor = _interleave(tensor, config["num_key_value_heads"])
        if "gemma" in config["model_type"] and name.endswith("norm.weight"):
            tensor = tensor + 1
        if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            tensor = tensor.T
        result.append((_mapped(names, name), tensor))
    for name, entries in stacked.items():
        experts = [tensor for _, tensor in sorted(entries, key=lambda entry: entry[0])]
        result.append((_mapped(names, name), np.stack(experts)))
    rope = config.get("rope_parameters", {})
    if rope.get("rope_type") == "llama3":
        result.append(("rope_freqs.weight", llama3_divisors(config["head_dim"], **rope)))
    return result


def _mapped(maps: list[gguf.TensorNameMap], name: str) -> str:
    found = [names.get_name(name, try_suffixes=(".weight", ".bias")) for names in maps]
    return next(mapped for mapped in found if mapped is not None)


def _interleave(tensor: Array, heads: int) -> Array:
    """Rows of q or k, from halves of each head to adjacent pairs."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    pairs: Array = halves.swapaxes(1, 2).reshape(tensor.shape)
    return pairs


def llama3_divisors(
    dims: int,
    *,
    rope_theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    rope_type: str = "llama3",
) -> npt.NDArray[np.float32]:
    """What each rotary frequency is divided by under Llama 3's scaling, `[dims / 2]`."""
    assert rope_type == "llama3"
    divisors = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * rope_theta ** (i / dims)
        turns = original_max_position_embeddings / wavelength
        if turns > high_freq_factor:
            divisors.append(1.0)
        elif turns < low_freq_factor:
            divisors.append(factor)
        else:
            smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)
