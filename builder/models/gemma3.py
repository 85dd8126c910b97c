"""Gemma 3, text (arXiv 2503.19786): five local layers to a global one, each kind with its RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorray.builder.model import Layout
from tensorray.builder.models.config import ConfigReader, rope_spec
from tensorray.builder.models.gemma2 import Gemma2
from tensorray.builder.rope import RopeSpec

# The published multimodal configs leave out of their text model what equals these defaults.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}


class Gemma3(Gemma2):
    """Gemma 2's layers with q and k norms in place of the attention soft cap.

    Of a multimodal checkpoint only the text model is used.
    """

    architectures = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")

    def __init__(self, config: Mapping[str, Any], layout: Layout | None = None) -> None:
        if config.get("architectures") == ["Gemma3ForConditionalGeneration"]:
            config = {**DEFAULTS, **config}
        super().__init__(config, layout)

    def attention_options(self, c: ConfigReader) -> dict[str, float | None]:
        c.refuse("attn_logit_softcapping")
        return {"qk_norm_eps": self.eps}

    def windows(self, c: ConfigReader) -> list[int | None]:
        return self.windows_every(c, c.integer("sliding_window_pattern", default=6))

    def make_rope(self, c: ConfigReader) -> RopeSpec:
        """The global layers' embedding; sets the local layers' beside it."""
        if c.subsection("rope_parameters"):
            self.local_rope = rope_spec(c, self.head_dim, layer_type="sliding_attention")
            return rope_spec(
                c, self.head_dim, layer_type="full_attention", default_base=1_000_000.0
            )
        spec = rope_spec(c, self.head_dim, default_base=1_000_000.0)
        base = c.number("rope_local_base_freq", default=10_000.0)
        self.local_rope = RopeSpec(spec.rotary_dim, spec.max_positions, base)
        return spec

    def layer_rope(self, layer: int) -> RopeSpec:
        return self.rope if self.layer_windows[layer] is None else self.local_rope
