"""The API's description at /openapi.json: what each endpoint takes, answers and refuses.

Endpoints read their bodies by themselves, so that errors can be OpenAI's, and write answers by
themselves, once a token; FastAPI knows of neither, and is told here. Models are pydantic's or
msgspec's.

https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_PLACE = "#/components/schemas/"
Schema = dict[str, Any]

ERRORS = {
    400: "The request is not valid; the message says what to change",
    401: "No API key of this server's came with the request",
    403: "This API key may not do that",
    404: "There is no such model here",
    409: "What the server is doing just now does not allow it",
    413: "The body is over this server's limit",
    415: "The body's encoding or type is not supported",
    422: "The request can't be answered by this model",
    429: "The queue is full, or the API key's limit is reached; Retry-After says when to try again",
    431: "The address and headers are over this server's limit",
    500: "A fault of the server's, whose log has more",
    501: "This server was started without it",
    503: "The engine can't serve just now; the message says why",
    504: "The request was not done within its time",
}
OPEN = (431, 500)  # of every endpoint
ALWAYS = (401, *OPEN)  # of every one that asks for a key
OF_BODIES = (400, 404, 413, 429, 503, 504)  # of those that read a body, beside


class OpenAIError(msgspec.Struct):
    """What went wrong, and what to change."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct):
    """OpenAI's error object."""

    error: OpenAIError


class Description:
    """Collects an application's endpoints; `add_to` puts what they take and answer into its
    schema."""

    def __init__(self, *, keys: bool = False) -> None:
        self._keys = keys
        self._kinds: list[type[Any]] = [ErrorAnswer]

    def operation(
        self,
        *,
        body: type[Any] | None = None,
        answer: type[Any] | str | None = None,
        event: type[Any] | None = None,
        binary: str = "",
        errors: Collection[int] = ALWAYS,
        error: type[Any] = ErrorAnswer,
        parameters: Iterable[Schema] = (),
    ) -> Schema:
        """FastAPI's `openapi_extra` of one endpoint.

        `body` is a model. `answer` is one too, a media type of text, or None for an empty answer;
        `event`, for what may be streamed, is the model of each server-sent event. `binary` says
        what both hold in bytes, where they may. `error` is the model of its errors.
        """
        content: Schema = {}
        if isinstance(answer, str):
            content[answer] = {"schema": {"type": "string"}}
        elif answer is not None:
            content["application/json"] = {"schema": self._use(answer)}
        if event is not None:
            data = {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": self._use(event),
            }
            content["text/event-stream"] = {
                "schema": {
                    "description": "one event",
                    "type": "object",
                    "properties": {"data": data},
                    "required": ["data"],
                }
            }
        if binary:
            content |= _bytes(binary)
        success: Schema = {"description": "The answer"}
        if content:
            success["content"] = content
        responses: Schema = {"200": success}
        refusal = {"application/json": {"schema": self._use(error)}}
        for status in sorted(set(errors)):
            responses[str(status)] = {"description": ERRORS[status], "content": refusal}
        operation: Schema = {"responses": responses}
        if body is not None:
            content = {"application/json": {"schema": self._use(body)}}
            if binary:
                content |= _bytes(binary)
            operation["requestBody"] = {"required": True, "content": content}
        if parameters := list(parameters):
            operation["parameters"] = parameters
        if self._keys and 401 in errors:
            operation["security"] = [{"key": []}]
        return operation

    def add_to(self, app: FastAPI) -> None:
        """Make the application's schema hold all of it; call once every endpoint is there."""
        plain = app.openapi

        def openapi() -> Schema:
            if app.openapi_schema is None:
                schema = plain()
                mine = schema.setdefault("components", {}).setdefault("schemas", {})
                mine.update(self._components())
                for unused in ("HTTPValidationError", "ValidationError"):
                    mine.pop(unused, None)  # FastAPI's own, which no endpoint answers with
                if self._keys:
                    schema["components"]["securitySchemes"] = {
                        "key": {"type": "http", "scheme": "bearer"}
                    }
                for path in schema["paths"].values():
                    for operation in path.values():
                        _tidy(operation)
            return plain()

        app.openapi = openapi  # type: ignore[method-assign]

    def _use(self, kind: type[Any]) -> Schema:
        if kind not in self._kinds:
            self._kinds.append(kind)
        return {"$ref": f"{_PLACE}{kind.__name__}"}

    def _components(self) -> Schema:
        mode: Literal["validation"] = "validation"
        of_pydantic = [kind for kind in self._kinds if issubclass(kind, BaseModel)]
        others = [kind for kind in self._kinds if not issubclass(kind, BaseModel)]
        _, definitions = models_json_schema(
            [(kind, mode) for kind in of_pydantic], ref_template=f"{_PLACE}{{model}}"
        )
        found: Schema = definitions.get("$defs", {})
        _, structs = msgspec.json.schema_components(others, ref_template=f"{_PLACE}{{name}}")
        for name, schema in structs.items():
            if found.setdefault(name, schema) is not schema:
                raise TypeError(f"two models of the API are called {name}; rename one")
        if missing := {kind.__name__ for kind in self._kinds} - found.keys():
            raise TypeError(f"two models of the API are called {min(missing)}; rename one")
        return found


def _bytes(what: str) -> Schema:
    schema = {"type": "string", "format": "binary", "description": what}
    return {"application/octet-stream": {"schema": schema}}


def _tidy(operation: Schema) -> None:
    """Take out what FastAPI says of answers by itself: any JSON at all, and errors of its own."""
    responses = operation["responses"]
    refusal = responses.get("422", {}).get("content", {}).get("application/json", {})
    if refusal.get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]
    content = responses.get("200", {}).get("content", {})
    if content.get("application/json") == {"schema": {}}:
        del content["application/json"]
