"""Qwen 3, dense (arXiv 2505.09388): RMS norms on each head's q and k in place of biases."""

from __future__ import annotations

from tensorray.builder.models.blocks import Attention
from tensorray.builder.models.config import ConfigReader
from tensorray.builder.models.decoder import Decoder
from tensorray.builder.models.qwen2 import late_windows


class Qwen3(Decoder):
    architectures = ("Qwen3ForCausalLM",)
    wide_residual = True  # some of its sizes are known for infinities in float16

    def read_head_dim(self, c: ConfigReader) -> int:
        return c.integer("head_dim", default=128)

    def make_attention(self, c: ConfigReader) -> Attention:
        bias = c.boolean("attention_bias", default=False)
        return self.attention_block(qkv_bias=bias, o_bias=bias, qk_norm_eps=self.eps)

    def windows(self, c: ConfigReader) -> list[int | None]:
        return late_windows(c, self.num_layers)
