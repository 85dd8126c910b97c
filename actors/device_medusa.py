"""Medusa heads on a GPU (Cai et al., arXiv 2401.10774): see medusa.py.

The residual stream that a sequence's newest token was chosen from is kept for each row of the
tables, as rounds choose, so nobody need know how many guesses were right. A guess is a few products
by one head, the last of which takes a hundred times what it takes to start it; so there are no
graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.device import Device, least_seconds
from tensorray.actors.device_drafter import TO_COME, DeviceDrafter
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.draft_choices import DraftChoices
from tensorray.actors.drafter import Guess
from tensorray.actors.medusa import head_logits
from tensorray.actors.step_buffers import StepBuffers
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.checkpoint.medusa import MedusaHead
from tensorray.builder.model import Model, Weights
from tensorray.kernels.rows import gather_rows

# Numbers of sequences that guesses are timed with.
_TIMED_ROWS = 1, 16
# What of a head goes to the device at once.
_SENT_BYTES = 16 << 20


class DeviceMedusa(DeviceDrafter):
    """Guesses by a checkpoint's Medusa heads, on the GPU of the shard that samples."""

    keeps_states = True

    def __init__(
        self,
        device: Device,
        heads: Sequence[MedusaHead],
        model: Model,
        head: Weights,
        *,
        dtype: Any,
        residual: Any,
    ) -> None:
        """`head` are the weights of the model's own head on the device, whose norm comes before
        these too. Heads go there as `dtype`; `residual` is the residual stream's."""
        self.most = len(heads)
        self._device = device
        self._model, self._head, self._residual = model, head, residual
        self._ops = ArrayOps(device.xp, {}, residual=residual)
        with device.current():
            self._heads = [self._sent(each, dtype) for each in heads]
        self.weight_bytes = self._heads[0].nbytes

    def _sent(self, head: MedusaHead, dtype: Any) -> MedusaHead:
        kind, xp = np.dtype(dtype), self._device.xp
        host = self._device.pinned(_SENT_BYTES).view(kind)

        def send(array: NDArray[Any]) -> Any:
            source, target = array.reshape(-1), xp.empty(array.size, kind)
            for first in range(0, array.size, len(host)):
                piece = host[: array.size - first]
                piece[:] = source[first : first + len(piece)]
                self._device.upload(piece, target[first : first + len(piece)])
                self._device.mark().wait()
            return target.reshape(array.shape)

        blocks = tuple((send(w), None if b is None else send(b)) for w, b in head.blocks)
        return MedusaHead(blocks, send(head.projection))

    def prepare(
        self,
        buffers: StepBuffers,
        sampler: DeviceSampler,
        decodes: Sequence[int],
        bodies: Sequence[int],
    ) -> None:
        xp, rows = self._device.xp, len(buffers.last_tokens)
        self._sampler = sampler
        self._choices = DraftChoices(self._device, sampler.state, xp.zeros(rows, np.int32))
        # What is below 0 in `rows` is the last.
        self._states = xp.zeros((rows + 1, self._model.hidden_size), self._residual)
        # Kernels of both are made now, rather than in a step.
        self._choices.begin()
        self.keep_states(self._states[:1], xp.zeros(1, np.int32), xp.zeros(1, np.int32))

    def record(self) -> dict[int, float]:
        found = {}
        for count in _TIMED_ROWS:
            rows = self._device.xp.zeros(count, np.int32)
            work = partial(self._guess_once, rows)
            found[count] = least_seconds(self._device, work)
        return found

    def _guess_once(self, rows: Any) -> None:
        head_logits(self._ops, self._heads[0], self._normed(rows))

    def keep_states(self, stream: Any, packed: Any, rows: Any) -> None:
        words = f"u{self._states.itemsize}"  # some libraries copy few dtypes
        self._states.view(words)[rows] = stream.view(words)[packed]

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        return [[TO_COME] * min(room, len(self._heads)) for room in rooms]

    def enqueue(
        self, lengths: Mapping[int, int], at: Mapping[int, int], rows: Any, into: Any
    ) -> None:
        if not lengths:
            return
        normed = self._normed(rows)

        def logits(ahead: int, count: int) -> Any:
            return head_logits(self._ops, self._heads[ahead], normed[:count])

        greedy = not any(map(self._sampler.draws, lengths))
        self._choices.fill([*lengths.values()], rows, into, logits, greedy=greedy)

    def _normed(self, rows: Any) -> Any:
        return self._model.final_norm(self._ops, self._head, gather_rows(self._states, rows))
