"""How long a request may take, from its arrival to its last token, and how long its client may
take to read.

A layer around the whole application: when the time is over the endpoint is cancelled, and with it
whatever it has running or waiting in the engine, whose blocks are free at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tensorray.cluster.errors import ApiError, bad_request
from tensorray.cluster.responses import error_response

TIMEOUT_HEADER = "X-Request-Timeout"

_KEY = "tensorray.deadline"


class Deadline:
    """When a request's time is over; None: never."""

    def __init__(self, seconds: float | None) -> None:
        self._began = time.monotonic()
        self.seconds = seconds
        self._tightened = asyncio.Event()

    def at_most(self, seconds: float | None) -> None:
        """The request itself asks for no more than so many seconds, counted from its arrival."""
        if seconds is not None and (self.seconds is None or seconds < self.seconds):
            self.seconds = seconds
            self._tightened.set()

    async def over(self) -> None:
        """Returns when it is."""
        while True:
            self._tightened.clear()
            left = None
            if self.seconds is not None:
                left = self._began + self.seconds - time.monotonic()
                if left <= 0:
                    return
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._tightened.wait(), left)


def deadline_of(scope: Scope) -> Deadline:
    """A request's deadline, to be made tighter."""
    found = scope.get(_KEY)
    return found if isinstance(found, Deadline) else Deadline(None)


class Deadlines:
    """ASGI middleware. `seconds` is what a request may take at most (None: any time), the
    X-Request-Timeout header may ask for less; `read_seconds` is how long a client may leave what
    was sent unread, where that is noticed here."""

    def __init__(self, app: ASGIApp, seconds: float | None, read_seconds: float) -> None:
        self._app = app
        self._seconds = seconds
        self._read_seconds = read_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        deadline = scope[_KEY] = Deadline(self._seconds)
        try:
            deadline.at_most(_asked(Headers(scope=scope)))
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        kind: str | None = None  # the answer's content type, once it has begun
        unread = asyncio.Event()
        sending: float | None = None  # since when the client is waited for
        alarm: asyncio.TimerHandle
        loop = asyncio.get_running_loop()

        async def watched(message: Message) -> None:
            nonlocal kind, sending
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
            sending = loop.time()
            await send(message)
            sending = None

        def look() -> None:  # one alarm a request: setting one a token costs more than the token
            nonlocal alarm
            waited = 0.0 if sending is None else loop.time() - sending
            if waited >= self._read_seconds:
                unread.set()
            else:
                alarm = loop.call_later(self._read_seconds - waited, look)

        alarm = loop.call_later(self._read_seconds, look)

        answering = asyncio.ensure_future(self._app(scope, receive, watched))
        waits = [asyncio.ensure_future(each) for each in (deadline.over(), unread.wait())]
        try:
            await asyncio.wait({answering, *waits}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
                return
        finally:
            alarm.cancel()
            for task in (answering, *waits):
                task.cancel()
            await asyncio.gather(answering, *waits, return_exceptions=True)
        if unread.is_set():
            raise ConnectionAbortedError("the client does not read its answer")  # closes it
        late = timed_out(deadline.seconds or 0.0)
        if kind is None:
            await error_response(late)(scope, receive, send)
        elif kind.startswith("text/event-stream"):
            event = b"data: " + late.body() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            raise ConnectionAbortedError(late.message)


def timed_out(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"The request was not done within its {seconds:g} s, its wait in the queue included; ask "
        "for less, or allow more time.",
        type="timeout_error",
        code="request_timeout",
    )


def _asked(headers: Headers) -> float | None:
    """What the header asks for, in seconds. Raises ApiError."""
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise bad_request(f"{TIMEOUT_HEADER}: seconds, a number above 0 (got {text[:60]!r}).")
    return seconds
