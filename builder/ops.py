"""The op set: the vocabulary every model definition is written in.

A definition calls these methods on an interpreter it is handed (`op`) and never imports NumPy,
CuPy or TensorRT itself, so one definition serves them all. `ArrayOps` (array_ops.py) computes at
once on arrays; other interpreters record the calls and compile them.

Ops come in two kinds. *Segment* ops are dense math on the step's packed tokens; a compiling
interpreter fuses a run of them into one engine. *Kernel* ops touch state that outlives the step
(the paged KV cache), route data by value (mixture of experts), or cross devices; they end a
segment and run as kernels of their own.

Shapes below use T for the step's packed tokens (all sequences' chunks end to end), R for the rows
whose logits are wanted. Weights are stored as `[out, in]`, as Hugging Face checkpoints do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from tensorray.builder.rope import RopeSpec
from tensorray.kernels.quantized import Kind

# What flows through a definition: an ndarray under ArrayOps, a symbolic tensor under a compiling
# interpreter. Both support +, -, * with each other and with Python floats.
Tensor = Any

F = TypeVar("F", bound=Callable[..., Any])


def segment(method: F) -> F:
    """Mark an op as dense math that a compiling interpreter may fuse with its neighbours."""
    method.op_kind = "segment"  # type: ignore[attr-defined]
    return method


def kernel(method: F) -> F:
    """Mark an op as one that ends a segment and runs as a kernel of its own."""
    method.op_kind = "kernel"  # type: ignore[attr-defined]
    return method


class SegmentOps(Protocol):
    """The segment half of the op set: all that an interpreter of segments alone has to have."""

    @segment
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight.T + bias`: x `[T, in]`, weight `[out, in]`, bias `[out]` -> `[T, out]`.

        The weight may be quantized (kernels/quantized.py), which is its checkpoint's matter.
        """
        ...

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
        """`linear` by a quantized weight in its arrays (quantized_segment.py makes it of linears;
        definitions don't call it)."""
        ...

    @segment
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last axis (Zhang & Sennrich, arXiv 1910.07467).

        Statistics in float32; the result has the compute dtype. Gemma's `1 + weight` is added to
        the weight at load, not here.
        """
        ...

    @segment
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm over the last axis (Ba et al., arXiv 1607.06450), statistics in float32."""
        ...

    @segment
    def silu(self, x: Tensor) -> Tensor:
        """`x * sigmoid(x)`, elementwise."""
        ...

    @segment
    def gelu_tanh(self, x: Tensor) -> Tensor:
        """GELU, tanh approximation (Hendrycks & Gimpel, arXiv 1606.08415), elementwise."""
        ...

    @segment
    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """`cap * tanh(x / cap)`, elementwise (Gemma 2, arXiv 2408.00118)."""
        ...

    @segment
    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Cut the last axis into pieces of the given sizes (their sum is the axis's length)."""
        ...

    @segment
    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        """View `[T, n * head_dim]` as `[T, n, head_dim]`."""
        ...

    @segment
    def merge_heads(self, x: Tensor) -> Tensor:
        """View `[T, n, head_dim]` as `[T, n * head_dim]`."""
        ...

    @segment
    def add_residual(self, x: Tensor, delta: Tensor) -> Tensor:
        """`x + delta` in the residual stream's dtype (float32 where float16 would overflow)."""
        ...


class Ops(SegmentOps, Protocol):
    """The op set. Every interpreter of definitions implements all of it."""

    @kernel
    def embedding(self, tokens: Tensor, table: Tensor, first_row: int = 0) -> Tensor:
        """Rows of a table for int32 tokens `[T]` -> `[T, hidden]`, in the residual dtype.

        The table holds the vocabulary's rows from `first_row` on (a tensor-parallel rank's
        share); a token outside the share gives zeros, so that an all_reduce completes it.
        """
        ...

    @kernel
    def position_embedding(self, table: Tensor) -> Tensor:
        """Rows of a learned position table `[max_positions, hidden]` for the step's positions."""
        ...

    @kernel
    def rope(self, q: Tensor, k: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
        """Rotary embedding (Su et al., arXiv 2104.09864), rotate-half layout.

        q `[T, heads, head_dim]`, k `[T, kv_heads, head_dim]`, same shapes back. Positions are the
        step's own. Dims past `spec.rotary_dim` pass through. The interpreter makes the spec's
        table of cosines and sines once and keeps it.
        """
        ...

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
        """Append k and v to the layer's paged KV cache, then attend causally over it.

        q `[T, heads, head_dim]`, k and v `[T, kv_heads, head_dim]` -> `[T, heads, head_dim]`.
        The window comes from the layer's `KVSpec`. Heads are grouped: query head h reads KV head
        `h * kv_heads // heads` (GQA, arXiv 2305.13245). Softmax statistics in float32.
        """
        ...

    @kernel
    def select_rows(self, x: Tensor) -> Tensor:
        """The rows `[R, hidden]` of x `[T, hidden]` whose logits this step wants."""
        ...

    @kernel
    def route(self, logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Top-k expert choice: logits `[T, experts]` -> weights float32 `[T, k]`, ids `[T, k]`.

        Weights are softmax probabilities over all experts; with `renormalize` the chosen k are
        scaled to sum to one (equal to a softmax over the chosen logits).
        """
        ...

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
        """Gated-SiLU mixture of experts: the weighted sum of each token's chosen experts.

        x `[T, hidden]`, gate_up `[experts, 2 * inner, hidden]` (gate rows first), down
        `[experts, hidden, inner]` -> `[T, hidden]`. Given `first_expert`, they hold only an
        expert-parallel rank's share, from that expert on, and others count nothing. Partial sum
        when experts are sharded.
        """
        ...

    @kernel
    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the tensor-parallel ranks; the identity on one rank."""
        ...

    @kernel
    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate x over the tensor-parallel ranks on its last axis (vocabulary shards)."""
        ...
