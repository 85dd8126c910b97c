"""What guesses on a device, where the host sees how many guesses there are and not which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.drafter import Drafter
from tensorray.actors.step_buffers import StepBuffers

#: Stands for a guess that the device makes: `draft` says so many of them.
TO_COME = -2


class DeviceDrafter(Drafter):
    """Guesses that are made on the device. `prepare` comes first, then `resize` and `record`; what
    queues work belongs inside `device.current()`."""

    #: Bytes of the weights that it reads for a guess.
    weight_bytes = 0
    #: Bytes of memory that it takes for each block of the KV cache.
    block_bytes = 0
    #: Whether it wants to `keep_states`.
    keeps_states = False

    def prepare(
        self,
        buffers: StepBuffers,
        sampler: DeviceSampler,
        decodes: Sequence[int],
        bodies: Sequence[int],
    ) -> None:
        """Make room for sequences that run by the large model's `buffers` and `sampler`. Graphs
        are to be of so many sequences, and of so many tokens."""

    def record(self) -> dict[int, float]:
        """Make graphs; the seconds that one guess takes for so many sequences."""
        return {}

    def forget(self) -> None:
        """Let go of all graphs."""

    def keep_states(self, stream: Any, packed: Any, rows: Any) -> None:
        """Queue the taking in of what n sequences chose by: of the residual stream [T, hidden] the
        rows `packed`, for the sequences in `rows` of the tables. int32 [n], on the device; below 0
        in `rows`: nothing was chosen."""

    def enqueue(
        self, lengths: Mapping[int, int], at: Mapping[int, int], rows: Any, into: Any
    ) -> None:
        """Queue the making of so many guesses for sequences, falling in number: int32
        [sum(lengths)], all first ones before all second ones.

        `at` are all sequences' rows of the tables, which are up to date, and `rows` those of the
        guessing ones, in order: int32 [len(lengths)] on the device.
        """
