"""Building blocks of decoders: each declares its weights and writes its math, tensor-parallel.

A rank of a tensor-parallel group computes whole attention heads and whole columns of the MLP's
inner layer (Shoeybi et al., arXiv 1909.08053): the projections into them are split by rows, the
projections out of them by columns, and one all_reduce adds the ranks' partial sums. Biases after
a partial sum are added once, after the all_reduce.
"""

from __future__ import annotations

from collections.abc import Callable

from tensorray.builder.model import (
    KVSpec,
    Layout,
    ModelConfigError,
    Part,
    Shard,
    Weight,
    Weights,
)
from tensorray.builder.ops import Ops, Tensor
from tensorray.builder.rope import RopeSpec

Activation = Callable[[Ops, Tensor], Tensor]

#: Elementwise activations, by the names config.json has for them.
ACTIVATIONS: dict[str, Activation] = {
    "silu": lambda op, x: op.silu(x),
    "swish": lambda op, x: op.silu(x),
    "gelu_pytorch_tanh": lambda op, x: op.gelu_tanh(x),
    "gelu_new": lambda op, x: op.gelu_tanh(x),
    "gelu_fast": lambda op, x: op.gelu_tanh(x),
}

#: The one activation `Ops.experts` has.
EXPERT_ACTIVATIONS: dict[str, None] = {"silu": None, "swish": None}


def weight(name: str, *shape: int, shard: Shard = "all", add: float = 0.0) -> Weight:
    """A weight that is one checkpoint tensor."""
    return Weight((Part(name, shape, shard),), add=add)


def check_tensor_parallel(layout: Layout, heads: int, kv_heads: int, *inner_sizes: int) -> None:
    """Raise `ModelConfigError`, listing the sizes that work, if the layout's does not.

    Every rank takes equally many query heads and columns of each inner layer, and either equally
    many KV heads or, where there are more ranks than those, one that it shares with others.
    """

    def works(ranks: int) -> bool:
        kv_fit = kv_heads % ranks == 0 or ranks % kv_heads == 0
        return kv_fit and all(size % ranks == 0 for size in (heads, *inner_sizes))

    if heads % kv_heads:
        raise ModelConfigError(
            f"model config: num_key_value_heads: {kv_heads} does not divide "
            f"num_attention_heads ({heads})"
        )
    if not works(layout.tp_size):
        sizes = ", ".join(str(ranks) for ranks in range(1, heads + 1) if works(ranks))
        raise ModelConfigError(
            f"{layout.tp_size} tensor-parallel ranks do not divide this model ({heads} heads, "
            f"{kv_heads} KV heads, inner sizes {inner_sizes}); sizes that do: {sizes}"
        )


class Vocabulary:
    """The embedding table and the output projection, split over the ranks by tokens.

    A vocabulary that the ranks do not divide is held whole by each of them.
    """

    def __init__(self, layout: Layout, size: int, hidden: int) -> None:
        self.size = size
        self.hidden = hidden
        self.split = layout.tp_size > 1 and size % layout.tp_size == 0
        self.shard: Shard = "rows" if self.split else "all"
        self.first_row = layout.tp_rank * (size // layout.tp_size) if self.split else 0

    def weight(self, name: str) -> Weight:
        """A table with one row a token; a tied pair is this same weight in two groups."""
        return weight(name, self.size, self.hidden, shard=self.shard)

    def embed(self, op: Ops, table: Tensor, tokens: Tensor) -> Tensor:
        x = op.embedding(tokens, table, self.first_row)
        return op.all_reduce(x) if self.split else x

    def logits(self, op: Ops, table: Tensor, x: Tensor) -> Tensor:
        logits = op.linear(x, table)
        return op.all_gather(logits) if self.split else logits


class Attention:
    """Grouped-query attention (arXiv 2305.13245) with optional biases, q and k norms, soft cap.

    Weights: `qkv` (q, k and v rows fused) and `o`; `qkv_bias`, `o_bias`, `q_norm`, `k_norm` where
    the model has them. Given more ranks than KV heads, a rank holds the one its queries read.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        hidden: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float | None = None,
        softcap: float | None = None,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm_eps: float | None = None,
        norm_add: float = 0.0,
        inputs: int | None = None,
    ) -> None:
        """`inputs` is the width of what the block reads, if that is not `hidden`."""
        self.hidden = hidden
        self.inputs = inputs or hidden
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        self.qkv_bias = qkv_bias
        self.o_bias = o_bias
        self.qk_norm_eps = qk_norm_eps
        self.norm_add = norm_add
        # This rank's share.
        self.own_kv_heads = max(kv_heads // layout.tp_size, 1)
        self.first_kv_head = layout.tp_rank * kv_heads // layout.tp_size
        q_size = heads // layout.tp_size * head_dim
        kv_size = self.own_kv_heads * head_dim
        self.sizes = (q_size, kv_size, kv_size)

    def weights(self, at: str) -> dict[str, Weight]:
        """The block's weights, of a checkpoint that has its projections under the prefix `at`."""
        hidden, inputs, q_size = self.hidden, self.inputs, self.heads * self.head_dim
        weights = {
            "qkv": Weight(
                (
                    Part(f"{at}.q_proj.weight", (q_size, inputs), "rows"),
                    self.kv_part(f"{at}.k_proj.weight", inputs),
                    self.kv_part(f"{at}.v_proj.weight", inputs),
                )
            ),
            "o": weight(f"{at}.o_proj.weight", hidden, q_size, shard="columns"),
        }
        if self.qkv_bias:
            weights["qkv_bias"] = Weight(
                (
                    Part(f"{at}.q_proj.bias", (q_size,), "rows"),
                    self.kv_part(f"{at}.k_proj.bias"),
                    self.kv_part(f"{at}.v_proj.bias"),
                )
            )
        if self.o_bias:
            weights["o_bias"] = weight(f"{at}.o_proj.bias", hidden)
        if self.qk_norm_eps is not None:
            weights["q_norm"] = weight(f"{at}.q_norm.weight", self.head_dim, add=self.norm_add)
            weights["k_norm"] = weight(f"{at}.k_norm.weight", self.head_dim, add=self.norm_add)
        return weights

    def kv_part(self, name: str, *columns: int) -> Part:
        """This rank's rows of a tensor that has `head_dim` rows a KV head."""
        shape = (self.kv_heads * self.head_dim, *columns)
        own = self.own_kv_heads * self.head_dim
        first = self.first_kv_head * self.head_dim
        return Part(name, shape, "all", rows=None if own == shape[0] else (first, first + own))

    def kv_spec(self, window: int | None) -> KVSpec:
        return KVSpec(self.own_kv_heads, self.head_dim, window)

    def __call__(self, op: Ops, w: Weights, x: Tensor, layer: int, rope: RopeSpec | None) -> Tensor:
        """Normed input `[T, inputs]` -> the block's output `[T, hidden]`, complete on each rank."""
        q, k, v = op.split(op.linear(x, w.qkv, w.get("qkv_bias")), self.sizes)
        q, k, v = (op.heads(part, self.head_dim) for part in (q, k, v))
        if self.qk_norm_eps is not None:
            q = op.rms_norm(q, w.q_norm, self.qk_norm_eps)
            k = op.rms_norm(k, w.k_norm, self.qk_norm_eps)
        if rope is not None:
            q, k = op.rope(q, k, rope)
        y = op.attention(q, k, v, layer, scale=self.scale, softcap=self.softcap)
        return project_out(op, op.merge_heads(y), w.o, w.get("o_bias"))


class GatedMLP:
    """`down(act(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202), with optional biases.

    Weights: `gate_up` (gate rows first) and `down`; `gate_up_bias`, `down_bias` with `bias`.
    """

    def __init__(
        self, layout: Layout, *, hidden: int, inner: int, activation: Activation, bias: bool = False
    ) -> None:
        self.hidden = hidden
        self.inner = inner
        self.activation = activation
        self.bias = bias
        self.sizes = (inner // layout.tp_size,) * 2

    def weights(self, at: str) -> dict[str, Weight]:
        """The block's weights, of a checkpoint that has its projections under the prefix `at`."""
        into = (f"{at}.gate_proj", f"{at}.up_proj")
        weights = {
            "gate_up": Weight(
                tuple(Part(f"{name}.weight", (self.inner, self.hidden), "rows") for name in into)
            ),
            "down": weight(f"{at}.down_proj.weight", self.hidden, self.inner, shard="columns"),
        }
        if self.bias:
            weights["gate_up_bias"] = Weight(
                tuple(Part(f"{name}.bias", (self.inner,), "rows") for name in into)
            )
            weights["down_bias"] = weight(f"{at}.down_proj.bias", self.hidden)
        return weights

    def __call__(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        gate, up = op.split(op.linear(x, w.gate_up, w.get("gate_up_bias")), self.sizes)
        return project_out(op, self.activation(op, gate) * up, w.down, w.get("down_bias"))


class SparseMLP:
    """A top-k mixture of gated-SiLU experts (arXiv 2101.03961; Mixtral, arXiv 2401.04088).

    Weights: `router`, `gate_up` and `down`, the latter two stacked over experts. All ranks route
    alike. Every rank holds its share of every expert's inner layer, or, with expert parallelism
    (GShard, arXiv 2006.16668), its share of the experts, whole. Either way it computes a part of
    each token's sum.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        hidden: int,
        inner: int,
        experts: int,
        top_k: int,
        renormalize: bool,
    ) -> None:
        if top_k > experts:
            raise ModelConfigError(
                f"model config: num_experts_per_tok: must be at most the {experts} experts there "
                f"are, not {top_k}"
            )
        ranks = layout.tp_size if layout.expert_parallel else 1
        if experts % ranks:
            sizes = ", ".join(str(size) for size in range(1, experts + 1) if experts % size == 0)
            raise ModelConfigError(
                f"{ranks} expert-parallel ranks do not divide the {experts} experts; "
                f"sizes that do: {sizes}"
            )
        self.hidden = hidden
        self.inner = inner
        self.experts = experts
        self.top_k = top_k
        self.renormalize = renormalize
        own = experts // ranks
        self.first_expert = layout.tp_rank * own if layout.expert_parallel else None
        self.own_experts = (
            range(own)
            if self.first_expert is None
            else range(self.first_expert, self.first_expert + own)
        )

    def weights(self, at: str, *, gate: str, up: str, down: str) -> dict[str, Weight]:
        """The block's weights; `gate`, `up` and `down` are what the checkpoint calls them."""

        whole = self.first_expert is not None

        def parts(name: str, shape: tuple[int, int], shard: Shard) -> list[Part]:
            return [
                Part(f"{at}.experts.{expert}.{name}.weight", shape, "all" if whole else shard)
                for expert in self.own_experts
            ]

        into, out_of = (self.inner, self.hidden), (self.hidden, self.inner)
        gates, ups = parts(gate, into, "rows"), parts(up, into, "rows")
        gate_up = tuple(part for pair in zip(gates, ups, strict=True) for part in pair)
        return {
            "router": weight(f"{at}.gate.weight", self.experts, self.hidden),
            "gate_up": Weight(gate_up, stack=len(self.own_experts)),
            "down": Weight(tuple(parts(down, out_of, "columns")), stack=len(self.own_experts)),
        }

    def __call__(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        logits = op.linear(x, w.router)
        weights, ids = op.route(logits, self.top_k, renormalize=self.renormalize)
        y = op.experts(x, weights, ids, w.gate_up, w.down, self.first_expert)
        return op.all_reduce(y)


def project_out(op: Ops, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A projection whose inputs are split over the ranks: complete the sum, then add the bias."""
    y = op.all_reduce(op.linear(x, weight))
    return y if bias is None else y + bias
