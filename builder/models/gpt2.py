"""GPT-2 (Radford et al., 2019): learned positions, layer norms, biases, one fused q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorray.builder.model import KVSpec, Layout, Model, Part, Shard, Weight, Weights
from tensorray.builder.models.blocks import (
    ACTIVATIONS,
    Vocabulary,
    check_tensor_parallel,
    project_out,
    weight,
)
from tensorray.builder.models.config import ConfigReader
from tensorray.builder.ops import Ops, Tensor


class GPT2(Model):
    """Its checkpoints store projections as `[in, out]`."""

    architectures = ("GPT2LMHeadModel",)

    def __init__(self, config: Mapping[str, Any], layout: Layout | None = None) -> None:
        super().__init__(config, layout)
        c = ConfigReader(config)
        self.vocab_size = c.integer("vocab_size")
        self.hidden_size = c.integer("n_embd", "hidden_size")
        self.num_layers = c.integer("n_layer", "num_hidden_layers")
        self.num_heads = c.integer("n_head", "num_attention_heads")
        self.max_positions = c.integer("n_positions", "n_ctx", "max_position_embeddings")
        self.inner = c.integer("n_inner", default=4 * self.hidden_size)
        self.eps = c.number("layer_norm_epsilon", default=1e-5)
        self.activation = c.choice("activation_function", among=ACTIVATIONS, default="gelu_new")
        self.tied = c.boolean("tie_word_embeddings", default=True)
        self.scale_by_size = c.boolean("scale_attn_weights", default=True)
        self.scale_by_layer = c.boolean("scale_attn_by_inverse_layer_idx", default=False)
        c.refuse("add_cross_attention", False)
        if self.hidden_size % self.num_heads:
            raise c.error("n_head", f"{self.num_heads} does not divide n_embd, {self.hidden_size}")
        check_tensor_parallel(self.layout, self.num_heads, self.num_heads, self.inner)

        self.head_dim = self.hidden_size // self.num_heads
        self.own_heads = self.num_heads // self.layout.tp_size
        self.qkv_sizes = (self.own_heads * self.head_dim,) * 3
        self.vocabulary = Vocabulary(self.layout, self.vocab_size, self.hidden_size)

    def embed_weights(self) -> dict[str, Weight]:
        return {
            "tokens": self.vocabulary.weight("transformer.wte.weight"),
            "positions": weight("transformer.wpe.weight", self.max_positions, self.hidden_size),
        }

    def layer_weights(self, layer: int) -> dict[str, Weight]:
        at = f"transformer.h.{layer}"
        hidden, inner = self.hidden_size, self.inner
        qkv = [(i * hidden, (i + 1) * hidden) for i in range(3)]
        qkv_name, qkv_shape = f"{at}.attn.c_attn.weight", (hidden, 3 * hidden)
        bias_name, bias_shape = f"{at}.attn.c_attn.bias", (3 * hidden,)
        return {
            **self._norm("attention_norm", f"{at}.ln_1"),
            "qkv": Weight(
                tuple(Part(qkv_name, qkv_shape, "rows", rows, transpose=True) for rows in qkv)
            ),
            "qkv_bias": Weight(tuple(Part(bias_name, bias_shape, "rows", rows) for rows in qkv)),
            "o": _transposed(f"{at}.attn.c_proj.weight", hidden, hidden, "columns"),
            "o_bias": weight(f"{at}.attn.c_proj.bias", hidden),
            **self._norm("mlp_norm", f"{at}.ln_2"),
            "up": _transposed(f"{at}.mlp.c_fc.weight", hidden, inner, "rows"),
            "up_bias": weight(f"{at}.mlp.c_fc.bias", inner, shard="rows"),
            "down": _transposed(f"{at}.mlp.c_proj.weight", inner, hidden, "columns"),
            "down_bias": weight(f"{at}.mlp.c_proj.bias", hidden),
        }

    def head_weights(self) -> dict[str, Weight]:
        name = "transformer.wte.weight" if self.tied else "lm_head.weight"
        return {**self._norm("norm", "transformer.ln_f"), "tokens": self.vocabulary.weight(name)}

    def _norm(self, key: str, name: str) -> dict[str, Weight]:
        return {
            key: weight(f"{name}.weight", self.hidden_size),
            f"{key}_bias": weight(f"{name}.bias", self.hidden_size),
        }

    def kv_spec(self, layer: int) -> KVSpec:
        return KVSpec(self.own_heads, self.head_dim)

    def embed(self, op: Ops, w: Weights, tokens: Tensor) -> Tensor:
        return op.add_residual(self.token_rows(op, w, tokens), op.position_embedding(w.positions))

    def token_rows(self, op: Ops, w: Weights, tokens: Tensor) -> Tensor:
        return self.vocabulary.embed(op, w.tokens, tokens)

    def layer(self, op: Ops, w: Weights, x: Tensor, layer: int) -> Tensor:
        y = op.layer_norm(x, w.attention_norm, w.attention_norm_bias, self.eps)
        q, k, v = op.split(op.linear(y, w.qkv, w.qkv_bias), self.qkv_sizes)
        q, k, v = (op.heads(part, self.head_dim) for part in (q, k, v))
        y = op.attention(q, k, v, layer, scale=self._scale(layer))
        x = op.add_residual(x, project_out(op, op.merge_heads(y), w.o, w.o_bias))
        y = op.layer_norm(x, w.mlp_norm, w.mlp_norm_bias, self.eps)
        y = self.activation(op, op.linear(y, w.up, w.up_bias))
        return op.add_residual(x, project_out(op, y, w.down, w.down_bias))

    def head(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        return self.project(op, w, self.final_norm(op, w, x))

    def final_norm(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        return op.layer_norm(x, w.norm, w.norm_bias, self.eps)

    def project(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        return self.vocabulary.logits(op, w.tokens, x)

    def _scale(self, layer: int) -> float:
        scale = self.head_dim**-0.5 if self.scale_by_size else 1.0
        return scale / (layer + 1) if self.scale_by_layer else scale


def _transposed(name: str, inputs: int, outputs: int, shard: Shard) -> Weight:
    return Weight((Part(name, (inputs, outputs), shard, transpose=True),))
