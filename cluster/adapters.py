"""LoRA adapters from the router's side: which names stand for what, and what may be forgotten.

Loading is in two parts, so that several engines change at once or not at all: shards `load` an
adapter while steps go on, then its name is made to stand for it (`publish`). A version that no
name stands for any more goes when the last request that runs with it has ended, and every plan
that may still name it has been heard of.

An engine knows its adapters, and its shards keep them when their router is lost; fleet.py is
about several engines.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tensorray.actors.adapter import Adapter
from tensorray.cluster.request import UnknownAdapter

logger = logging.getLogger(__name__)


class AdapterRefused(ValueError):
    """An adapter can't be loaded; the message says why."""


class AdapterHost(Protocol):
    """A replica's shards."""

    async def add_adapter(self, adapter: Adapter) -> None:
        """Load it in all of them, or in none. Raises AdapterRefused, or what the shards do."""

    async def remove_adapter(self, id: int) -> None:
        """Forget it in all of them."""


class EngineAdapters:
    """One engine's adapters. Belongs to its event loop."""

    def __init__(self, host: AdapterHost, most: int | None = None) -> None:
        """`most` adapters may be loaded at a time (None: any number)."""
        #: How many plans are on their way to the shards.
        self.in_flight: Callable[[], int] = lambda: 0
        self._host = host
        self._most = most
        self._loaded: dict[int, Adapter] = {}
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._dropped: set[int] = set()
        self._current: dict[str, int] = {}
        self._users: Counter[int] = Counter()  # requests that run with it
        self._fading: dict[int, int] = {}  # results to come before it can be forgotten
        self._removals: set[asyncio.Task[None]] = set()

    def adopt(self, adapters: Iterable[Adapter]) -> None:
        """Take over what shards have; of one name's versions the newest counts."""
        for adapter in sorted(adapters, key=lambda each: each.id):
            self._loaded[adapter.id] = adapter
            self.publish(adapter.id)

    async def load(self, adapter: Adapter) -> None:
        """Have the shards load it; nothing if they did. Raises AdapterRefused, or ValueError with
        a shard's reason."""
        if adapter.id in self._dropped:
            raise AdapterRefused("it was unloaded meanwhile")
        if adapter.id in self._loaded:
            return
        task = self._loading.get(adapter.id)
        if task is None:
            loading = {each.get_name() for each in self._loading.values()}
            names = {*self._current, *loading, adapter.name}
            if self._most is not None and len(names) > self._most:
                raise AdapterRefused(
                    f"{self._most} adapters are loaded already (--max-cpu-loras); unload one first"
                )
            task = asyncio.create_task(self._load(adapter), name=adapter.name)
            self._loading[adapter.id] = task
        await asyncio.shield(task)

    async def _load(self, adapter: Adapter) -> None:
        try:
            began = time.perf_counter()
            await self._host.add_adapter(adapter)
            self._loaded[adapter.id] = adapter
            seconds = time.perf_counter() - began
            logger.info("loaded adapter %s from %s in %.2f s", adapter.name, adapter.path, seconds)
        finally:
            del self._loading[adapter.id]

    def publish(self, id: int) -> None:
        """From now on its name stands for this version, unless for a newer one already."""
        if id not in self._loaded:  # it was unloaded meanwhile
            return
        name = self._loaded[id].name
        before = self._current.get(name, id)
        self._current[name] = max(before, id)
        if before != id:
            self.drop(min(before, id))

    def drop(self, id: int) -> None:
        """No new request gets this version; those that run with it keep it to their ends. It can't
        be loaded again."""
        self._dropped.add(id)
        adapter = self._loaded.get(id)
        if adapter is None:
            return
        if self._current.get(adapter.name) == id:
            del self._current[adapter.name]
        if not self._users[id]:
            self._fade(id)

    def listed(self) -> list[Adapter]:
        """Those that requests can have."""
        return [self._loaded[id] for id in self._current.values()]

    # --- the engine's ---

    def find(self, name: str, begun: int = 0) -> int:
        """The id that a request with this adapter gets: the version it has `begun` with if that is
        here, else the present one. Raises UnknownAdapter, also for one older than `begun`."""
        if begun in self._loaded:
            return begun
        id = self._current.get(name)
        if id is None or id < begun:
            raise UnknownAdapter(f"there is no adapter {name!r} here")
        return id

    def acquire(self, id: int) -> None:
        """A request runs with it."""
        self._users[id] += 1
        self._fading.pop(id, None)

    def release(self, id: int) -> None:
        """A request that ran with it has ended."""
        self._users[id] -= 1
        if not self._users[id]:
            del self._users[id]
            if id in self._loaded and self._current.get(self._loaded[id].name) != id:
                self._fade(id)

    def heard(self, *, of_all: bool = False) -> None:
        """The oldest plan's result is there, or none of those on their way will be."""
        for id, left in list(self._fading.items()):
            if left <= 1 or of_all:
                self._remove(id)
            else:
                self._fading[id] = left - 1

    @property
    def fading(self) -> bool:
        """Whether `heard` has something to do."""
        return bool(self._fading)

    def _fade(self, id: int) -> None:
        self._fading[id] = self.in_flight()
        if not self._fading[id]:
            self._remove(id)

    def _remove(self, id: int) -> None:
        self._fading.pop(id, None)
        adapter = self._loaded.pop(id)
        task = asyncio.get_running_loop().create_task(self._host.remove_adapter(id))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)
        logger.info("forgot adapter %s from %s", adapter.name, adapter.path)


class LocalHost:
    """Shards in this process."""

    def __init__(self, shards: Sequence[_Holder]) -> None:
        self._shards = shards

    async def add_adapter(self, adapter: Adapter) -> None:
        try:
            for shard in self._shards:
                await asyncio.to_thread(shard.add_adapter, adapter)
        except BaseException:
            await self.remove_adapter(adapter.id)
            raise

    async def remove_adapter(self, id: int) -> None:
        for shard in self._shards:
            shard.remove_adapter(id)


class _Holder(Protocol):
    def add_adapter(self, adapter: Adapter) -> None: ...

    def remove_adapter(self, id: int) -> None: ...
