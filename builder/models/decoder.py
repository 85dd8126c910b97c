"""The decoder most families share, as Llama shaped it; each family's file says what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tensorray.builder.model import KVSpec, Layout, Model, Weight, Weights
from tensorray.builder.models.blocks import (
    ACTIVATIONS,
    Attention,
    GatedMLP,
    Vocabulary,
    check_tensor_parallel,
    weight,
)
from tensorray.builder.models.config import ConfigReader, rope_spec
from tensorray.builder.ops import Ops, Tensor
from tensorray.builder.rope import RopeSpec


class Decoder(Model):
    """Pre-norm layers of rotary grouped-query attention and a gated MLP, RMS norms throughout.

    A family overrides the `make_*` methods and `windows`, which run once, at construction, and
    read the config through the `ConfigReader` they are given.
    """

    #: `tie_word_embeddings` where config.json leaves it out, as it does a family's default.
    tied_by_default: ClassVar[bool] = False
    #: `rope_theta` where config.json has none.
    default_rope_base: ClassVar[float] = 10000.0
    #: Added to every norm's weight at load.
    norm_add: ClassVar[float] = 0.0

    def __init__(self, config: Mapping[str, Any], layout: Layout | None = None) -> None:
        super().__init__(config, layout)
        c = ConfigReader(config)
        self.vocab_size = c.integer("vocab_size")
        self.hidden_size = c.integer("hidden_size")
        self.num_layers = c.integer("num_hidden_layers")
        self.num_heads = c.integer("num_attention_heads")
        self.num_kv_heads = c.integer("num_key_value_heads", default=self.num_heads)
        self.head_dim = self.read_head_dim(c)
        self.eps = c.number("rms_norm_eps", default=1e-6)
        self.tied = c.boolean("tie_word_embeddings", default=self.tied_by_default)
        check_tensor_parallel(self.layout, self.num_heads, self.num_kv_heads, *self.inner_sizes(c))

        self.rope = self.make_rope(c)
        self.max_positions = self.rope.max_positions
        self.layer_windows = self.windows(c)
        self.vocabulary = Vocabulary(self.layout, self.vocab_size, self.hidden_size)
        self.attention = self.make_attention(c)
        self.make_mlp(c)

    # --- what families override -------------------------------------------------------------

    def read_head_dim(self, c: ConfigReader) -> int:
        if c.has("head_dim"):
            return c.integer("head_dim")
        if self.hidden_size % self.num_heads:
            raise c.error(
                "num_attention_heads",
                f"{self.num_heads} does not divide hidden_size, "
                f"{self.hidden_size}, and there is no head_dim",
            )
        return self.hidden_size // self.num_heads

    def inner_sizes(self, c: ConfigReader) -> tuple[int, ...]:
        """The MLPs' inner sizes, all of which tensor parallelism has to divide."""
        return (c.integer("intermediate_size"),)

    def make_rope(self, c: ConfigReader) -> RopeSpec:
        return rope_spec(c, self.head_dim, default_base=self.default_rope_base)

    def windows(self, c: ConfigReader) -> list[int | None]:
        """Each layer's attention window."""
        return [None] * self.num_layers

    def make_attention(self, c: ConfigReader) -> Attention:
        return self.attention_block()

    def attention_block(self, **options: Any) -> Attention:
        """An attention block of the config's sizes, with further options of `Attention`'s."""
        return Attention(
            self.layout,
            hidden=self.hidden_size,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            norm_add=self.norm_add,
            **options,
        )

    def make_mlp(self, c: ConfigReader) -> None:
        """Set what `mlp_weights` and `run_mlp` use."""
        self.dense = self.dense_block(c)

    def dense_block(self, c: ConfigReader, *, bias: bool = False) -> GatedMLP:
        return GatedMLP(
            self.layout,
            hidden=self.hidden_size,
            inner=c.integer("intermediate_size"),
            activation=c.choice("hidden_activation", "hidden_act", among=ACTIVATIONS),
            bias=bias,
        )

    def mlp_weights(self, layer: int) -> dict[str, Weight]:
        return self.dense.weights(f"model.layers.{layer}.mlp")

    def run_mlp(self, op: Ops, w: Weights, x: Tensor, layer: int) -> Tensor:
        return self.dense(op, w, x)

    # --- the definition -----------------------------------------------------------------------

    def norm_weight(self, name: str) -> Weight:
        return weight(f"{name}.weight", self.hidden_size, add=self.norm_add)

    def embed_weights(self) -> dict[str, Weight]:
        return {"tokens": self.vocabulary.weight("model.embed_tokens.weight")}

    def layer_weights(self, layer: int) -> dict[str, Weight]:
        at = f"model.layers.{layer}"
        return {
            "attention_norm": self.norm_weight(f"{at}.input_layernorm"),
            **self.attention.weights(f"{at}.self_attn"),
            "mlp_norm": self.norm_weight(f"{at}.post_attention_layernorm"),
            **self.mlp_weights(layer),
        }

    def head_weights(self) -> dict[str, Weight]:
        name = "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        return {"norm": self.norm_weight("model.norm"), "tokens": self.vocabulary.weight(name)}

    def kv_spec(self, layer: int) -> KVSpec:
        return self.attention.kv_spec(self.layer_windows[layer])

    def embed(self, op: Ops, w: Weights, tokens: Tensor) -> Tensor:
        return self.vocabulary.embed(op, w.tokens, tokens)

    def layer(self, op: Ops, w: Weights, x: Tensor, layer: int) -> Tensor:
        y = op.rms_norm(x, w.attention_norm, self.eps)
        x = op.add_residual(x, self.attention(op, w, y, layer, self.rope))
        y = op.rms_norm(x, w.mlp_norm, self.eps)
        return op.add_residual(x, self.run_mlp(op, w, y, layer))

    def head(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        return self.project(op, w, self.final_norm(op, w, x))

    def final_norm(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        return op.rms_norm(x, w.norm, self.eps)

    def project(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        return self.vocabulary.logits(op, w.tokens, x)
