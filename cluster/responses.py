"""Answers that end with their client: whoever hangs up has nothing left running.

Both are ASGI applications, as Starlette's own responses are. They hold back the status until the
first token is there, so that what goes wrong before it is told by an HTTP status.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tensorray.cluster.errors import ApiError

T = TypeVar("T")
Explain = Callable[[Exception], Awaitable[ApiError]]


def json_response(
    body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, error.headers)


class WholeResponse(Response):
    """Sends what `work` comes to: a response, or the body of one in JSON."""

    def __init__(
        self,
        work: Coroutine[Any, Any, bytes | Response],
        explain: Explain,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers=headers)
        self._work = work
        self._explain = explain
        self._extra = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            result = await unless_gone(receive, self._work)
            response = (
                json_response(result, headers=self._extra) if isinstance(result, bytes) else result
            )
        except ClientDisconnect:
            return
        except Exception as error:
            response = error_response(await self._explain(error))
        await response(scope, receive, send)


class EventStream(Response):
    """Sends server-sent events as they come. An error after the first is an event of its own."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        explain: Explain,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            headers={
                **headers,
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",  # nginx would collect events otherwise
            },
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._events = events
        self._explain = explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await unless_gone(receive, self._send_all(scope, receive, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events):
                async for event in self._events:
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": 200,
                                "headers": self.raw_headers,
                            }
                        )
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            told = await self._explain(error)
            if not started:
                await error_response(told)(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": told.event(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work; if the client hangs up meanwhile, cancel it and raise ClientDisconnect."""
    working = asyncio.ensure_future(work)
    hangup = asyncio.ensure_future(_hangup(receive))
    try:
        await asyncio.wait({working, hangup}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, hangup):
            task.cancel()
        await asyncio.gather(working, hangup, return_exceptions=True)


async def _hangup(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
