"""An engine's part in handing prompts from replicas that prefill to replicas that decode.

On the one side sequences are held until whoever asked for that cancels them, or for so long at
most; on the other side blocks are fetched, by each shard from its like (actors/kv_door.py), a few
prompts at a time and in order: were all to share what the network carries, then under load none
might come in time. What does not come is computed: a fetch can't fail a request.

Splitting the two phases up is DistServe's and Splitwise's idea (arXiv 2401.09670, 2311.18677).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from tensorray.actors import kv_door
from tensorray.actors.kv_door import HandoverError
from tensorray.actors.link import ShardError
from tensorray.actors.protocol import Door
from tensorray.cluster.fetches import Fetch
from tensorray.cluster.request import Source
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.sequence import Status

logger = logging.getLogger(__name__)

#: Prompts that are fetched at once: enough that one is read while another is written.
AT_ONCE = 4


@dataclass
class HandoverStats:
    """Counters from the start; seconds, bytes over all shards."""

    held: int = 0  # sequences that were prefilled for another replica
    expired: int = 0  # of these, the ones that nobody released in time
    fetched: int = 0  # sequences whose prompt came from another replica
    failed: int = 0  # sequences whose prompt should have, and was computed
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Handovers:
    """Sequences that are held, and fetches that are under way. Belongs to the engine's loop."""

    def __init__(
        self,
        scheduler: Scheduler,
        seconds: float,
        *,
        expire: Callable[[int], None],
        wake: Callable[[], None],
        fail: Callable[[ShardError], None],
    ) -> None:
        """`seconds` is the most that a sequence is held, and that it waits for its blocks. `expire`
        ends a sequence held too long, `wake` says that a fetch has ended, `fail` that a shard does
        not answer."""
        self.stats = HandoverStats()
        self._scheduler = scheduler
        self._seconds = seconds
        self._expire, self._wake, self._fail = expire, wake, fail
        self._held: dict[int, asyncio.TimerHandle] = {}
        self._fetching: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(AT_ONCE)

    def hold(self, seq: int, doors: list[Door], blocks: list[list[int]]) -> Source:
        """A sequence is held from now on; where it is found."""
        self.stats.held += 1
        loop = asyncio.get_running_loop()
        self._held[seq] = loop.call_later(self._seconds, self._too_late, seq)
        return Source(doors, seq, blocks if doors else [])

    def release(self, seq: int) -> bool:
        """Whether the sequence was held; it is not any more."""
        timer = self._held.pop(seq, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def begin(self, doors: list[Door]) -> None:
        """Fetch what may be fetched from now on, for the shards behind `doors`, by rank."""
        for fetch in self._scheduler.fetches():
            task = asyncio.create_task(self._in_turn(fetch, doors))
            self._fetching.add(task)
            task.add_done_callback(self._fetching.discard)

    def forget(self) -> None:
        """The shards know no sequence any more: what is held is lost, what is fetched unwanted."""
        for task in self._fetching:
            task.cancel()
        for seq in list(self._held):
            self.release(seq)
            self._expire(seq)

    async def _in_turn(self, fetch: Fetch, doors: list[Door]) -> None:
        deadline = time.monotonic() + self._seconds
        async with self._turns:
            if fetch.sequence.status is Status.FETCHING:
                await self._fetch(fetch, doors, deadline - time.monotonic())
            else:  # cancelled meanwhile
                self._scheduler.fetched(fetch.sequence.seq, False)
        self._wake()

    async def _fetch(self, fetch: Fetch, doors: list[Door], seconds: float) -> None:
        began = time.perf_counter()
        source, stats = fetch.source, self.stats
        try:
            if seconds <= 0:
                raise HandoverError("too many came before it")
            if len(source.doors) != len(doors):
                raise HandoverError(
                    f"a replica of {len(source.doors)} shards can't hand over to one of "
                    f"{len(doors)}"
                )
            came = await asyncio.gather(
                *(
                    kv_door.fetch(here, there, source.seq, fetch.theirs, fetch.ours, seconds)
                    for here, there in zip(doors, source.doors, strict=True)
                ),
                return_exceptions=True,
            )
            errors = [each for each in came if isinstance(each, BaseException)]
            for error in sorted(errors, key=lambda each: isinstance(each, HandoverError)):
                raise error
            stats.fetched += 1
            stats.blocks += len(fetch.ours) * len(doors)
            stats.bytes += sum(each for each in came if isinstance(each, int))
            stats.seconds += time.perf_counter() - began
            self._scheduler.fetched(fetch.sequence.seq, True)
        except HandoverError as error:
            logger.warning("a prompt is computed here, as it could not be fetched: %s", error)
            stats.failed += 1
            self._scheduler.fetched(fetch.sequence.seq, False)
        except Exception as error:
            # Its blocks can't be given to anybody before the shards have started anew.
            stats.failed += 1
            if not isinstance(error, ShardError):
                error = ShardError(f"a fetch failed: {error!r}")
            self._fail(error)

    def _too_late(self, seq: int) -> None:
        if self.release(seq):
            logger.warning("nobody fetched a prompt within %g s", self._seconds)
            self.stats.expired += 1
            self._expire(seq)
