"""Adapter: one version of a LoRA adapter, as router and shards speak of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Adapter:
    """`id` stands for these very weights: another version under the same name has another id."""

    name: str
    id: int  # above 0, and in the order of loading
    path: str  # a directory that every shard sees, or a Hub id


@dataclass(frozen=True)
class AdapterSource:
    """How a shard gets at adapters' files: as at its model's."""

    token: str | None = None
    cache_dir: str | None = None
    offline: bool = False

    def find(self, path: str) -> Path:
        """The adapter's directory on this machine. Raises CheckpointError."""
        from tensorray.builder.checkpoint.peft import adapter_directory

        return adapter_directory(
            path, token=self.token, cache_dir=self.cache_dir, offline=self.offline
        )
