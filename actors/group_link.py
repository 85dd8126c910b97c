"""One link to all shards of a replica: plans fan out, results come from the shard that samples.

A plan is encoded once and written to every shard's connection; the shard that samples answers, the
others speak only of failures. When one fails, its peers fail with it (their collectives end), so
the first thing heard is often not the cause: `receive` waits a moment for the one that says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from tensorray.actors.link import ShardError
from tensorray.actors.protocol import ShardInfo, StepPlan, StepResult
from tensorray.actors.tcp_link import LostPeer, TcpLink
from tensorray.actors.wire import frame

# How long a failure's cause may take to be heard of after its consequences.
_CAUSE_SECONDS = 0.5


class GroupFailed(ShardError):
    """Shards of a replica failed. `ranks` are those that failed of themselves, with their reasons;
    empty if none said so."""

    def __init__(self, message: str, ranks: dict[int, str]) -> None:
        super().__init__(message)
        self.ranks = ranks


class _Elsewhere(ShardError):
    """What the shard that samples is told when another is at fault, or nobody knows which."""


class GroupLink:
    """The links to a replica's shards, by rank, as one."""

    def __init__(self, links: Sequence[TcpLink]) -> None:
        self.links = list(links)
        (self._speaker,) = (link for link in self.links if link.info.answers)
        infos = [link.info for link in self.links]
        self.info: ShardInfo = msgspec.structs.replace(
            self._speaker.info,
            device=f"{len(infos)} x {self._speaker.info.device}",
            weight_bytes=sum(info.weight_bytes for info in infos),
            kv_cache_bytes=sum(info.kv_cache_bytes for info in infos),
            load_seconds=max(info.load_seconds for info in infos),
            doors=[door for info in infos for door in info.doors],
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._errors: dict[int, ShardError] = {}
        self._watchers = [
            asyncio.create_task(self._watch(rank, link))
            for rank, link in enumerate(self.links)
            if link is not self._speaker
        ]

    def send(self, plan: StepPlan) -> None:
        data = frame(self._encoder.encode(plan))
        for rank, link in enumerate(self.links):
            try:
                link.send_frame(data)
            except ShardError as error:  # noqa: PERF203
                # Told by `receive`, which can wait for the cause; there is a step to wait for now.
                self._errors.setdefault(rank, error)
                self._speaker.fail(_Elsewhere())

    async def receive(self) -> StepResult:
        try:
            return await self._speaker.receive()
        except ShardError as error:
            raise await self._failure(error) from error

    async def check(self) -> None:
        try:
            await self._speaker.check()
        except ShardError as error:
            raise await self._failure(error) from error

    def fail(self, error: ShardError) -> None:
        self._speaker.fail(_Elsewhere(str(error)))

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*(link.close() for link in self.links))

    async def _watch(self, rank: int, link: TcpLink) -> None:
        """Until a shard that has nothing to say says something."""
        try:
            await link.receive()
            error = ShardError("it sent a result, which another shard was to send")
        except ShardError as failure:
            error = failure
        self._errors.setdefault(rank, error)
        self._speaker.fail(_Elsewhere())

    async def _failure(self, error: ShardError) -> GroupFailed:
        """What to raise, once the shard that samples has failed or was told to give up."""
        if not isinstance(error, _Elsewhere):
            self._errors.setdefault(self.links.index(self._speaker), error)
        deadline = asyncio.get_running_loop().time() + _CAUSE_SECONDS
        while not (causes := self._causes()) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        told = causes or {rank: str(each) for rank, each in self._errors.items()}
        text = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(told.items()))
        return GroupFailed(text or str(error), causes)

    def _causes(self) -> dict[int, str]:
        return {
            rank: str(error)
            for rank, error in self._errors.items()
            if not isinstance(error, LostPeer)
        }
