"""A model of your own, in your own file: attention and MLP side by side, from one norm.

    tensorray generate --model DIRECTORY --model-class deploy/examples/custom_model.py:ParallelLlama

A definition says three things, and computes nothing itself:

- which checkpoint tensors it needs (`embed_weights`, `layer_weights`, `head_weights`): each
  `Weight` is one array in memory, made of one or more tensors stacked on their first axis; a
  missing tensor or a wrong shape is reported before anything is served;
- what a layer keeps in the KV cache (`kv_spec`);
- its math (`embed`, `layer`, `head`), written against the op set in builder/ops.py. The tokens of
  all running sequences come packed, as `[T, hidden]`; ops that need to know where a token belongs
  (rope, attention) know it, so the same lines run a prompt, a chunk of one, or a decode step.

This one could subclass `Llama` and override `layer` alone, or use the blocks in
builder/models/blocks.py; it is written out to show all there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorray.builder.model import KVSpec, Layout, Model, ModelConfigError, Part, Weight, Weights
from tensorray.builder.ops import Ops, Tensor
from tensorray.builder.rope import RopeSpec


class ParallelLlama(Model):
    """Llama's tensors, with `x + attention(norm(x)) + mlp(norm(x))` for a layer."""

    # With an entry of config.json's `architectures` here and the class in builder/registry.py,
    # --model-class is not needed.
    architectures = ()

    def __init__(self, config: Mapping[str, Any], layout: Layout | None = None) -> None:
        super().__init__(config, layout)
        if self.layout.tp_size != 1:
            raise ModelConfigError("ParallelLlama runs on one rank; see blocks.py for how to split")
        self.vocab_size = config["vocab_size"]
        self.hidden_size = config["hidden_size"]
        self.num_layers = config["num_hidden_layers"]
        self.max_positions = config["max_position_embeddings"]
        self.inner = config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.head_dim = self.hidden_size // self.heads
        self.eps = config["rms_norm_eps"]
        self.rope = RopeSpec(self.head_dim, self.max_positions, base=10000.0)

    def embed_weights(self) -> dict[str, Weight]:
        return {"tokens": stacked((self.vocab_size, self.hidden_size), "model.embed_tokens")}

    def layer_weights(self, layer: int) -> dict[str, Weight]:
        at, hidden = f"model.layers.{layer}", self.hidden_size
        q, k, v, o = (f"{at}.self_attn.{name}_proj" for name in "qkvo")
        return {
            "norm": stacked((hidden,), f"{at}.input_layernorm"),
            "qkv": stacked((hidden, hidden), q, k, v),
            "o": stacked((hidden, hidden), o),
            "gate_up": stacked((self.inner, hidden), f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
            "down": stacked((hidden, self.inner), f"{at}.mlp.down_proj"),
        }

    def head_weights(self) -> dict[str, Weight]:
        return {
            "norm": stacked((self.hidden_size,), "model.norm"),
            "tokens": stacked((self.vocab_size, self.hidden_size), "lm_head"),
        }

    def kv_spec(self, layer: int) -> KVSpec:
        return KVSpec(kv_heads=self.heads, head_dim=self.head_dim, window=None)

    def embed(self, op: Ops, w: Weights, tokens: Tensor) -> Tensor:
        return op.embedding(tokens, w.tokens)

    def layer(self, op: Ops, w: Weights, x: Tensor, layer: int) -> Tensor:
        y = op.rms_norm(x, w.norm, self.eps)
        q, k, v = op.split(op.linear(y, w.qkv), [self.hidden_size] * 3)
        q, k, v = (op.heads(part, self.head_dim) for part in (q, k, v))
        q, k = op.rope(q, k, self.rope)
        attended = op.attention(q, k, v, layer, scale=self.head_dim**-0.5)
        gate, up = op.split(op.linear(y, w.gate_up), [self.inner] * 2)
        mlp = op.linear(op.silu(gate) * up, w.down)
        return op.add_residual(x, op.linear(op.merge_heads(attended), w.o) + mlp)

    def head(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        return op.linear(op.rms_norm(x, w.norm, self.eps), w.tokens)


def stacked(shape: tuple[int, ...], *names: str) -> Weight:
    """Tensors of one shape, one below the other."""
    return Weight(tuple(Part(f"{name}.weight", shape) for name in names))
