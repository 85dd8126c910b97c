"""A GGUF file's metadata as Hugging Face's config.json and generation_config.json spell it.

The inverse of what llama.cpp's converter writes. Where a file lacks a key, the value is the one
llama.cpp itself assumes for the architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError

#: Texts of special tokens that end a turn; files often name just one of a model's in metadata.
_END_OF_TURN = frozenset(
    ("<end_of_turn>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<EOT>")
)
_SPECIAL_TYPES = (3, 4)  # of tokens in tokenizer.ggml.token_type: control and user-defined

_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True)
class Source:
    """What a config is made from. `read` gives a tensor's values, for the few small ones needed."""

    path: Path
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], NDArray[np.float32]]

    @property
    def architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if name not in _TRANSLATORS:
            raise CheckpointError(
                f"{self.path}: architecture {name!r} is not supported; supported in GGUF files: "
                f"{', '.join(_TRANSLATORS)}"
            )
        return str(name)

    def get(self, key: str, default: Any = None) -> Any:
        """The architecture's own key; an array counts if it says the same for every layer."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            if len(np.unique(value)) != 1:
                raise CheckpointError(
                    f"{self.path}: {self.architecture}.{key} differs from layer to layer, "
                    f"which is not supported"
                )
            value = value[0].item()
        if isinstance(value, float):
            value = float(str(np.float32(value)))  # 1e-06, not 9.999999974752427e-07
        return value

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata key {self.architecture}.{key} is missing")
        return value


def model_config(source: Source) -> dict[str, Any]:
    """config.json's keys. Raises CheckpointError for an unknown architecture or a missing key."""
    translate = _TRANSLATORS[source.architecture]
    embedding = source.shapes.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{source.path}: tensor 'token_embd.weight' is missing")
    config = {
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in source.shapes,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = source.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{name}_token_id"] = token
    return config | translate(source)


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json's keys: sampling defaults, and every token that ends a turn."""
    config = {ours: metadata[key] for key, ours in _SAMPLING.items() if key in metadata}
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", []))[: len(tokens)]
    special = np.flatnonzero(np.isin(types, _SPECIAL_TYPES)).tolist()
    ids += [index for index in special if tokens[index] in _END_OF_TURN]
    if stop := list(dict.fromkeys(id_ for id_ in ids if id_ is not None)):
        config["eos_token_id"] = stop
    return config


def _decoder(source: Source, architecture: str, model_type: str) -> dict[str, Any]:
    """The keys that all decoders with rotary embeddings have."""
    heads = source.require("attention.head_count")
    head_dim = source.get("attention.key_length", source.require("embedding_length") // heads)
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": source.require("embedding_length"),
        "intermediate_size": source.require("feed_forward_length"),
        "num_hidden_layers": source.require("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": source.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": source.require("context_length"),
        "rms_norm_eps": source.require("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_theta": source.get("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(source),
    }
    rotary_dim = source.get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    return config


def _rope_scaling(source: Source) -> dict[str, Any] | None:
    if "rope_freqs.weight" in source.shapes:
        return _llama3_scaling(source)
    factor = source.get("rope.scaling.factor", 0.0)
    kind = source.get("rope.scaling.type", "linear")
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise CheckpointError(f"{source.path}: RoPE scaling of type {kind!r} is not supported")
    optional = {
        "original_max_position_embeddings": source.get("rope.scaling.original_context_length"),
        "attention_factor": source.get("rope.scaling.yarn_attn_factor"),
        "beta_fast": source.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": source.get("rope.scaling.yarn_beta_slow"),
    }
    given = {key: value for key, value in optional.items() if value is not None}
    return {"rope_type": "yarn", "factor": factor, **given}


def _llama3_scaling(source: Source) -> dict[str, Any]:
    """Llama 3's scaling, found again from the divisors of each frequency that it came to.

    A pair that turns t times over the original context has 1 / divisor = (1 - s) / factor + s,
    with s = (t - low) / (high - low) clipped to 0..1. Published models have low 1 and high 4,
    which one pair in between suffices for; two give high too. (Low is but the unit of the rest.)
    """
    divisors = source.read("rope_freqs.weight").astype(np.float64)
    dims = 2 * len(divisors)
    base = source.get("rope.freq_base", 10_000.0)
    frequencies = base ** -(np.arange(0, dims, 2) / dims) / (2 * math.pi)  # turns per position
    factor = float(np.float32(divisors.max()))
    if factor == 1.0:
        raise CheckpointError(f"{source.path}: 'rope_freqs.weight' scales nothing")
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    candidates: list[tuple[float, float]] = []  # original context, high
    if between.any():
        candidates.append((np.mean((1 + 3 * share[between]) / frequencies[between]), 4.0))
    if between.sum() >= 2:
        slope, offset = np.polyfit(frequencies[between], share[between], 1)
        candidates.append((-slope / offset, 1 - 1 / offset))
    if not between.any():  # so few dims that any border between the two kinds will do
        fastest = frequencies[share < 0.5].max()
        slowest_kept = frequencies[share > 0.5].min(initial=np.inf)
        candidates.append((math.floor(1 / fastest), min(4.0, slowest_kept / fastest)))
    for original, high in candidates:
        original = round(original)
        expected = np.clip((original * frequencies - 1) / (high - 1), 0, 1)
        if high > 1 and np.abs(expected - share).max() < 1e-3:
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": float(high),
                "original_max_position_embeddings": original,
            }
    raise CheckpointError(
        f"{source.path}: tensor 'rope_freqs.weight' is not Llama 3's scaling, which is the only "
        f"one supported"
    )


def _llama(source: Source) -> dict[str, Any]:
    """Llama itself, and Mistral and Mixtral, which llama.cpp gives the same architecture."""
    experts = source.get("expert_count", 0)
    window = source.get("attention.sliding_window")
    if experts:
        return {
            **_decoder(source, "MixtralForCausalLM", "mixtral"),
            "num_local_experts": experts,
            "num_experts_per_tok": source.require("expert_used_count"),
            "sliding_window": window,
        }
    if window is not None:
        return {**_decoder(source, "MistralForCausalLM", "mistral"), "sliding_window": window}
    return {
        **_decoder(source, "LlamaForCausalLM", "llama"),
        "attention_bias": "blk.0.attn_q.bias" in source.shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in source.shapes,
    }


def _qwen2(source: Source) -> dict[str, Any]:
    return _decoder(source, "Qwen2ForCausalLM", "qwen2")


def _qwen3(source: Source) -> dict[str, Any]:
    return _decoder(source, "Qwen3ForCausalLM", "qwen3")


def _qwen3moe(source: Source) -> dict[str, Any]:
    config = _decoder(source, "Qwen3MoeForCausalLM", "qwen3_moe")
    layers = range(config["num_hidden_layers"])
    return {
        **config,
        "num_experts": source.require("expert_count"),
        "num_experts_per_tok": source.require("expert_used_count"),
        "moe_intermediate_size": source.require("expert_feed_forward_length"),
        "norm_topk_prob": source.get("expert_weights_norm", True),
        "mlp_only_layers": [
            layer for layer in layers if f"blk.{layer}.ffn_gate_inp.weight" not in source.shapes
        ],
    }


def _gemma(source: Source, architecture: str, model_type: str, layers_27b: int) -> dict[str, Any]:
    config = _decoder(source, architecture, model_type)
    # The 27B models scale queries by their hidden size per head, all others by the head's own.
    wide = config["num_hidden_layers"] == layers_27b
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if wide else config["head_dim"],
    }


def _gemma2(source: Source) -> dict[str, Any]:
    return {
        **_gemma(source, "Gemma2ForCausalLM", "gemma2", layers_27b=46),
        "sliding_window": source.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": source.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": source.get("final_logit_softcapping", 30.0),
    }


def _gemma3(source: Source) -> dict[str, Any]:
    config = {
        **_gemma(source, "Gemma3ForCausalLM", "gemma3_text", layers_27b=62),
        "rope_theta": source.get("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": source.get("rope.freq_base_swa", 10_000.0),
        "final_logit_softcapping": source.get("final_logit_softcapping"),
    }
    window = source.get("attention.sliding_window")
    pattern = source.metadata.get("gemma3.attention.sliding_window_pattern", 6)
    layers = config["num_hidden_layers"]
    if isinstance(pattern, np.ndarray):
        local = [bool(flag) for flag in pattern]
    else:
        local = [(layer + 1) % int(pattern) != 0 for layer in range(layers)]
    if window is None:
        local = [False] * layers
    kinds = ["sliding_attention" if flag else "full_attention" for flag in local]
    return {**config, "sliding_window": window, "layer_types": kinds}


def _gpt2(source: Source) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": source.require("embedding_length"),
        "n_inner": source.require("feed_forward_length"),
        "n_layer": source.require("block_count"),
        "n_head": source.require("attention.head_count"),
        "n_positions": source.require("context_length"),
        "layer_norm_epsilon": source.require("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


_TRANSLATORS: dict[str, Callable[[Source], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
}
