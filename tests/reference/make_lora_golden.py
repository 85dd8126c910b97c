"""Make the adapters of tests/fixtures/lora, and what PEFT computes with them.

Needs torch, transformers and peft, which the project itself does not:

    python tests/reference/make_lora_golden.py

Adapters are random, for the tiny checkpoints of tests/fixtures/models, and saved by PEFT's own
`save_pretrained`. Beside an adapter, reference.npz has `prompt` int32 `[n]`, `logits` float32
`[n, vocab]` and `greedy` int32 `[12]`, the greedy continuation.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parents[1] / "fixtures"
GREEDY_TOKENS = 12

CASES: dict[str, dict[str, Any]] = {
    "llama3": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "qwen3": {
        "r": 8,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": r".*\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.up_proj)",
    },
    "gemma3": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"^model.layers.2.mlp.gate_proj": 16, "o_proj": 12},
        "layers_to_transform": [0, 1, 2, 4],
    },
    "gpt2": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "fan_in_fan_out": True,
    },
    "llama2": {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj", "lm_head"]},
}


def make(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(len(name))
    directory = FIXTURES / "models" / name
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with np.load(directory / "reference.npz") as known:
        prompt = known["prompt_0"]
    tokens = torch.tensor(prompt[None].astype(np.int64))
    with torch.no_grad():
        before = model(tokens).logits
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                parameter.normal_(0, 0.4)
        logits = model(tokens).logits
        assert (logits - before).abs().max() > 0.5, "the adapter does not matter"
        for _ in range(GREEDY_TOKENS):
            choice = model(tokens, use_cache=False).logits[0, -1].argmax()
            tokens = torch.cat([tokens, choice[None, None]], dim=1)
    target = FIXTURES / "lora" / name
    shutil.rmtree(target, ignore_errors=True)
    model.base_model.config.name_or_path = name
    model.peft_config["default"].base_model_name_or_path = name
    model.save_pretrained(target, save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)
    np.savez_compressed(
        target / "reference.npz",
        prompt=prompt,
        logits=logits[0].numpy(),
        greedy=tokens[0, len(prompt) :].numpy().astype(np.int32),
    )


if __name__ == "__main__":
    for case, chosen in CASES.items():
        make(case, chosen)
