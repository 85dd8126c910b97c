"""What goes wrong in the API, as OpenAI's error objects: one message that says what to change.

https://platform.openai.com/docs/guides/error-codes/api-errors
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.engine import EngineFailed
from tensorray.cluster.request import QueueFull, RequestRefused, UnknownAdapter

# Where a union's branch, not the user's data, names a step on the way to the offending value.
_BRANCH = re.compile(r"^(str|int|float|bool|none|\[key\]|(list|dict|tuple)\[.*\]|function-.*)$")


class ApiError(Exception):
    """An answer that is an error. `param` is the request's field at fault, if it is one field's."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or ("invalid_request_error" if status < 500 else "server_error")
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The response's body, JSON."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "replace")

    def event(self) -> bytes:
        """The same within a stream, as a server-sent event."""
        return b"data: " + self.body() + b"\n\n"


class InternalError(RuntimeError):
    """A fault of ours, told by another process; its log has the traceback."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")


def queue_full(message: str) -> ApiError:
    return ApiError(
        429,
        message,
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def unavailable(reason: str) -> ApiError:
    return ApiError(
        503,
        f"The engine is not available: {reason}",
        type="service_unavailable_error",
        code="engine_unavailable",
        headers={"Retry-After": "5"},
    )


def internal() -> ApiError:
    return ApiError(500, "The server failed on this request; its log says how.")


def from_exception(error: BaseException) -> ApiError:
    """The error a client sees for whatever a request raised; a 500 is a bug of ours."""
    match error:
        case ApiError():
            return error
        case BadRequest():
            return bad_request(str(error), error.param)
        case ValidationError():
            message, param = explain(error)
            return bad_request(message, param)
        case QueueFull():
            return queue_full(str(error))
        case UnknownAdapter():
            return model_not_found(str(error))
        case RequestRefused():
            return bad_request(str(error))
        case EngineFailed():
            return unavailable(str(error))
        case _:
            return internal()


def explain(error: ValidationError) -> tuple[str, str | None]:
    """A readable message for a validation error, and the field at fault.

    Of a union's complaints (a string, or a list of strings, …) the branch that got furthest into
    the value knows best what is wrong with it; branches that got equally far all have their say.
    """
    found = error.errors(include_url=False)
    first = found[0]["loc"][:1]
    same = [item for item in found if item["loc"][:1] == first]
    depth = max(_reach(item["loc"]) for item in same)
    deepest = [item for item in same if _reach(item["loc"]) == depth]
    messages = list(dict.fromkeys(_lower(item["msg"]) for item in deepest))
    expected = "input should be "
    if len(messages) > 1 and all(message.startswith(expected) for message in messages):
        messages = [expected + " or ".join(message[len(expected) :] for message in messages)]
    text = "; ".join(messages)
    where = path(deepest[0]["loc"])
    if not where and deepest[0]["type"] in ("json_invalid", "model_type"):
        return f"The request's body is not valid: {text}.", None
    if not where:
        return f"{text}.", None
    given = deepest[0]["input"]
    shown = "" if isinstance(given, dict | list) else f" (got {_shorten(given)})"
    # Checks of our own say where by themselves.
    return f"{text}." if text.startswith(where) else f"{where}: {text}{shown}.", where


def path(loc: Sequence[int | str]) -> str:
    """`("messages", 2, "content")` as `messages[2].content`."""
    text = ""
    for step in loc:
        if isinstance(step, int):
            text += f"[{step}]"
        elif not _BRANCH.match(step):
            text += f".{step}" if text else step
    return text


def _reach(loc: Sequence[int | str]) -> tuple[int, int]:
    indices = [step for step in loc if isinstance(step, int)]
    return len(loc), indices[-1] if indices else -1


def _lower(message: str) -> str:
    message = message.removeprefix("Value error, ").rstrip(".")
    return message[:1].lower() + message[1:]


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
