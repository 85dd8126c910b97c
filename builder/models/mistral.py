"""Mistral 7B and its successors (arXiv 2310.06825): a sliding window over every layer."""

from __future__ import annotations

from tensorray.builder.models.config import ConfigReader
from tensorray.builder.models.decoder import Decoder


class Mistral(Decoder):
    """The shared decoder; `sliding_window` null (from v0.2 on) means full attention."""

    architectures = ("MistralForCausalLM",)

    def windows(self, c: ConfigReader) -> list[int | None]:
        return [c.optional_integer("sliding_window")] * self.num_layers
