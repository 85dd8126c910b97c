"""Qwen 2 and 2.5 (arXiv 2407.10671, 2412.15115): biases on q, k and v, windows on later layers."""

from __future__ import annotations

from tensorray.builder.models.blocks import Attention
from tensorray.builder.models.config import ConfigReader
from tensorray.builder.models.decoder import Decoder


class Qwen2(Decoder):
    architectures = ("Qwen2ForCausalLM",)
    wide_residual = True  # some of its sizes are known for infinities in float16

    def make_attention(self, c: ConfigReader) -> Attention:
        return self.attention_block(qkv_bias=True)

    def windows(self, c: ConfigReader) -> list[int | None]:
        return late_windows(c, self.num_layers)


def late_windows(c: ConfigReader, num_layers: int) -> list[int | None]:
    """Windows by `layer_types`, or from layer `max_window_layers` on; none unless switched on."""
    if not c.boolean("use_sliding_window", default=False):
        return [None] * num_layers
    window = c.integer("sliding_window")
    kinds = c.layer_kinds(num_layers)
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = c.integer("max_window_layers", minimum=0)
    return [window if layer >= first else None for layer in range(num_layers)]
