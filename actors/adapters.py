"""LoRA adapters on a shard: which are loaded and which sequences use them; and, on a CPU, their
part of a step's products.

Rows of a step are grouped by adapter, and each group's low-rank product is added to the base's, so
that one step serves any mix of adapters (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285). Rows
without an adapter cost nothing, and a step without such rows runs as if there were none.

A sequence keeps the adapter it started with until it ends, whatever is unloaded meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from tensorray.actors.adapter import Adapter, AdapterSource
from tensorray.actors.protocol import StepPlan
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.checkpoint.peft import open_adapter
from tensorray.builder.lora import Place, read_adapter
from tensorray.builder.model import Model, ShardWeights, Weights
from tensorray.builder.ops import Tensor, segment
from tensorray.kernels.low_rank import LowRank, add_low_rank


class HasAdapter(Protocol):
    @property
    def adapter(self) -> Adapter: ...


Held = TypeVar("Held", bound=HasAdapter)


class AdapterBooks(ABC, Generic[Held]):
    """Which adapters a shard has, and which sequences run with which. `load` and `unload` may be
    called while steps run, by another thread."""

    def __init__(
        self, model: Model, layers: range, *, source: AdapterSource, max_rank: int
    ) -> None:
        self._model = model
        self._layers = layers
        self._source = source
        self._max_rank = max_rank
        self._loaded: dict[int, Held] = {}
        self._running: dict[int, Held] = {}  # by sequence
        self._missing: set[int] = set()  # sequences that can't go on

    @abstractmethod
    def hold(self, adapter: Adapter, found: dict[Place, LowRank]) -> Held:
        """An adapter's share of the shard as it is kept. Raises CheckpointError if it can't be."""

    def load(self, adapter: Adapter) -> None:
        """Read an adapter. Raises CheckpointError saying what is wrong with it."""
        directory = self._source.find(adapter.path)
        files = open_adapter(directory, self._model.config.get("model_type"))
        found = read_adapter(files, self._model, self._layers, max_rank=self._max_rank)
        self._loaded[adapter.id] = self.hold(adapter, found)

    def unload(self, id: int) -> None:
        """Forget an adapter, if it is loaded; sequences that run keep it."""
        self._loaded.pop(id, None)

    def loaded(self) -> list[Adapter]:
        return [each.adapter for each in list(self._loaded.values())]

    def take(self, plan: StepPlan) -> None:
        """Sequences end and start."""
        for seq in plan.ends:
            self._running.pop(seq, None)
            self._missing.discard(seq)
        for start in plan.starts:
            if (held := self._loaded.get(start.adapter)) is not None:
                self._running[start.seq] = held
            elif start.adapter:
                self._missing.add(start.seq)

    def missing(self, seqs: Sequence[int]) -> dict[int, str]:
        """Of these sequences, those whose adapter could not be loaded again when the shard was
        started anew, with the reason."""
        found = self._missing.intersection(seqs) if self._missing else ()
        return dict.fromkeys(found, "its adapter's files are gone; load the adapter again")

    def forget_sequences(self) -> None:
        self._running.clear()
        self._missing.clear()


def placed_weights(weights: ShardWeights) -> Iterator[tuple[Place, Any]]:
    """A shard's weights but the embedding's, each with its place."""
    groups: list[tuple[int | str, Weights]] = [*weights.layers.items(), ("head", weights.head)]
    for group, held in groups:
        for name, array in held.arrays.items():
            yield (group, name), array


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in memory; `deltas` by the identity of the base's weights."""

    adapter: Adapter
    deltas: dict[int, LowRank]

    @property
    def nbytes(self) -> int:
        return sum(low.nbytes for low in self.deltas.values())


@dataclass(frozen=True)
class _Rows:
    """An adapter's rows of an array: a slice where they are in a run, else indices."""

    loaded: LoadedAdapter
    rows: Any


class AdapterOps(ArrayOps):
    """The array interpreter, with the adapters' parts in its products."""

    def __init__(self, adapters: ShardAdapters, *arguments: Any, **options: Any) -> None:
        """What `ArrayOps` takes comes after the adapters."""
        super().__init__(*arguments, **options)
        self._adapters = adapters

    @segment
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().linear(x, weight, bias)
        if self._adapters.rows is not None:
            self._adapters.rows.add(y, x, weight, self.batch.logit_rows)
        return y


class StepRows:
    """Which adapter each of a step's rows has."""

    def __init__(
        self, owners: Sequence[LoadedAdapter | None], starts: Any, head: frozenset[int]
    ) -> None:
        """`owners[i]` is the adapter of packed rows `starts[i]` to `starts[i + 1]`; `head` the
        weights whose products are of the wanted rows only."""
        self._owners = owners
        self._starts = starts
        self._head = head
        counts = np.diff(starts)
        self._groups = _grouped(owners, np.repeat(np.arange(len(owners)), counts))

    def add(self, y: Tensor, x: Tensor, weight: Tensor, wanted: Any) -> None:
        """Add to a product by a weight what adapters have to add."""
        key = id(weight)
        groups = self._groups
        if key in self._head:
            if not any(key in group.loaded.deltas for group in groups):
                return
            of = np.searchsorted(self._starts, wanted, side="right") - 1
            groups = _grouped(self._owners, of)
        for group in groups:
            low = group.loaded.deltas.get(key)
            if low is not None:
                add_low_rank(y, x, group.rows, low)


def _grouped(owners: Sequence[LoadedAdapter | None], owner_of: Any) -> list[_Rows]:
    """Rows by adapter, given each row's index into `owners`."""
    numbers: dict[LoadedAdapter, int] = {}
    number = np.array(
        [-1 if each is None else numbers.setdefault(each, len(numbers)) for each in owners]
    )[owner_of]
    groups = []
    for loaded, wanted in numbers.items():
        rows = np.flatnonzero(number == wanted)
        if len(rows):
            first, last = int(rows[0]), int(rows[-1])
            in_a_run = last - first + 1 == len(rows)
            groups.append(_Rows(loaded, slice(first, last + 1) if in_a_run else rows))
    return groups


class ShardAdapters(AdapterBooks[LoadedAdapter]):
    """A CPU shard's adapters."""

    rows: StepRows | None = None  # of the present step; None: no row has an adapter

    def __init__(
        self,
        model: Model,
        weights: ShardWeights,
        layers: range,
        *,
        source: AdapterSource,
        max_rank: int,
    ) -> None:
        super().__init__(model, layers, source=source, max_rank=max_rank)
        self._weights = {place: id(array) for place, array in placed_weights(weights)}
        self._head = frozenset(map(id, weights.head.arrays.values()))

    def hold(self, adapter: Adapter, found: dict[Place, LowRank]) -> LoadedAdapter:
        return LoadedAdapter(adapter, {self._weights[place]: low for place, low in found.items()})

    def select(self, seqs: Sequence[int], starts: Any) -> None:
        """Set the step's rows: those from `starts[i]` to `starts[i + 1]` are of `seqs[i]`."""
        owners = [self._running.get(seq) for seq in seqs] if self._running else []
        self.rows = StepRows(owners, starts, self._head) if any(owners) else None
