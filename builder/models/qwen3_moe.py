"""Qwen 3 mixture of experts (arXiv 2505.09388): many small experts; some layers may be dense."""

from __future__ import annotations

from tensorray.builder.model import Weight, Weights
from tensorray.builder.models.blocks import EXPERT_ACTIVATIONS, SparseMLP
from tensorray.builder.models.config import ConfigReader
from tensorray.builder.models.qwen3 import Qwen3
from tensorray.builder.ops import Ops, Tensor


class Qwen3Moe(Qwen3):
    """Layer i is sparse if `decoder_sparse_step` divides i + 1 and `mlp_only_layers` has not i."""

    architectures = ("Qwen3MoeForCausalLM",)

    def read_head_dim(self, c: ConfigReader) -> int:
        # Unlike the dense models, whose default is 128.
        return super(Qwen3, self).read_head_dim(c)

    def inner_sizes(self, c: ConfigReader) -> tuple[int, ...]:
        experts = () if self.layout.expert_parallel else (c.integer("moe_intermediate_size"),)
        return (*experts, *super().inner_sizes(c))

    def windows(self, c: ConfigReader) -> list[int | None]:
        windowed = c.boolean("use_sliding_window", default=False)
        return [c.integer("sliding_window") if windowed else None] * self.num_layers

    def make_mlp(self, c: ConfigReader) -> None:
        super().make_mlp(c)
        c.choice("hidden_act", among=EXPERT_ACTIVATIONS)
        step = c.integer("decoder_sparse_step", default=1)
        dense = set(c.integers("mlp_only_layers"))
        self.is_sparse = [
            layer not in dense and (layer + 1) % step == 0 for layer in range(self.num_layers)
        ]
        self.sparse = SparseMLP(
            self.layout,
            hidden=self.hidden_size,
            inner=c.integer("moe_intermediate_size"),
            experts=c.integer("num_experts", "num_local_experts"),
            top_k=c.integer("num_experts_per_tok"),
            renormalize=c.boolean("norm_topk_prob", default=False),
        )

    def mlp_weights(self, layer: int) -> dict[str, Weight]:
        if not self.is_sparse[layer]:
            return super().mlp_weights(layer)
        at = f"model.layers.{layer}.mlp"
        return self.sparse.weights(at, gate="gate_proj", up="up_proj", down="down_proj")

    def run_mlp(self, op: Ops, w: Weights, x: Tensor, layer: int) -> Tensor:
        if not self.is_sparse[layer]:
            return super().run_mlp(op, w, x, layer)
        return self.sparse(op, w, x)
