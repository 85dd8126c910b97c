"""What a model definition is: declared weights, declared KV cache, and three pieces of math.

A definition is cut in three (`embed`, `layer`, `head`) so that a pipeline stage can own a range
of layers, and its weights are declared in the same three groups. Nothing here computes: the math
is written against the op set (ops.py), the declarations are read by the loader (load.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from tensorray.builder.ops import Ops, Tensor

# How a tensor-parallel rank takes its share of a checkpoint tensor:
#   "rows"     split axis 0 (column-parallel linears, vocabularies, experts)
#   "columns"  split axis 1 (row-parallel linears; their product is a partial sum)
#   "all"      every rank holds the whole tensor
Shard = Literal["rows", "columns", "all"]


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor, or one slice of one, that goes into a weight.

    `name` is the tensor's name in the checkpoint (Hugging Face's). `rows` picks a range of the
    tensor's axis 0 before sharding (GPT-2 stores q, k and v as one tensor). `transpose` swaps the
    two axes of a checkpoint that stores `[in, out]`; `rows` and `shard` speak of the tensor after
    that swap.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard = "all"
    rows: tuple[int, int] | None = None
    transpose: bool = False


@dataclass(frozen=True)
class Weight:
    """A weight as a shard holds it: its parts concatenated (or, for experts, stacked) on axis 0.

    `stack` is the number of leading stacked entries (experts): parts then come in `stack` equal
    runs, each run concatenated on its axis 0 and the runs stacked on a new axis 0.
    `add` is a constant added at load (Gemma's norms multiply by 1 + weight).
    """

    parts: tuple[Part, ...]
    stack: int | None = None
    add: float = 0.0


@dataclass(frozen=True)
class KVSpec:
    """What one layer keeps in the KV cache, per token: `kv_heads * head_dim` keys and values.

    `window` is the number of most recent positions a query sees, itself included (None: all).
    """

    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True)
class Layout:
    """This shard's place in a replica: tensor-parallel rank and pipeline stage.

    With `expert_parallel` the ranks of a stage share out whole experts of a mixture, and split
    everything else as ever. The replica's shards are numbered stage by stage: `rank` of `size`.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    expert_parallel: bool = False

    def at(self, rank: int) -> Layout:
        """The layout of another shard of the replica."""
        return replace(self, pp_rank=rank // self.tp_size, tp_rank=rank % self.tp_size)

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def size(self) -> int:
        return self.pp_size * self.tp_size

    def stage(self, pp_rank: int) -> range:
        """The ranks of a pipeline stage."""
        return range(pp_rank * self.tp_size, (pp_rank + 1) * self.tp_size)

    @property
    def sampler(self) -> int:
        """The rank that samples: the first of the last stage."""
        return self.stage(self.pp_size - 1).start

    @property
    def is_first(self) -> bool:
        """Whether the shard's stage has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether the shard's stage has the head."""
        return self.pp_rank == self.pp_size - 1


@dataclass
class Weights:
    """The arrays of one group of declared weights, by name, as attributes."""

    arrays: dict[str, Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["arrays"][name]
        except KeyError:
            raise AttributeError(f"no weight {name!r}; there are {sorted(self.arrays)}") from None

    def get(self, name: str) -> Tensor | None:
        return self.arrays.get(name)


@dataclass
class ShardWeights:
    """All weights a shard holds. `layers` maps the global layer index to that layer's group."""

    embed: Weights
    layers: dict[int, Weights]
    head: Weights


class Model(ABC):
    """A definition, bound to one checkpoint's config and one shard's layout.

    `config` is the checkpoint's config as Hugging Face's config.json spells it (a GGUF file's
    metadata is translated to the same keys). A definition reads what it needs from it and raises
    `ModelConfigError` naming the key when something is missing or not supported.
    """

    #: Hugging Face `architectures` entries this definition answers to.
    architectures: ClassVar[tuple[str, ...]] = ()
    #: Whether its residual stream may exceed float16, and so is float32 where it computes in that.
    wide_residual: ClassVar[bool] = False

    config: Mapping[str, Any]
    layout: Layout
    vocab_size: int
    hidden_size: int
    num_layers: int
    #: Positions the model was made for (its context length).
    max_positions: int

    def __init__(self, config: Mapping[str, Any], layout: Layout | None = None) -> None:
        self.config = config
        self.layout = layout or Layout()

    @abstractmethod
    def embed_weights(self) -> dict[str, Weight]: ...

    @abstractmethod
    def layer_weights(self, layer: int) -> dict[str, Weight]: ...

    @abstractmethod
    def head_weights(self) -> dict[str, Weight]: ...

    @abstractmethod
    def kv_spec(self, layer: int) -> KVSpec:
        """What this shard keeps in the KV cache for the layer (after tensor-parallel split)."""

    @abstractmethod
    def embed(self, op: Ops, w: Weights, tokens: Tensor) -> Tensor:
        """int32 tokens `[T]` -> the residual stream `[T, hidden]`."""

    @abstractmethod
    def layer(self, op: Ops, w: Weights, x: Tensor, layer: int) -> Tensor:
        """One layer: residual stream `[T, hidden]` -> `[T, hidden]`."""

    @abstractmethod
    def head(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        """Selected rows of the residual stream `[R, hidden]` -> logits `[R, vocab]`."""

    def final_norm(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        """The head as far as its projection, `[R, hidden]`, of the head's weights. What has heads
        of its own there (Medusa's), and what pools hidden states, needs a definition to say it."""
        return x

    def project(self, op: Ops, w: Weights, x: Tensor) -> Tensor:
        """The rest of the head: what `final_norm` gave -> logits `[R, vocab]`. What guesses hidden
        states (EAGLE's drafts) needs a definition to say it."""
        return x

    def token_rows(self, op: Ops, w: Weights, tokens: Tensor) -> Tensor:
        """int32 tokens `[T]` -> their rows of the embedding table as it is stored, `[T, hidden]`,
        of the embedding's weights. To be said where `embed` does more than that."""
        return self.embed(op, w, tokens)


class ModelConfigError(ValueError):
    """The checkpoint's config lacks something a definition needs, or asks for what it has not."""


def stage_layers(num_layers: int, pp_size: int, pp_rank: int) -> range:
    """The layers of a pipeline stage: as even as can be, the earlier stages taking one more."""
    if not 1 <= pp_size <= num_layers:
        raise ModelConfigError(
            f"{pp_size} pipeline stages for {num_layers} layers; sizes that do: 1 to {num_layers}"
        )
    each, more = divmod(num_layers, pp_size)
    start = pp_rank * each + min(pp_rank, more)
    return range(start, start + each + (pp_rank < more))
