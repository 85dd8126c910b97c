"""The tiny models' tensors and configs as Megatron, NeMo and Meta have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Tensors = dict[str, Array]


def fuse_qkv(q: Array, k: Array, v: Array, groups: int, head_dim: int) -> Array:
    """Rows by query group: its query heads, its key, its value (written as a plain loop)."""
    per_group = len(q) // groups
    rows = []
    for i in range(groups):
        rows.append(q[i * per_group : (i + 1) * per_group])
        rows.append(k[i * head_dim : (i + 1) * head_dim])
        rows.append(v[i * head_dim : (i + 1) * head_dim])
    return np.concatenate(rows)


def pad_rows(table: Array, rows: int) -> Array:
    """A vocabulary padded to a number of rows, with values that would show."""
    return np.concatenate([table, np.full((rows, table.shape[1]), 9.0, table.dtype)])[:rows]


def llama(hf: Tensors, config: dict[str, Any], padded: int) -> tuple[Tensors, dict[str, Any]]:
    """A Llama in Megatron Core's layout, Transformer Engine's norms, and its model_config.yaml."""
    groups, head_dim = config["num_key_value_heads"], config["head_dim"]
    out = {
        "model.embedding.word_embeddings.weight": pad_rows(hf["model.embed_tokens.weight"], padded),
        "model.decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if "lm_head.weight" in hf:
        out["model.output_layer.weight"] = pad_rows(hf["lm_head.weight"], padded)
    for i in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{i}", f"model.decoder.layers.{i}"
        q, k, v = (hf[f"{old}.self_attn.{x}_proj.weight"] for x in "qkv")
        gate, up = (hf[f"{old}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        out |= {
            f"{new}.self_attention.linear_qkv.weight": fuse_qkv(q, k, v, groups, head_dim),
            f"{new}.self_attention.linear_qkv.layer_norm_weight": hf[
                f"{old}.input_layernorm.weight"
            ],
            f"{new}.self_attention.linear_proj.weight": hf[f"{old}.self_attn.o_proj.weight"],
            f"{new}.mlp.linear_fc1.weight": np.concatenate([gate, up]),
            f"{new}.mlp.linear_fc1.layer_norm_weight": hf[f"{old}.post_attention_layernorm.weight"],
            f"{new}.mlp.linear_fc2.weight": hf[f"{old}.mlp.down_proj.weight"],
        }
    rope = config["rope_parameters"]
    settings = {
        "mcore_gpt": True,
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "max_position_embeddings": config["max_position_embeddings"],
        "encoder_seq_length": 16,
        "normalization": "rmsnorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percentage": 1.0,
        "bias": False,
        "share_embeddings_and_output_weights": "lm_head.weight" not in hf,
        "override_vocab_size": config["vocab_size"],
    }
    if rope["rope_type"] == "llama3":
        settings |= {
            "scale_factor": rope["factor"],
            "low_freq_factor": rope["low_freq_factor"],
            "high_freq_factor": rope["high_freq_factor"],
            "old_context_len": rope["original_max_position_embeddings"],
        }
    return out, settings


def gpt(hf: Tensors, config: dict[str, Any], padded: int) -> tuple[Tensors, dict[str, Any]]:
    """A GPT-2 in NeMo's layout from before Megatron Core, and its model_config.yaml."""
    heads, hidden = config["n_head"], config["n_embd"]
    at = "model.language_model."
    out = {
        f"{at}embedding.word_embeddings.weight": pad_rows(hf["transformer.wte.weight"], padded),
        f"{at}embedding.position_embeddings.weight": hf["transformer.wpe.weight"],
        f"{at}encoder.final_layernorm.weight": hf["transformer.ln_f.weight"],
        f"{at}encoder.final_layernorm.bias": hf["transformer.ln_f.bias"],
    }
    names = {
        "attn.c_proj": "self_attention.dense",
        "mlp.c_fc": "mlp.dense_h_to_4h",
        "mlp.c_proj": "mlp.dense_4h_to_h",
    }
    for i in range(config["n_layer"]):
        old, new = f"transformer.h.{i}", f"{at}encoder.layers.{i}"
        for kind in ("weight", "bias"):
            q, k, v = np.split(hf[f"{old}.attn.c_attn.{kind}"].T, 3)
            fused = fuse_qkv(q, k, v, heads, hidden // heads)
            out[f"{new}.self_attention.query_key_value.{kind}"] = fused
            for theirs, ours in names.items():
                turned = np.ascontiguousarray(hf[f"{old}.{theirs}.{kind}"].T)
                out[f"{new}.{ours}.{kind}"] = turned
            out[f"{new}.input_layernorm.{kind}"] = hf[f"{old}.ln_1.{kind}"]
            out[f"{new}.post_attention_layernorm.{kind}"] = hf[f"{old}.ln_2.{kind}"]
    settings = {
        "num_layers": config["n_layer"],
        "hidden_size": hidden,
        "ffn_hidden_size": 4 * hidden,
        "num_attention_heads": heads,
        "max_position_embeddings": config["n_positions"],
        "normalization": "layernorm",
        "layernorm_epsilon": config["layer_norm_epsilon"],
        "activation": "gelu",
        "bias_activation_fusion": True,
        "position_embedding_type": "learned_absolute",
    }
    return out, settings


def stacked(tensors: Tensors) -> Tensors:
    """The same with layers along a first axis, as distributed checkpoints have them."""
    out: Tensors = {}
    layers: dict[str, list[Array]] = {}
    for name, array in tensors.items():
        start, found, rest = name.partition(".layers.")
        if found:
            layers.setdefault(f"{start}.layers.{rest.partition('.')[2]}", []).append(array)
        else:
            out[name] = array
    return out | {name: np.stack(arrays) for name, arrays in layers.items()}


def meta(hf: Tensors, config: dict[str, Any], ranks: int) -> tuple[list[Tensors], dict[str, Any]]:
    """A Llama as Meta has it, split over ranks, and its params.json."""
    head_dim = config["head_dim"]
    whole = {
        "tok_embeddings.weight": (hf["model.embed_tokens.weight"], 1),
        "norm.weight": (hf["model.norm.weight"], None),
        "output.weight": (hf["lm_head.weight"], 0),
    }
    names = {
        "attention.wq": ("self_attn.q_proj", 0),
        "attention.wk": ("self_attn.k_proj", 0),
        "attention.wv": ("self_attn.v_proj", 0),
        "attention.wo": ("self_attn.o_proj", 1),
        "feed_forward.w1": ("mlp.gate_proj", 0),
        "feed_forward.w2": ("mlp.down_proj", 1),
        "feed_forward.w3": ("mlp.up_proj", 0),
        "attention_norm": ("input_layernorm", None),
        "ffn_norm": ("post_attention_layernorm", None),
    }
    for i in range(config["num_hidden_layers"]):
        for theirs, (ours, axis) in names.items():
            array = hf[f"model.layers.{i}.{ours}.weight"]
            if theirs in ("attention.wq", "attention.wk"):  # back to neighbouring pairs
                parts = array.reshape(-1, 2, head_dim // 2, array.shape[1])
                array = parts.swapaxes(1, 2).reshape(array.shape)
            whole[f"layers.{i}.{theirs}.weight"] = (array, axis)
    shares = [
        {
            name: array
            if axis is None
            else np.ascontiguousarray(np.split(array, ranks, axis)[rank])
            for name, (array, axis) in whole.items()
        }
        for rank in range(ranks)
    ]
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": -1,
    }
    return shares, params
