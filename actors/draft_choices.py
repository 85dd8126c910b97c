"""What sequences would choose by a draft model's logits, on a device.

A sequence draws from these as it will from the large model's: with its own parameters and the
random numbers that are next (common random numbers, Daliri et al., arXiv 2408.07978), so that what
is guessed is what comes, the more often the closer the two models are. What edits logits is left
out: it costs guesses, never tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tensorray.actors.device import Device
from tensorray.kernels import batch_sampling as kernels


class DraftChoices:
    """Choices ahead of the sequences' own, in a copy of their state. All calls belong inside
    `device.current()`."""

    def __init__(self, device: Device, state: kernels.RowState, last_tokens: Any) -> None:
        """`state` is the sampler's, which is read. `last_tokens` int32, as many as it has rows, on
        the device: what is chosen for a row goes there."""
        xp = device.xp
        self._theirs = state
        self._ours = kernels.RowState(
            rows=xp.zeros_like(state.rows),
            last_tokens=last_tokens,
            words=xp.zeros((0, state.words.shape[1]), np.uint32),
            bias_tokens=xp.zeros((0, 1), np.int32),
            biases=xp.zeros((0, 1), np.float32),
        )
        self._out = xp.zeros(2 * len(state.rows), np.int32)

    def begin(self) -> None:
        """Queue a new start from where the sequences are."""
        kernels.copy_unedited(self._theirs, self._ours)

    def fill(
        self,
        lengths: Sequence[int],
        rows: Any,
        into: Any,
        logits: Callable[[int, int], Any],
        *,
        greedy: bool,
    ) -> None:
        """Queue so many choices for each of n sequences, falling in number, from where they are:
        int32 [sum(lengths)], all first ones before all second ones.

        `logits(ahead, count)` queues what the first `count` of them go by when they have made
        `ahead` choices; rows and `greedy` are as `enqueue` takes them.
        """
        self.begin()
        done = 0
        for ahead in range(max(lengths, default=0)):
            count = sum(length > ahead for length in lengths)
            chosen = self.enqueue(logits(ahead, count), rows[:count], greedy=greedy)
            into[done : done + count] = chosen
            done += count

    def enqueue(self, logits: Any, rows: Any, *, greedy: bool) -> Any:
        """Queue the choice of one token more for n sequences: int32 [n] on the device, below 0 for
        logits that admit none; overwritten by the next.

        logits [>= n, vocab], rows int32 [n]; `greedy` if none of the sequences draws.
        """
        count = len(rows)
        out = self._out[: 2 * count].reshape(2, count)
        choose = kernels.greedy_rows if greedy else kernels.sample_rows
        choose(logits[:count], rows, self._ours, out)
        return out[0]
