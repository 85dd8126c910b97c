"""A replica's GPU shards on NumPy arrays, a thread each, driven as if they were one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tensorray.actors.host_communicator import MeetingPoint
from tensorray.actors.link import PendingStep
from tensorray.actors.protocol import StepPlan, StepResult
from tensorray.builder.model import Layout

from .gpu_shards import StepwiseShard


class ShardRanks:
    """Tensor-parallel shards; `make` gives the one of a rank's layout."""

    def __init__(self, size: int, make: Callable[[Layout], StepwiseShard]) -> None:
        self.shards = [make(Layout(tp_size=size, tp_rank=rank)) for rank in range(size)]
        (self._speaker,) = (shard for shard in self.shards if shard.info.answers)
        # One plan after the other on each, whatever the others are at.
        self._threads = [ThreadPoolExecutor(1) for _ in self.shards]
        self._epoch = 0
        self.join()

    def join(self) -> None:
        """Have all meet, as they do at the start and after a failure."""
        self._epoch += 1
        points = [MeetingPoint() for _ in self.shards]
        members = [point.endpoint for point in points]
        blocks = min(shard.info.kv.num_blocks for shard in self.shards)

        def meet(rank: int) -> None:
            world = points[rank].join(rank, members, epoch=self._epoch)
            self.shards[rank].join(world, blocks)

        meetings = [thread.submit(meet, rank) for rank, thread in enumerate(self._threads)]
        for meeting in meetings:
            meeting.result()
        self.info = self._speaker.info

    def submit(self, plan: StepPlan) -> PendingStep:
        started = [
            thread.submit(shard.submit, plan)
            for thread, shard in zip(self._threads, self.shards, strict=True)
        ]

        def result() -> StepResult:
            results = [each.result()() for each in started]
            return results[self.shards.index(self._speaker)]

        return result
