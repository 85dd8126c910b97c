"""EAGLE's drafts: one layer that goes on from a large model's hidden states to its next ones.

EAGLE (Li et al., arXiv 2401.15077) puts the next token's embedding beside the last hidden state,
brings both to one width and runs a layer of Llama's kind without its first norm; the large model's
own head reads what comes out. EAGLE-3 (arXiv 2503.01840) starts from the hidden states between
layers at three depths, has attention read embedding and hidden state at twice the width, each
normed, and ends in a head of its own over the commoner tokens.

These are definitions for the array interpreter alone: setting arrays beside each other is not in
the op set. They are no models by themselves, and so in no registry.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tensorray.builder.model import Model, ModelConfigError, Weight, Weights
from tensorray.builder.models.blocks import Attention, weight
from tensorray.builder.models.config import ConfigReader
from tensorray.builder.models.decoder import Decoder
from tensorray.builder.ops import Tensor
from tensorray.builder.rope import RopeSpec

_AT = "model.layers.0"
_EMBEDDING = "model.embed_tokens.weight"


class Eagle(Decoder):
    """The draft of EAGLE, to the names and shapes that its authors publish."""

    #: What it reads of the large model: the inputs of these layers; their number: the last output.
    reads: tuple[int, ...]

    def __init__(self, config: Mapping[str, Any], target: Model, names: Collection[str]) -> None:
        """`target` is the model it drafts for, `names` are its checkpoint's tensors. Raises
        ModelConfigError for what does not fit."""
        self.target = target
        self.names = names
        super().__init__(config)
        c = ConfigReader(config)
        if self.num_layers != 1:
            raise c.error("num_hidden_layers", f"an EAGLE draft has 1, not {self.num_layers}")
        if self.vocab_size != target.vocab_size:
            raise c.error(
                "vocab_size",
                f"the draft was made for {self.vocab_size} tokens; the model has "
                f"{target.vocab_size}",
            )
        self.check_width(c)
        self.reads = self.choose_layers(c)

    @property
    def has_embedding(self) -> bool:
        """Whether its checkpoint has one; else it reads the large model's."""
        return _EMBEDDING in self.names

    # --- what EAGLE-3 has otherwise ---------------------------------------------------------------

    def check_width(self, c: ConfigReader) -> None:
        if self.hidden_size != self.target.hidden_size:
            raise c.error(
                "hidden_size",
                f"the draft was made for a model of {self.hidden_size}; this one has "
                f"{self.target.hidden_size}",
            )

    def choose_layers(self, c: ConfigReader) -> tuple[int, ...]:
        return (self.target.num_layers,)

    def make_attention(self, c: ConfigReader) -> Attention:
        return self.attention_block(**self.biases())

    def make_rope(self, c: ConfigReader) -> RopeSpec:
        """Published configs state the lengths that drafts were trained on, often short ones, and
        the authors' code goes on from there."""
        spec = super().make_rope(c)
        if spec.scaling == "none":
            spec = replace(spec, max_positions=max(spec.max_positions, self.target.max_positions))
        return spec

    def biases(self) -> dict[str, bool]:
        return {
            "qkv_bias": f"{_AT}.self_attn.q_proj.bias" in self.names,
            "o_bias": f"{_AT}.self_attn.o_proj.bias" in self.names,
        }

    # --- the definition ---------------------------------------------------------------------------

    def embed_weights(self) -> dict[str, Weight]:
        return {"tokens": self.vocabulary.weight(_EMBEDDING)} if self.has_embedding else {}

    def layer_weights(self, layer: int) -> dict[str, Weight]:
        weights = {
            "fc": weight("fc.weight", self.hidden_size, 2 * self.hidden_size),
            **self.attention.weights(f"{_AT}.self_attn"),
            "mlp_norm": self.norm_weight(f"{_AT}.post_attention_layernorm"),
            **self.mlp_weights(layer),
        }
        if "fc.bias" in self.names:
            weights["fc_bias"] = weight("fc.bias", self.hidden_size)
        return weights

    def head_weights(self) -> dict[str, Weight]:
        return {}

    def layer(self, op: Any, w: Weights, x: Tensor, layer: int) -> Tensor:
        """Embeddings and hidden states beside each other, `[T, 2 * hidden]` -> the hidden states
        one place further, `[T, hidden]`."""
        x = op.linear(x, w.fc, w.get("fc_bias"))
        x = op.add_residual(x, self.attention(op, w, x, layer, self.rope))
        y = op.rms_norm(x, w.mlp_norm, self.eps)
        return op.add_residual(x, self.run_mlp(op, w, y, layer))

    def fuse(self, op: Any, w: Weights, states: list[Tensor]) -> Tensor:
        """What it reads of the large model, `[T, target hidden]` each -> the hidden states that it
        goes on from, `[T, hidden]`. (The last one's norm comes before.)"""
        return states[0]


class Eagle3(Eagle):
    """The draft of EAGLE-3."""

    def __init__(self, config: Mapping[str, Any], target: Model, names: Collection[str]) -> None:
        super().__init__(config, target, names)
        c = ConfigReader(config)
        c.refuse("norm_before_fc", False)
        #: Whether what attention adds to is the hidden state as it is normed.
        self.adds_to_normed = c.boolean("norm_before_residual", default=False)
        #: Tokens that it may guess.
        self.draft_vocab_size = c.integer("draft_vocab_size", default=self.vocab_size)

    def check_width(self, c: ConfigReader) -> None:
        expected = c.integer("target_hidden_size", default=self.hidden_size)
        if expected != self.target.hidden_size:
            key = "target_hidden_size" if c.has("target_hidden_size") else "hidden_size"
            raise c.error(
                key,
                f"the draft was made for a model of {expected}; this one has "
                f"{self.target.hidden_size}",
            )
        if self.hidden_size != expected and not self.has_embedding:
            raise c.error(
                "hidden_size",
                f"a draft of {self.hidden_size} for a model of {expected} needs an embedding of "
                "its own, embed_tokens.weight",
            )

    def choose_layers(self, c: ConfigReader) -> tuple[int, ...]:
        """The low, middle and high layer that the authors' code takes, or those of the config: by
        the layers that have them as inputs, or, in `eagle_config`, as outputs."""
        key, count = "eagle_aux_hidden_state_layer_ids", self.target.num_layers
        chosen = c.integers(key)
        nested = c.subsection("eagle_config")
        if not chosen and nested is not None:
            chosen = [layer + 1 for layer in nested.integers(key)]
        if not chosen:
            chosen = [2, count // 2, count - 3]
            if not 2 < count // 2 < count - 3:
                raise ModelConfigError(
                    f"an EAGLE-3 draft reads layers 2, n/2 and n-3, which a model of {count} "
                    f"layers does not have apart; say which ones in the draft's config, {key}"
                )
        if len(chosen) != 3 or not all(0 <= layer <= count for layer in chosen):
            raise c.error(key, f"must be three layers of the model's {count}, not {chosen}")
        return tuple(chosen)

    def make_attention(self, c: ConfigReader) -> Attention:
        return self.attention_block(inputs=2 * self.hidden_size, **self.biases())

    def layer_weights(self, layer: int) -> dict[str, Weight]:
        return {
            "fc": weight("fc.weight", self.hidden_size, 3 * self.target.hidden_size),
            "embed_norm": self.norm_weight(f"{_AT}.input_layernorm"),
            "hidden_norm": self.norm_weight(f"{_AT}.hidden_norm"),
            **self.attention.weights(f"{_AT}.self_attn"),
            "mlp_norm": self.norm_weight(f"{_AT}.post_attention_layernorm"),
            **self.mlp_weights(layer),
        }

    def head_weights(self) -> dict[str, Weight]:
        return {
            "norm": self.norm_weight("model.norm"),
            "tokens": weight("lm_head.weight", self.draft_vocab_size, self.hidden_size),
        }

    def layer(self, op: Any, w: Weights, x: Tensor, layer: int) -> Tensor:
        embeds, hidden = op.split(x, [self.hidden_size] * 2)
        normed = op.rms_norm(hidden, w.hidden_norm, self.eps)
        y = op.xp.concatenate([op.rms_norm(embeds, w.embed_norm, self.eps), normed], axis=-1)
        x = normed if self.adds_to_normed else hidden
        x = op.add_residual(x, self.attention(op, w, y, layer, self.rope))
        y = op.rms_norm(x, w.mlp_norm, self.eps)
        return op.add_residual(x, self.run_mlp(op, w, y, layer))

    def head(self, op: Any, w: Weights, x: Tensor) -> Tensor:
        """`[R, hidden]` -> logits of the tokens it may guess, `[R, draft vocab]`."""
        return op.linear(op.rms_norm(x, w.norm, self.eps), w.tokens)

    def fuse(self, op: Any, w: Weights, states: list[Tensor]) -> Tensor:
        return op.linear(op.xp.concatenate(states, axis=-1), w.fc)
