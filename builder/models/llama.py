"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and the many checkpoints that share its shape."""

from __future__ import annotations

from tensorray.builder.models.blocks import Attention
from tensorray.builder.models.config import ConfigReader
from tensorray.builder.models.decoder import Decoder


class Llama(Decoder):
    """The shared decoder, with biases where the config asks for them."""

    architectures = ("LlamaForCausalLM", "LLaMAForCausalLM")

    def make_attention(self, c: ConfigReader) -> Attention:
        bias = c.boolean("attention_bias", default=False)
        return self.attention_block(qkv_bias=bias, o_bias=bias)

    def make_mlp(self, c: ConfigReader) -> None:
        self.dense = self.dense_block(c, bias=c.boolean("mlp_bias", default=False))
