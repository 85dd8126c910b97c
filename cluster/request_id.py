"""The id of the request that runs in this context, for the lines that logs have about it."""

from __future__ import annotations

from contextvars import ContextVar

#: Empty where no request runs.
request_id: ContextVar[str] = ContextVar("request_id", default="")
