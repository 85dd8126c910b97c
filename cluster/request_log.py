"""Logs: one line a request, and the request's id in every line that is about it.

The id is the client's `x-request-id`, or one made here; the answer carries it back, and it goes
along to the router, so that lines of both can be put together. Prompts and answers are not logged.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tensorray.cluster.request_id import request_id

HEADER = "X-Request-Id"

LogFormat = Literal["text", "json"]

#: What may be an id: nothing that could be taken for another line, or field, of a log.
_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)

# The project's own, and the one that Serve configures in its replicas.
_LOGGERS = ("tensorray", "ray.serve")

access = logging.getLogger("ray.serve.tensorray")


class RequestIds:
    """ASGI middleware: gives every request its id, and logs its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        mine = given if _ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(mine)
        began = time.monotonic()
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])[HEADER] = mine
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            if scope["method"] == "POST" or status >= 400:
                took = time.monotonic() - began
                access.info(
                    "%s %s %s in %.3f s",
                    scope["method"],
                    scope["path"][:200],
                    status or "ended by the client",
                    took,
                    extra={"status": status, "seconds": round(took, 6)},
                )
            request_id.reset(token)


class _Format(logging.Formatter):
    """What both formats have: the id of a request's line."""

    @staticmethod
    def id_of(record: logging.LogRecord) -> str:
        found = getattr(record, "request", "") or request_id.get()
        return str(found)


class TextFormat(_Format):
    """2026-01-31 12:00:00,123 WARNING engine [id] message"""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        when = self.formatTime(record)
        name = record.name.rpartition(".")[2]
        found = self.id_of(record)
        return f"{when} {record.levelname} {name} {f'[{found}] ' if found else ''}{text}"


class JsonFormat(_Format):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, and, where there are,
    request_id, status, seconds, exception."""

    converter = time.gmtime  # type: ignore[assignment]

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if found := self.id_of(record):
            line["request_id"] = found
        for name in ("status", "seconds"):
            if hasattr(record, name):
                line[name] = getattr(record, name)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(form: LogFormat) -> None:
    """Have this process log in that form, wherever its logs go: Serve's file of a replica as well
    as the standard error stream."""
    formatter = JsonFormat() if form == "json" else TextFormat()
    for name in _LOGGERS:
        log = logging.getLogger(name)
        if not log.handlers:
            log.addHandler(logging.StreamHandler())
            log.propagate = False
        log.setLevel(logging.INFO)
        for handler in log.handlers:
            handler.setFormatter(formatter)
