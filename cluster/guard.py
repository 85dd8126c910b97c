"""Who may use the API, and how much: keys, limits a key, headers' size.

A layer around the whole application, so that no endpoint can forget it.
"""

from __future__ import annotations

import hmac
import math
import re
import time
from collections.abc import Callable, Collection

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tensorray.cluster.error_shapes import for_path
from tensorray.cluster.errors import ApiError
from tensorray.cluster.key_digests import digest
from tensorray.cluster.responses import error_response

HEADER_BYTES = 32 << 10  # most that a request's headers may take together

# What a load balancer asks, and the page, which holds nothing and asks its user for the key.
_OPEN = re.compile(r"/|/web/[^/]*|/health|/version|/v2/health/(live|ready)")


class Allowance:
    """What one key may do: so many requests a minute (a bucket that fills steadily), so many at
    once; None for no limit. `clock` tells seconds."""

    def __init__(
        self,
        per_minute: int | None,
        at_once: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_minute = per_minute
        self._at_once = at_once
        self._clock = clock
        self._left = float(per_minute or 0)
        self._when = clock()
        self._running = 0

    def take(self) -> None:
        """Begin a request; `give_back` ends it. Raises ApiError (429) if it is one too many."""
        if self._at_once is not None and self._running >= self._at_once:
            raise _too_many(f"{self._at_once} requests at once", 1)
        if self._per_minute is not None:
            now = self._clock()
            rate = self._per_minute / 60
            self._left = min(self._per_minute, self._left + (now - self._when) * rate)
            self._when = now
            if self._left < 1:
                wait = math.ceil((1 - self._left) / rate)
                raise _too_many(f"{self._per_minute} requests a minute", wait)
            self._left -= 1
        self._running += 1

    def give_back(self) -> None:
        self._running -= 1


def _too_many(limit: str, seconds: int) -> ApiError:
    return ApiError(
        429,
        f"This API key's limit is {limit}; try again in {seconds} s.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(max(1, seconds))},
    )


class Guard:
    """ASGI middleware. Without `keys` (digests) anyone may use what it guards.

    Limits are each key's own, count what is posted, and hold in this process.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Collection[str],
        per_minute: int | None = None,
        at_once: int | None = None,
    ) -> None:
        self._app = app
        self._digests = list(keys)
        self._allowances = {each: Allowance(per_minute, at_once) for each in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken: Allowance | None = None
        try:
            _check_size(scope)
            if self._digests and not _OPEN.fullmatch(get_route_path(scope)):
                allowance = self._allowances[self._identify(Headers(scope=scope))]
                if scope["method"] == "POST":
                    allowance.take()
                    taken = allowance
        except ApiError as error:
            told = for_path(get_route_path(scope), error)
            await error_response(told)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)  # returns when a stream has ended, too
        finally:
            if taken is not None:
                taken.give_back()

    def _identify(self, headers: Headers) -> str:
        """The digest of the request's key. Raises ApiError (401)."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if not key and "x-api-key" in headers:  # Anthropic's way
            scheme, key = "bearer", headers["x-api-key"]
        given = digest(key.strip()) if not key.strip().startswith("sha256:") else ""
        found = ""
        for each in self._digests:  # all of them, in the same time whichever it is
            if hmac.compare_digest(each, given):
                found = each
        if scheme.lower() != "bearer" or not found:
            raise ApiError(
                401,
                "Incorrect API key provided; send this server's as 'Authorization: Bearer KEY'."
                if key
                else "You didn't provide an API key; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


def _check_size(scope: Scope) -> None:
    size = len(scope["path"]) + len(scope.get("query_string", b""))
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > HEADER_BYTES:
        raise ApiError(
            431,
            f"The request's address and headers are over {HEADER_BYTES} bytes; send less.",
            code="headers_too_large",
        )
