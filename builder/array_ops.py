"""The array interpreter: runs a definition at once, op by op, on NumPy arrays.

It is the CPU engine, and the oracle for every interpreter that compiles. The math itself lives in
kernels/; here ops meet the state they need: the step's batch, the paged KV cache, RoPE tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard

from tensorray.builder.ops import Ops, Tensor, kernel, segment
from tensorray.builder.rope import RopeSpec, table
from tensorray.kernels import activation, attention, linear, moe, norm, rope, rows
from tensorray.kernels.batch import Batch
from tensorray.kernels.quantized import Kind, QuantizedWeight


@dataclass(frozen=True)
class LayerKV:
    """One layer's view of the paged KV cache."""

    k_pages: Any  # [num_blocks, kv_heads, block_size, head_dim]
    v_pages: Any  # likewise
    group: int  # which of the batch's block tables and slots are the layer's
    window: int | None = None  # most recent positions a query sees, itself included; None: all


class Ranks(Protocol):
    """The tensor-parallel ranks of a stage, as one of them reaches the others."""

    def all_reduce(self, x: Any) -> Any:
        """The sum of every rank's x."""
        ...

    def all_gather(self, x: Any) -> Any:
        """Every rank's x: `[ranks, *x.shape]`."""
        ...


class NormingRanks(Ranks, Protocol):
    """Ranks that reach each other in a kernel of their own, which does what follows a sum too."""

    def all_reduce_norm(
        self, x: Any, delta: Any, weight: Any, eps: float, *, delta_weight: Any | None = None
    ) -> tuple[Any, Any] | None:
        """`kernels.norm.add_rms_norm` of x and the sum of every rank's delta; None: not of such
        arrays, which is so on all ranks."""
        ...


def _norms(ranks: Ranks | None) -> TypeGuard[NormingRanks]:
    return hasattr(ranks, "all_reduce_norm")


class ArrayOps(Ops):
    """The op set on arrays of the module `xp`.

    `kv[layer]` is a layer's cache, by its index in the whole model (a mapping where a shard holds
    some layers only). Set `batch` to a step's metadata before running a definition; one
    instance serves step after step and keeps its RoPE tables. `max_positions` bounds those (64 MB
    a table at 131,072 positions) where sequences never grow to the model's own context length.
    `residual` is the residual stream's dtype (None: the weights').
    """

    batch: Batch
    #: Whom collectives reach; None: this rank is the only one, and they are the identity.
    ranks: Ranks | None = None

    def __init__(
        self,
        xp: Any,
        kv: Sequence[LayerKV] | Mapping[int, LayerKV],
        max_positions: int | None = None,
        residual: Any = None,
    ) -> None:
        self.xp = xp
        self.residual = residual
        self.kv = kv
        self.max_positions = max_positions
        self._rope_tables: dict[RopeSpec, Tensor] = {}

    # --- segment ops ---------------------------------------------------------------------

    @segment
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear.linear(x, weight, bias)

    @segment
    def linear_quantized(
        self,
        x: Tensor,
        values: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        order: Tensor | None,
        groups: Tensor | None,
        bias: Tensor | None = None,
        *,
        kind: Kind,
        group: int,
    ) -> Tensor:
        weight = QuantizedWeight(kind, group, values, scales, zeros, order, groups)
        return linear.linear(x, weight, bias)

    @segment
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    @segment
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return norm.layer_norm(x, weight, bias, eps)

    @segment
    def silu(self, x: Tensor) -> Tensor:
        return activation.silu(x)

    @segment
    def gelu_tanh(self, x: Tensor) -> Tensor:
        return activation.gelu_tanh(x)

    @segment
    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return activation.softcap(x, cap)

    @segment
    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        pieces, start = [], 0
        for size in sizes:
            pieces.append(x[..., start : start + size])
            start += size
        return pieces

    @segment
    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        return x.reshape(len(x), -1, head_dim)

    @segment
    def merge_heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1)

    @segment
    def add_residual(self, x: Tensor, delta: Tensor) -> Tensor:
        return x + delta

    # --- kernel ops ----------------------------------------------------------------------

    @kernel
    def embedding(self, tokens: Tensor, table: Tensor, first_row: int = 0) -> Tensor:
        return rows.gather_rows(table, tokens, first_row, dtype=self.residual)

    @kernel
    def position_embedding(self, table: Tensor) -> Tensor:
        return rows.gather_rows(table, self.batch.positions, dtype=self.residual)

    @kernel
    def rope(self, q: Tensor, k: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
        rotated: tuple[Tensor, Tensor] = rope.rope(
            q, k, self._rope_table(spec), self.batch.positions
        )
        return rotated

    def _rope_table(self, spec: RopeSpec) -> Tensor:
        cached = self._rope_tables.get(spec)
        if cached is None:
            bound = min(spec.max_positions, self.max_positions or spec.max_positions)
            cached = self.xp.asarray(table(replace(spec, max_positions=bound)))
            self._rope_tables[spec] = cached
        return cached

    @kernel
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: int,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> Tensor:
        kv, batch = self.kv[layer], self.batch
        attention.append_kv(k, v, kv.k_pages, kv.v_pages, batch.slots[kv.group])
        return attention.paged_attention(
            q,
            kv.k_pages,
            kv.v_pages,
            batch.query_starts,
            batch.seq_lens,
            batch.block_tables[kv.group],
            scale=scale,
            window=kv.window,
            softcap=softcap,
            max_query=batch.max_query,
            singles=batch.singles,
        )

    def rope_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        *,
        layer: int,
        spec: RopeSpec,
        scale: float,
        softcap: float | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """`rope` of q and k, each head normed before if weights for that are given, then
        `attention`. Not an op of its own: how these may run (joining.py)."""
        kv, batch = self.kv[layer], self.batch
        cos_sin, slots = self._rope_table(spec), batch.slots[kv.group]
        new = (q, k, v, cos_sin, batch.positions, kv.k_pages, kv.v_pages, slots)
        held = (batch.query_starts, batch.seq_lens, batch.block_tables[kv.group])
        norms: dict[str, Any] = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
        options: dict[str, Any] = {"scale": scale, "window": kv.window, "softcap": softcap}
        options["max_query"] = batch.max_query
        if batch.chained:  # all of the step's keys are to be there before any query reads them
            q = rope.rope_append(*new, **norms)
            return attention.paged_attention(*(q, kv.k_pages, kv.v_pages, *held), **options)
        return rope.rope_attention(*(*new, *held), **(norms | options))

    @kernel
    def select_rows(self, x: Tensor) -> Tensor:
        return rows.gather_rows(x, self.batch.logit_rows)

    @kernel
    def route(self, logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        return moe.route(logits, top_k, renormalize)

    @kernel
    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: Tensor,
        down: Tensor,
        first_expert: int | None = None,
    ) -> Tensor:
        return moe.experts(x, weights, ids, gate_up, down, first_expert)

    @kernel
    def all_reduce(self, x: Tensor) -> Tensor:
        return x if self.ranks is None else self.ranks.all_reduce(x)

    def sum_norm(
        self,
        x: Tensor,
        delta: Tensor,
        weight: Tensor,
        delta_weight: Tensor | None = None,
        *,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """`all_reduce` of delta (normed then, if a weight for that is given), `add_residual` to x,
        and `rms_norm` of the sum: both. Not an op of its own: how these may run
        (joining_sums.py)."""
        if _norms(self.ranks):
            both = self.ranks.all_reduce_norm(x, delta, weight, eps, delta_weight=delta_weight)
            if both is not None:
                return both
        total = self.all_reduce(delta)
        joined: tuple[Tensor, Tensor] = norm.add_rms_norm(
            x, total, weight, eps, delta_weight=delta_weight
        )
        return joined

    @kernel
    def all_gather(self, x: Tensor) -> Tensor:
        if self.ranks is None:
            return x
        parts = self.ranks.all_gather(x)  # [ranks, ..., n]
        return self.xp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)
