"""A router's adapters as an ingress reaches them: by calls through Serve, few and slow."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any, cast

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from tensorray.actors.adapter import Adapter
from tensorray.cluster.engine import EngineFailed

_SECONDS = 30.0
_LOAD_SECONDS = 300.0


class RouterDoor:
    """An AdapterDoor. A router that does not answer raises EngineFailed."""

    def __init__(self, routers: DeploymentHandle[Any], name: str) -> None:
        """`name` is the router's among those of the deployment."""
        self._routers = routers
        self._name = name

    async def load_adapter(self, adapter: Adapter) -> str | None:
        return cast("str | None", await self._ask("load_adapter", adapter, seconds=_LOAD_SECONDS))

    async def publish_adapter(self, id: int) -> None:
        await self._ask("publish_adapter", id)

    async def drop_adapter(self, id: int) -> None:
        await self._ask("drop_adapter", id)

    async def list_adapters(self) -> list[Adapter]:
        return cast("list[Adapter]", await self._ask("list_adapters"))

    async def _ask(self, what: str, *arguments: object, seconds: float = _SECONDS) -> object:
        # Serve takes calls that come of one HTTP request for one another, so this comes of none.
        call = getattr(self._routers, what).remote
        asked = contextvars.Context().run(call, *arguments, replica=self._name)
        try:
            return await asyncio.wait_for(asked, seconds)
        except (asyncio.TimeoutError, RayError, RayServeException) as error:
            raise EngineFailed(f"its router does not answer ({type(error).__name__})") from error
