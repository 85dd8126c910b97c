"""How a server goes: it ends what it has, and turns away what comes.

Serve takes an application's route away before its streams have ended, and says 404 from then on, as
if there had never been a model. So `tensorray serve` has its ingresses close before.
"""

from __future__ import annotations

import asyncio

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Receive, Scope, Send

from tensorray.cluster.error_shapes import for_path
from tensorray.cluster.errors import ApiError
from tensorray.cluster.responses import error_response

# What a load balancer asks to know where to send requests.
_HEALTH = frozenset({"/health", "/v2/health/ready"})


class Closing:
    """Whether an ingress takes requests, and how many it has. Belongs to its event loop."""

    def __init__(self) -> None:
        self.begun = False
        self._running = 0
        self._none = asyncio.Event()
        self._none.set()

    async def close(self) -> None:
        """Take no request any more; return when those that run have ended."""
        self.begun = True
        await self._none.wait()

    def __enter__(self) -> None:
        """A request has come."""
        self._running += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._running -= 1
        if not self._running:
            self._none.set()


class TurnsAway:
    """ASGI middleware: of a server that closes, 503 to whoever asks for work or for its health."""

    def __init__(self, app: ASGIApp, closing: Closing) -> None:
        self._app = app
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = scope["type"] == "http"
        work = http and scope["method"] == "POST"
        path = get_route_path(scope) if http else ""
        if self._closing.begun and (work or path in _HEALTH):
            await error_response(for_path(path, _going()))(scope, receive, send)
        elif work:
            with self._closing:
                await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _going() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down: it ends what it has and takes nothing new.",
        type="service_unavailable_error",
        code="shutting_down",
        headers={"Retry-After": "5"},
    )
