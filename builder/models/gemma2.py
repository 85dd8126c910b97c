"""Gemma 2 (arXiv 2408.00118): norms around each block, soft caps, windows on every other layer."""

from __future__ import annotations

import math
from typing import ClassVar

from tensorray.builder.model import Weight, Weights
from tensorray.builder.models.blocks import Attention
from tensorray.builder.models.config import ConfigReader
from tensorray.builder.models.decoder import Decoder
from tensorray.builder.ops import Ops, Tensor
from tensorray.builder.rope import RopeSpec


class Gemma2(Decoder):
    """The shared decoder, with norms after the blocks too and an embedding scaled by sqrt(hidden).

    The scale is rounded to the residual stream's dtype, as the multiplication does by itself.
    """

    architectures: ClassVar[tuple[str, ...]] = ("Gemma2ForCausalLM",)
    wide_residual = True  # Gemma 3 270M's reaches 104,000
    tied_by_default = True
    norm_add = 1.0

    def make_attention(self, c: ConfigReader) -> Attention:
        c.refuse("use_bidirectional_attention", False)
        bias = c.boolean("attention_bias", default=False)
        return self.attention_block(
            qkv_bias=bias,
            o_bias=bias,
            scale=c.number("query_pre_attn_scalar", default=256) ** -0.5,
            **self.attention_options(c),
        )

    def attention_options(self, c: ConfigReader) -> dict[str, float | None]:
        return {"softcap": c.optional_number("attn_logit_softcapping")}

    def windows(self, c: ConfigReader) -> list[int | None]:
        return self.windows_every(c, 2)

    def windows_every(self, c: ConfigReader, period: int) -> list[int | None]:
        """Windows by `layer_types`, or on all layers but each period's last."""
        kinds = c.layer_kinds(self.num_layers) or [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(self.num_layers)
        ]
        window = c.integer("sliding_window") if "sliding_attention" in kinds else None
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def make_mlp(self, c: ConfigReader) -> None:
        super().make_mlp(c)
        self.embedding_scale = math.sqrt(self.hidden_size)
        self.final_softcap = c.optional_number("final_logit_softcapping")

    def layer_rope(self, layer: int) -> RopeSpec:
        return self.rope

    def layer_weights(self, layer: int) -> dict[str, Weight]:
        at = f"model.layers.{layer}"
        return {
            "attention_norm": self.norm_weight(f"{at}.input_layernorm"),
            **self.attention.weights(f"{at}.self_attn"),
            "after_attention_norm": self.norm_weight(f"{at}.post_attention_layernorm"),
            "mlp_norm": self.norm_weight(f"{at}.pre_feedforward_layernorm"),
            **self.mlp_weights(layer),
            "after_mlp_norm": self.norm_weight(f"{at}.post_feedforward_layernorm"),
        }

    def embed(self, op: Ops, w: Weights, tokens: Tensor) -> Tensor:
        return self.token_rows(op, w, tokens) * self.embedding_scale

    def token_rows(self, op: Ops, w: Weights, tokens: Tensor) -> Tensor:
        return super().embed(op, w, tokens)

    def layer(self, op: Ops, w: Weights, x: Tensor, layer: int) -> Tensor:
        y = op.rms_norm(x, w.attention_norm, self.eps)
        y = self.attention(op, w, y, layer, self.layer_rope(layer))
        x = op.add_residual(x, op.rms_norm(y, w.after_attention_norm, self.eps))
        y = op.rms_norm(x, w.mlp_norm, self.eps)
        y = self.run_mlp(op, w, y, layer)
        return op.add_residual(x, op.rms_norm(y, w.after_mlp_norm, self.eps))

    def project(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        logits = super().project(op, w, x)
        return logits if self.final_softcap is None else op.softcap(logits, self.final_softcap)
