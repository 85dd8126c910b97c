"""LoRA adapters on a device: which lie in its memory, and which of them each row of a step has.

Every adapter that is loaded waits in pinned memory, laid out as a slot of the device's is. There
are as many slots as adapters may run at once (S-LoRA, arXiv 2311.03285): an adapter moves into one,
by one copy, when a sequence starts with it, in place of the one that was longest without any.
Copies and steps are queued in order, so what is overwritten no step reads any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.adapter import Adapter, AdapterSource
from tensorray.actors.adapters import AdapterBooks, placed_weights
from tensorray.actors.device import Device, Mark
from tensorray.actors.protocol import StepPlan
from tensorray.actors.step_buffers import Step
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.lora import Place, adaptable
from tensorray.builder.model import Model, ShardWeights
from tensorray.kernels.lora import RANKS, Stack
from tensorray.kernels.low_rank import LowRank

_ALIGN = 128  # bytes


@dataclass(frozen=True)
class _Section:
    """Where one weight's matrices are in a slot, in elements; its ranks, in int32."""

    outputs: tuple[slice, ...]  # of each module
    outs: int
    inner: int
    ranks: int
    a: int
    b: int


class SlotLayout:
    """How an adapter's matrices for a shard lie in a slot of `words` elements of `dtype`."""

    def __init__(
        self, model: Model, weights: ShardWeights, layers: range, rank: int, dtype: Any
    ) -> None:
        self.rank = -(-rank // RANKS) * RANKS
        self.dtype = np.dtype(dtype)
        self.sections: dict[Place, _Section] = {}
        shapes = {place: array.shape for place, array in placed_weights(weights)}
        modules = adaptable(model, layers)
        end = self._aligned(4 * sum(map(len, modules.values())) // self.dtype.itemsize + 1)
        ranks = 0
        for place, outputs in modules.items():
            outs, inner = shapes[place]
            b = end + self._aligned(len(outputs) * self.rank * inner)
            self.sections[place] = _Section(outputs, outs, inner, ranks, end, b)
            end = b + self._aligned(outs * self.rank)
            ranks += len(outputs)
        self.words = end

    def _aligned(self, words: int) -> int:
        each: int = _ALIGN // self.dtype.itemsize
        return -(-words // each) * each

    def fill(self, slot: NDArray[Any], found: dict[Place, LowRank]) -> None:
        """Write an adapter to host memory `[words]`."""
        slot.view(np.uint8)[:] = 0
        for place, low in found.items():
            section = self.sections[place]
            (stack,) = self._stacks(np, slot[None], {place: section}).values()
            for i, outputs in enumerate(section.outputs):
                block = next((b for b in low.blocks if _within(outputs, b.outputs)), None)
                if block is None:
                    continue
                a = low.a[block.ranks]
                rank, first, skipped = len(a), i * self.rank, block.outputs.start
                stack.ranks[0, i] = rank
                stack.a[0, first : first + rank] = a
                b = block.b[outputs.start - skipped : outputs.stop - skipped]
                stack.b[0, outputs, :rank] = b

    def stacks(self, xp: Any, slots: Any) -> dict[Place, Stack]:
        """Slots `[slots, words]` as what each weight is added."""
        return self._stacks(xp, slots, self.sections)

    def _stacks(self, xp: Any, slots: Any, sections: dict[Place, _Section]) -> dict[Place, Stack]:
        integers = slots.view(np.int32)
        found = {}
        for place, each in sections.items():
            count = len(each.outputs)
            starts = [*(outputs.start for outputs in each.outputs), each.outs]
            found[place] = Stack(
                a=_view(xp, slots[:, each.a :], count * self.rank, each.inner),
                b=_view(xp, slots[:, each.b :], each.outs, self.rank),
                ranks=integers[:, each.ranks : each.ranks + count],
                starts=xp.asarray(np.array(starts, np.int32)),
                grain=gcd(*starts),
            )
        return found


def _view(xp: Any, slots: Any, rows: int, columns: int) -> Any:
    """The matrix that each slot begins with: `[slots, rows, columns]`."""
    size = slots.itemsize
    strides = (slots.strides[0], columns * size, size)
    return xp.lib.stride_tricks.as_strided(slots, (len(slots), rows, columns), strides)


def _within(inner: slice, outer: slice) -> bool:
    return bool(outer.start <= inner.start and inner.stop <= outer.stop)


@dataclass(frozen=True, eq=False)
class PinnedAdapter:
    """An adapter as a slot has it, in pinned memory."""

    adapter: Adapter
    slot: NDArray[Any]


class DeviceAdapters(AdapterBooks[PinnedAdapter]):
    """A GPU shard's adapters. What queues work belongs inside `device.current()`."""

    #: Slots of the rows that are about to run, int32 on the device; -1: none.
    rows: Any

    def __init__(
        self,
        device: Device,
        model: Model,
        weights: ShardWeights,
        layers: range,
        *,
        dtype: Any,
        source: AdapterSource,
        max_rank: int,
        slots: int,
    ) -> None:
        """`slots` different adapters may run at once, with matrices of `dtype`. Raises ValueError
        if the device has no room for them."""
        super().__init__(model, layers, source=source, max_rank=max_rank)
        self._device = device
        self._layout = layout = SlotLayout(model, weights, layers, max_rank, dtype)
        xp = device.xp
        size, free = slots * layout.words * layout.dtype.itemsize, device.free_memory()
        if size > free:
            raise ValueError(
                f"{slots} adapters of rank {max_rank} take {size >> 20} MiB of GPU memory, of "
                f"which {free >> 20} MiB are free: lower --max-loras or --max-lora-rank"
            )
        self._memory = xp.zeros((slots, layout.words), layout.dtype)
        places = layout.stacks(xp, self._memory)
        self._stacks = {id(a): places[p] for p, a in placed_weights(weights) if p in places}
        # What lies in each slot, when its copy was queued, and the order of last use.
        self._held: list[PinnedAdapter | None] = [None] * slots
        self._copied: list[Mark | None] = [None] * slots
        self._by_age = list(range(slots))
        self._slot_of: dict[int, int] = {}  # by sequence

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that slots have."""
        return int(self._memory.nbytes)

    def prepare(self, max_seqs: int, max_tokens: int, max_wanted: int, ring: int) -> None:
        """Make room for the slots of a step's rows, of which so many may be wanted; `ring` steps
        may be on their way."""
        self._slot_of_row = np.full(max_seqs, -1, np.int32)  # of the tables
        self._max_tokens = max_tokens
        size = max_tokens + max_wanted
        self._uploaded = self._device.xp.full(size, -1, np.int32)
        self._staging = [self._device.pinned(4 * size).view(np.int32) for _ in range(ring)]
        self._marks: list[Mark | None] = [None] * ring
        self._next = 0
        self._last: NDArray[np.int32] | None = None  # the rows of the decodes that are uploaded

    def hold(self, adapter: Adapter, found: dict[Place, LowRank]) -> PinnedAdapter:
        layout = self._layout
        with self._device.current():
            pinned = self._device.pinned(layout.words * layout.dtype.itemsize)
        slot = pinned.view(layout.dtype)
        with np.errstate(over="ignore"):
            layout.fill(slot, found)
        for section in layout.sections.values():
            if not np.isfinite(slot[section.a : section.b + section.outs * layout.rank]).all():
                raise CheckpointError(
                    f"{adapter.path}: values beyond {layout.dtype}; serve it with --dtype bfloat16"
                )
        return PinnedAdapter(adapter, slot)

    def start(self, plan: StepPlan, rows: Mapping[int, int]) -> None:
        """Sequences end, and start in `rows` of the step's tables; queues the copies of adapters
        that those need. Raises IndexError if more different ones run than there are slots."""
        self.take(plan)
        for seq in plan.ends:
            self._slot_of.pop(seq, None)
        for start in plan.starts:
            slot = -1
            if (held := self._running.get(start.seq)) is not None:
                slot = self._slot_of[start.seq] = self._seat(held)
            self._slot_of_row[rows[start.seq]] = slot

    def _seat(self, held: PinnedAdapter) -> int:
        """The slot that an adapter is in from now on."""
        if held in self._held:
            slot = self._held.index(held)
        else:
            used = set(self._slot_of.values())
            slot = next((each for each in self._by_age if each not in used), -1)
            if slot < 0:
                raise IndexError(f"more than {len(self._held)} adapters at once")
            if (copied := self._copied[slot]) is not None:
                copied.wait()  # it is done with the memory that is let go of here
            self._device.upload(held.slot, self._memory[slot])
            self._held[slot], self._copied[slot] = held, self._device.mark()
        self._by_age.remove(slot)
        self._by_age.append(slot)
        return slot

    def forget_sequences(self) -> None:
        super().forget_sequences()
        self._slot_of.clear()

    def select(self, step: Step) -> bool:
        """Queue the upload of a step's slots; False, and nothing, if no row has an adapter."""
        if not self._slot_of:
            return False
        if step.is_decode and step.rows is self._last:
            return True
        own = self._slot_of_row[step.rows]
        if own.max() < 0:
            return False
        if (mark := self._marks[self._next]) is not None:
            mark.wait()
        staged = self._staging[self._next]
        staged[:] = -1
        staged[: step.tokens] = np.repeat(own, step.counts)
        staged[self._max_tokens :][: len(step.logit_rows)] = staged[step.logit_rows]
        self._device.upload(staged, self._uploaded)
        self._marks[self._next] = self._device.mark()
        self._next = (self._next + 1) % len(self._staging)
        self._last = step.rows if step.is_decode else None
        return True

    def packed(self, first: int, count: int) -> Any:
        """Slots of the step's packed rows from `first` on."""
        return self._uploaded[first : first + count]

    def wanted(self, count: int) -> Any:
        """Slots of the rows whose logits are wanted."""
        return self._uploaded[self._max_tokens :][:count]

    def stack(self, weight: Any) -> Stack | None:
        """What adapters add to products by a weight."""
        return self._stacks.get(id(weight))
