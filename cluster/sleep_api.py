"""Sleep by request, with vLLM's endpoints: POST /sleep, POST /wake_up, GET /is_sleeping.

A model that sleeps holds no device and no memory on one; its routers and ingresses stay, and it is
healthy, since the next request wakes it.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, runtime_checkable

import msgspec
from starlette.responses import Response

from tensorray.cluster.errors import ApiError
from tensorray.cluster.responses import json_response

_LOOK_SECONDS = 0.2


@runtime_checkable
class Sleeper(Protocol):
    """Engines whose shards can sleep."""

    async def sleep(self) -> str | None:
        """Why they do not, because one has requests; None if they are about to."""
        ...

    async def wake_up(self) -> None: ...

    async def asleep(self) -> bool:
        """Whether all do."""
        ...


class Sleeping(msgspec.Struct):
    """Answer of all three."""

    is_sleeping: bool


class SleepService:
    """The endpoints."""

    def __init__(self, sleeper: Sleeper) -> None:
        self._sleeper = sleeper

    async def sleep(self) -> Response:
        """Free the shards' place; the next request brings them back. 409 while there are any."""
        reason = await self._sleeper.sleep()
        if reason is not None:
            raise ApiError(409, f"The model can't sleep now: {reason}.", code="busy")
        return await self._when(True)

    async def wake_up(self) -> Response:
        """Have the shards back, before a request has to wait for them."""
        await self._sleeper.wake_up()
        return await self._when(False)

    async def is_sleeping(self) -> Response:
        """Whether it sleeps."""
        return self._told(await self._sleeper.asleep())

    async def _when(self, asleep: bool) -> Response:
        while await self._sleeper.asleep() != asleep:
            await asyncio.sleep(_LOOK_SECONDS)
        return self._told(asleep)

    def _told(self, asleep: bool) -> Response:
        return json_response(msgspec.json.encode(Sleeping(asleep)))
