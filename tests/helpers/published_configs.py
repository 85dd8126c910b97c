"""What published checkpoints' config.json files say, so far as it shapes the math.

Keys and values are those of the Hugging Face repositories that PUBLISHED's keys are short for; keys
that no definition reads are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tensorray.builder.checkpoint.config import flatten_config
from tensorray.builder.model import Layout, Model
from tensorray.builder.registry import resolve


@dataclass(frozen=True)
class Published:
    """A checkpoint's config, and the tensor-parallel sizes to try it with."""

    config: dict[str, Any]
    ranks: tuple[int, ...] = (1, 2, 4, 8)

    def model(self, tp_size: int = 1) -> Model:
        flat = flatten_config(self.config, {})
        return resolve(flat)(flat, Layout(tp_size=tp_size))


def llama(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    }


def qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


QWEN2_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}

MIXTRAL_8X7B: dict[str, Any] = {
    **MISTRAL_7B,
    "architectures": ["MixtralForCausalLM"],
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}

QWEN3_30B_A3B: dict[str, Any] = {
    **qwen3(2048, 6144, 48, 32, tied=False),
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}

GEMMA2_9B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}

GEMMA3_27B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}

GPT2_XL: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 1600,
    "n_head": 25,
    "n_layer": 48,
    "n_positions": 1024,
    "vocab_size": 50257,
}

PUBLISHED: dict[str, Published] = {
    "Llama-3.1-8B": Published(llama(4096, 14336, 32, 32)),
    "Llama-3.1-70B": Published(llama(8192, 28672, 80, 64)),
    "Llama-3.1-405B": Published(llama(16384, 53248, 126, 128)),
    "Qwen3-0.6B": Published(qwen3(1024, 3072, 28, 16, tied=True)),
    "Qwen3-1.7B": Published(qwen3(2048, 6144, 28, 16, tied=True)),
    "Qwen3-4B": Published(qwen3(2560, 9728, 36, 32, tied=True)),
    "Qwen3-8B": Published(qwen3(4096, 12288, 36, 32, tied=False)),
    "Qwen3-14B": Published(qwen3(5120, 17408, 40, 40, tied=False)),
    "Qwen3-32B": Published(qwen3(5120, 25600, 64, 64, tied=False)),
    "Qwen2-7B": Published(QWEN2_7B, ranks=(1, 2, 4)),  # 28 heads
    "Mistral-7B-v0.1": Published(MISTRAL_7B),
    "Mixtral-8x7B-v0.1": Published(MIXTRAL_8X7B),
    "Qwen3-30B-A3B": Published(QWEN3_30B_A3B),
    "gemma-2-9b": Published(GEMMA2_9B),
    "gemma-3-27b": Published(GEMMA3_27B),
    "gpt2-xl": Published(GPT2_XL, ranks=(1, 5)),  # 25 heads
}
