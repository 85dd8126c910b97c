"""Pairs of engines over real shards, one of which prefills for the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorray.actors.local_replica import LocalReplica
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Engine
from tensorray.cluster.prefill_first import PrefillFirst
from tensorray.cluster.replicas import Replicas

from .tiny_models import directory


@asynccontextmanager
async def engine(
    model: str | Path = "gemma3", hold_seconds: float = 60.0, **changes: Any
) -> AsyncIterator[Engine]:
    """The shards of a tiny model, or one in a directory, and their engine; `changes` are
    EngineConfig's fields."""
    settings: dict[str, Any] = {
        "model": str(directory(model) if isinstance(model, str) else model),
        "device": "cpu",
        "num_threads": 1,
        "max_model_len": 64,
        "num_kv_blocks": 200,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 24,
    }
    config = EngineConfig(**{**settings, **changes})
    replica = LocalReplica([config.shard(rank) for rank in range(config.num_shards)])
    try:
        link = await replica.connect()
        found = Engine(link, config.scheduler(link.info), hold_seconds=hold_seconds)
        await found.start()
        try:
            yield found
        finally:
            await found.close()
    finally:
        replica.close()


def split(prefill: Engine, decode: Engine, min_tokens: int = 8) -> PrefillFirst:
    return PrefillFirst(prefill, Replicas([decode], foresee=True), min_tokens)


@dataclass
class Pair:
    prefill: Engine
    decode: Engine
    client: PrefillFirst = field(init=False)

    def __post_init__(self) -> None:
        self.client = split(self.prefill, self.decode)


@asynccontextmanager
async def pair(model: str | Path = "gemma3", **changes: Any) -> AsyncIterator[Pair]:
    async with engine(model, **changes) as prefill, engine(model, **changes) as decode:
        yield Pair(prefill, decode)
