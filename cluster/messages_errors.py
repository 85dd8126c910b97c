"""Errors as Anthropic's clients read them.

https://docs.anthropic.com/en/api/errors
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tensorray.cluster.errors import ApiError

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageFault(msgspec.Struct):
    type: str
    message: str


class MessageErrorAnswer(msgspec.Struct):
    """What went wrong, and what to change."""

    error: MessageFault
    type: Literal["error"] = "error"


class MessagesError(ApiError):
    """An error in Anthropic's shape."""

    @classmethod
    def of(cls, error: ApiError) -> MessagesError:
        return cls(error.status, error.message, headers=error.headers)

    def body(self) -> bytes:
        default = "invalid_request_error" if self.status < 500 else "api_error"
        fault = MessageFault(_ERRORS.get(self.status, default), self.message)
        return msgspec.json.encode(MessageErrorAnswer(fault))

    def event(self) -> bytes:
        return b"event: error\ndata: " + self.body() + b"\n\n"
