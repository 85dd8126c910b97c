"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from tensorray.builder.model import Weight, Weights
from tensorray.builder.models.blocks import EXPERT_ACTIVATIONS, SparseMLP
from tensorray.builder.models.config import ConfigReader
from tensorray.builder.models.mistral import Mistral
from tensorray.builder.ops import Ops, Tensor


class Mixtral(Mistral):
    architectures = ("MixtralForCausalLM",)
    default_rope_base = 1_000_000.0

    def inner_sizes(self, c: ConfigReader) -> tuple[int, ...]:
        return () if self.layout.expert_parallel else super().inner_sizes(c)

    def make_mlp(self, c: ConfigReader) -> None:
        c.choice("hidden_act", among=EXPERT_ACTIVATIONS)
        self.sparse = SparseMLP(
            self.layout,
            hidden=self.hidden_size,
            inner=c.integer("intermediate_size"),
            experts=c.integer("num_local_experts"),
            top_k=c.integer("num_experts_per_tok"),
            renormalize=True,
        )

    def mlp_weights(self, layer: int) -> dict[str, Weight]:
        at = f"model.layers.{layer}.block_sparse_moe"
        return self.sparse.weights(at, gate="w1", up="w3", down="w2")

    def run_mlp(self, op: Ops, w: Weights, x: Tensor, layer: int) -> Tensor:
        return self.sparse(op, w, x)
