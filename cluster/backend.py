"""What the HTTP side asks of an engine, near or far."""

from __future__ import annotations

from typing import Protocol

import msgspec

from tensorray.cluster.frontend import EngineClient


class ShardStatus(msgspec.Struct):
    """One shard's process. `answers` is whether it did just now; without it the rest is 0."""

    rank: int
    answers: bool
    pid: int = 0
    node: str = ""  # Ray's id
    peak_rss_bytes: int = 0  # 0 where the platform does not tell


class EngineStatus(msgspec.Struct):
    """One engine: what it is, how it is, and its shards, by rank."""

    engine: str  # its label in the metrics
    failure: str | None  # why it can't serve; None while it can
    device: str
    weight_bytes: int  # of one shard
    kv_cache_bytes: int  # of one shard
    load_seconds: float
    shards: list[ShardStatus]


class Backend(EngineClient, Protocol):
    """An engine, near or far, and how it is."""

    async def failure(self) -> str | None:
        """Why it can't serve; None while it can."""
        ...

    async def metrics(self) -> bytes:
        """A Prometheus scrape."""
        ...

    async def status(self) -> list[EngineStatus]:
        """Each engine that there is and that has ever answered; several where the model has
        replicas."""
        ...
