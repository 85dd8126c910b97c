"""Make tests/fixtures/pooling.npz: pooled last hidden states of the tiny models, as transformers
computes them one sequence at a time. Needs torch and transformers:

    python tests/reference/make_pooling_golden.py

For each model: `MODEL_prompt_I` int32 [n], and `MODEL_last_I`, `MODEL_mean_I`, `MODEL_cls_I`,
float32 [hidden].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = ("qwen3", "gemma3", "gpt2", "llama3")
LENGTHS = (26, 3, 1, 45)

if __name__ == "__main__":
    draw = np.random.default_rng(0)
    arrays = {}
    for name in MODELS:
        model = AutoModel.from_pretrained(FIXTURES / "models" / name).eval()
        for i, length in enumerate(LENGTHS):
            prompt = draw.integers(3, 260, length).astype(np.int32)
            with torch.no_grad():
                states = model(torch.tensor(prompt[None].astype(np.int64))).last_hidden_state[0]
            arrays[f"{name}_prompt_{i}"] = prompt
            arrays[f"{name}_last_{i}"] = states[-1].numpy()
            arrays[f"{name}_mean_{i}"] = states.double().mean(0).float().numpy()
            arrays[f"{name}_cls_{i}"] = states[0].numpy()
    np.savez(FIXTURES / "pooling.npz", **arrays)
