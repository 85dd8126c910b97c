"""EAGLE drafts in their authors' layout, and what they compute, written down plainly: whole
sequences, no cache, no batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[np.float64]

HEADS, KV_HEADS, INNER, EPS, BASE = 4, 2, 48, 1e-5, 10000.0


def write_eagle(
    path: Path,
    *,
    hidden: int = 32,
    vocab: int = 272,
    eagle3: bool = False,
    draft_vocab: int = 120,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A draft of random weights; `changes` are tensors to replace, or, None, to leave out."""
    rng = np.random.default_rng(seed)
    head_dim = hidden // HEADS

    def matrix(rows: int, columns: int) -> Any:
        return rng.normal(0, 0.3, (rows, columns)).astype(np.float32)

    def norm() -> Any:
        return rng.uniform(0.5, 1.5, hidden).astype(np.float32)

    at = "midlayer" if eagle3 else "layers.0"
    inputs = 2 * hidden if eagle3 else hidden
    tensors: dict[str, Any] = {
        "fc.weight": matrix(hidden, (3 if eagle3 else 2) * hidden),
        f"{at}.self_attn.q_proj.weight": matrix(HEADS * head_dim, inputs),
        f"{at}.self_attn.k_proj.weight": matrix(KV_HEADS * head_dim, inputs),
        f"{at}.self_attn.v_proj.weight": matrix(KV_HEADS * head_dim, inputs),
        f"{at}.self_attn.o_proj.weight": matrix(hidden, HEADS * head_dim),
        f"{at}.mlp.gate_proj.weight": matrix(INNER, hidden),
        f"{at}.mlp.up_proj.weight": matrix(INNER, hidden),
        f"{at}.mlp.down_proj.weight": matrix(hidden, INNER),
        f"{at}.post_attention_layernorm.weight": norm(),
        "embed_tokens.weight": matrix(vocab, hidden),
    }
    if eagle3:
        chosen = np.sort(rng.choice(vocab, draft_vocab, replace=False))
        tensors |= {
            f"{at}.input_layernorm.weight": norm(),
            f"{at}.hidden_norm.weight": norm(),
            "norm.weight": norm(),
            "lm_head.weight": matrix(draft_vocab, hidden),
            "d2t": (chosen - np.arange(draft_vocab)).astype(np.int64),
            "t2d": np.isin(np.arange(vocab), chosen),
        }
    else:
        tensors["fc.bias"] = rng.normal(0, 0.1, hidden).astype(np.float32)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    settings = {
        "architectures": ["LlamaForCausalLMEagle3" if eagle3 else "LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": INNER,
        "max_position_embeddings": 48,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": 1,
        "rms_norm_eps": EPS,
        "rope_theta": BASE,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }
    if eagle3:
        settings |= {
            "draft_vocab_size": draft_vocab,
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        }
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings | (config or {})))
    return path


class PlainEagle:
    """What a draft of `write_eagle` computes, in float64."""

    def __init__(
        self, tensors: dict[str, Any], *, eagle3: bool, adds_to_normed: bool = False
    ) -> None:
        self.eagle3 = eagle3
        self.adds_to_normed = adds_to_normed
        self.at = "midlayer" if eagle3 else "layers.0"
        self.w = {name: np.asarray(t, np.float64) for name, t in tensors.items()}

    def norm(self, x: Array, name: str) -> Array:
        scaled: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * self.w[name]
        return scaled

    def linear(self, x: Array, name: str) -> Array:
        y: Array = x @ self.w[f"{self.at}.{name}.weight"].T
        return y

    def attention(self, x: Array) -> Array:
        n = len(x)
        q, k, v = (self.linear(x, f"self_attn.{p}_proj").reshape(n, -1, 8) for p in "qkv")
        angles = np.arange(n)[:, None] / BASE ** (np.arange(0, 8, 2) / 8)
        turn = np.exp(1j * angles)[:, None]

        def turned(y: Array) -> Array:
            z = (y[..., :4] + 1j * y[..., 4:]) * turn
            return np.concatenate([z.real, z.imag], -1)

        q, k = turned(q), np.repeat(turned(k), HEADS // KV_HEADS, 1)
        v = np.repeat(v, HEADS // KV_HEADS, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(8)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return self.linear(np.einsum("hqk,khd->qhd", shares, v).reshape(n, -1), "self_attn.o_proj")

    def layer(self, embeds: Array, hidden: Array) -> Array:
        if self.eagle3:
            normed = self.norm(embeds, f"{self.at}.input_layernorm.weight")
            own = self.norm(hidden, f"{self.at}.hidden_norm.weight")
            x = np.concatenate([normed, own], -1)
            hidden = own if self.adds_to_normed else hidden
        else:
            hidden = np.concatenate([embeds, hidden], -1) @ self.w["fc.weight"].T
            x = hidden = hidden + self.w["fc.bias"]
        hidden = hidden + self.attention(x)
        y = self.norm(hidden, f"{self.at}.post_attention_layernorm.weight")
        gate = self.linear(y, "mlp.gate_proj")
        inner = gate / (1 + np.exp(-gate)) * self.linear(y, "mlp.up_proj")
        return hidden + self.linear(inner, "mlp.down_proj")

    def guesses(
        self, tokens: list[int], states: Array, projection: Array, count: int
    ) -> tuple[list[int], list[Array]]:
        """The likeliest `count` tokens after `tokens`, and the logits that they are read from.

        `states`: of all tokens but the newest, the large model's normed last hidden states, or,
        EAGLE-3, the three layers' side by side. `projection` [vocab, hidden] is its head's.
        """
        tokens, found = list(tokens), []
        hidden = states @ self.w["fc.weight"].T if self.eagle3 else states
        for _ in range(count):
            out = self.layer(self.w["embed_tokens.weight"][tokens[1:]], hidden)
            if self.eagle3:
                row = self.norm(out[-1], "norm.weight") @ self.w["lm_head.weight"].T
                logits = np.full(len(projection), -np.inf)
                for place, offset in enumerate(self.w["d2t"].astype(int)):
                    logits[place + offset] = row[place]
            else:
                logits = projection @ out[-1]
            found.append(logits)
            tokens.append(int(logits.argmax()))
            hidden = np.concatenate([hidden, out[-1:]])
        return tokens[-count:], found
