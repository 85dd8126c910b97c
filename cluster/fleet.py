"""LoRA adapters of all engines that serve a model, as whoever speaks HTTP sees them.

Ingresses keep no list: what there is, they ask. So any of them may change it, and an engine that
came up after an adapter was loaded is given it when it is first asked for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol, cast

from tensorray.actors.adapter import Adapter
from tensorray.actors.link import ShardError
from tensorray.cluster.adapters import AdapterRefused, EngineAdapters
from tensorray.cluster.engine import EngineFailed
from tensorray.cluster.frontend import EngineClient
from tensorray.cluster.replicas import UnderWay
from tensorray.cluster.request import Delta, GenerationRequest, UnknownAdapter


class AdapterDoor(Protocol):
    """An engine's adapters, near or far."""

    async def load_adapter(self, adapter: Adapter) -> str | None:
        """Load it, unpublished. The reason why it can't be; None if it is."""
        ...

    async def publish_adapter(self, id: int) -> None: ...

    async def drop_adapter(self, id: int) -> None: ...

    async def list_adapters(self) -> list[Adapter]: ...


class LocalDoor:
    """An engine of this process."""

    def __init__(self, adapters: EngineAdapters) -> None:
        self._adapters = adapters

    async def load_adapter(self, adapter: Adapter) -> str | None:
        try:
            await self._adapters.load(adapter)
        except ValueError as error:  # CheckpointError is one
            return str(error)
        except ShardError as error:
            raise EngineFailed(str(error)) from error
        return None

    async def publish_adapter(self, id: int) -> None:
        self._adapters.publish(id)

    async def drop_adapter(self, id: int) -> None:
        self._adapters.drop(id)

    async def list_adapters(self) -> list[Adapter]:
        return self._adapters.listed()


class Fleet:
    """The adapters of all engines that serve a model. Belongs to one event loop."""

    def __init__(self, doors: Callable[[], Sequence[AdapterDoor]]) -> None:
        """`doors` are those of the engines there are now."""
        self._now = doors

    def _doors(self) -> Sequence[AdapterDoor]:
        doors = list(self._now())
        if not doors:
            raise EngineFailed("there is no engine just now")
        return doors

    async def listed(self) -> list[Adapter]:
        """Each name's newest version, by name."""
        newest: dict[str, Adapter] = {}
        for found in await asyncio.gather(*(door.list_adapters() for door in self._doors())):
            for adapter in found:
                if adapter.name not in newest or newest[adapter.name].id < adapter.id:
                    newest[adapter.name] = adapter
        return sorted(newest.values(), key=lambda each: each.name)

    async def load(self, name: str, path: str) -> Adapter:
        """Load an adapter in every engine; then, in all of them, the name stands for it.

        Raises AdapterRefused, and nothing has changed.
        """
        adapter = Adapter(name, time.time_ns(), path)
        doors = self._doors()
        await self._load(adapter, doors)
        await asyncio.gather(*(door.publish_adapter(adapter.id) for door in doors))
        return adapter

    async def unload(self, name: str) -> bool:
        """New requests don't find it any more. False if there is none."""
        doors = self._doors()
        found = await asyncio.gather(*(door.list_adapters() for door in doors))
        drops = [
            door.drop_adapter(adapter.id)
            for door, adapters in zip(doors, found, strict=True)
            for adapter in adapters
            if adapter.name == name
        ]
        await asyncio.gather(*drops)
        return bool(drops)

    async def spread(self, name: str) -> bool:
        """Give an adapter that some engine has to those that came up later. False if none has."""
        adapter = next((each for each in await self.listed() if each.name == name), None)
        if adapter is None:
            return False
        doors = self._doors()
        outcomes = await asyncio.gather(*(door.load_adapter(adapter) for door in doors))
        if any(outcomes):  # it was unloaded meanwhile
            return False
        await asyncio.gather(*(door.publish_adapter(adapter.id) for door in doors))
        return True

    async def _load(self, adapter: Adapter, doors: Sequence[AdapterDoor]) -> None:
        outcomes = await asyncio.gather(
            *(door.load_adapter(adapter) for door in doors), return_exceptions=True
        )
        wrong = next((each for each in outcomes if each is not None), None)
        if wrong is None:
            return
        drops = (door.drop_adapter(adapter.id) for door in doors)
        await asyncio.gather(*drops, return_exceptions=True)
        if isinstance(wrong, BaseException):
            raise wrong
        raise AdapterRefused(wrong)


class AdapterClient:
    """An EngineClient that gives engines the adapters they have missed."""

    def __init__(self, client: EngineClient, fleet: Fleet) -> None:
        self._client = client
        self._fleet = fleet
        self._running: dict[str, UnderWay] = {}  # those with an adapter, by request id

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """See EngineClient."""
        return self._with_adapter(request) if request.lora else self._client.generate(request)

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """See EngineClient."""
        under_way = self._running.get(request_id)
        if under_way is not None:
            await under_way.cancel(index)
        else:
            await self._client.cancel(request_id, index)

    async def _with_adapter(self, request: GenerationRequest) -> AsyncGenerator[list[Delta], None]:
        under_way = self._running[request.request_id] = UnderWay(request)
        try:
            try:
                async with aclosing(self._arriving(under_way)) as items:
                    async for deltas in items:
                        yield deltas
                return
            except UnknownAdapter:
                if not await self._fleet.spread(request.lora):
                    raise
                under_way.refused()
            if under_way.finished:
                return
            # Some of it may have come already, from a replica that is gone.
            async with aclosing(self._arriving(under_way)) as items:
                async for deltas in items:
                    yield deltas
        finally:
            del self._running[request.request_id]

    async def _arriving(self, under_way: UnderWay) -> AsyncGenerator[list[Delta], None]:
        # An engine of this process refuses at once, a far one when it is read.
        asked = under_way.request(self._client)
        arriving = cast("AsyncGenerator[list[Delta], None]", self._client.generate(asked))
        async with aclosing(arriving) as items:
            async for deltas in items:
                under_way.take(deltas)
                yield deltas
