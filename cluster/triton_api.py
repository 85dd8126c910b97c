"""KServe's and Triton's protocol with the tensor names of TensorRT-LLM's Triton models, so that
`tritonclient` over HTTP and plain generate clients need a new address only.

https://github.com/triton-inference-server/server/tree/main/docs/protocol
https://github.com/triton-inference-server/tensorrtllm_backend

An answer that is not streamed begins with its prompt, as TensorRT-LLM's does. What asks for
something that is not supported is refused by name (`triton_fields.py`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from tensorray.cluster import triton_metadata as metadata
from tensorray.cluster.backend import Backend
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.bodies import all_of, read_body
from tensorray.cluster.errors import ApiError, bad_request, unavailable
from tensorray.cluster.frontend import Frontend, PreparedRequest
from tensorray.cluster.openapi import ALWAYS, OF_BODIES, OPEN, Description, Schema
from tensorray.cluster.outputs import CompletionOutput, RequestOutput, RequestOutputDelta
from tensorray.cluster.responses import EventStream, WholeResponse, error_response, json_response
from tensorray.cluster.triton_answers import (
    ASKED_BY,
    OUTPUTS,
    GenerateAnswer,
    begin_with_prompt,
    output_tensor,
    wanted_outputs,
)
from tensorray.cluster.triton_errors import TritonError, TritonFault
from tensorray.cluster.triton_fields import (
    Fields,
    GenerateBody,
    batch_rows,
    checked_fields,
    request_priority,
)
from tensorray.cluster.triton_sampling import THEIR_NAMES, sampling
from tensorray.cluster.triton_tensors import (
    HEADER_LENGTH,
    InferAnswer,
    InferBody,
    InferRequest,
    read_request,
    write_answer,
)

# What TensorRT-LLM's model repository calls the model that takes text.
MODEL_NAMES = ("ensemble", "tensorrt_llm_bls")
VERSION = "1"

Explain = Callable[[Exception], Awaitable[ApiError]]


def add_routes(
    app: FastAPI,
    frontend: Frontend,
    backend: Backend,
    max_body_bytes: int,
    explain: Explain,
    description: Description,
) -> None:
    """Put the protocol under /v2 of an application. `explain` says what to tell of an error."""
    service = _Service(frontend, backend, max_body_bytes, explain)

    def route(
        method: str,
        path: str,
        endpoint: Callable[..., Coroutine[Any, Any, Response]],
        **described: Any,
    ) -> None:
        async def answered(http: Request) -> Response:
            try:
                return await endpoint(http, **http.path_params)
            except Exception as error:
                return error_response(TritonError.of(await explain(error)))

        usual = OPEN if path.startswith("/v2/health/") else ALWAYS
        errors = {*usual, *described.pop("errors", ())}
        if "body" in described:
            errors |= {*OF_BODIES, 415}
        parameters = [_path_parameter(each) for each in ("name", "version") if f"{{{each}" in path]
        extra = description.operation(
            error=TritonFault, errors=errors, parameters=parameters, **described
        )
        app.add_api_route(
            path,
            answered,
            methods=[method],
            response_model=None,
            name=endpoint.__name__,
            description=endpoint.__doc__,
            openapi_extra=extra,
        )

    route("GET", "/v2", service.server, answer=metadata.ServerMetadata)
    route("GET", "/v2/health/live", service.live)
    route("GET", "/v2/health/ready", service.ready, errors=[503])
    models = ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}")
    for model in models:
        route("GET", f"{model}/ready", service.model_ready, errors=[404, 503])
        route(
            "GET",
            f"{model}/config",
            service.model_config,
            answer=metadata.ModelConfig,
            errors=[404],
        )
        tensors = {"binary": "tensors' bytes behind the JSON, with " + HEADER_LENGTH}
        route(
            "POST", f"{model}/infer", service.infer, body=InferBody, answer=InferAnswer, **tensors
        )
        route(
            "POST", f"{model}/generate", service.generate, body=GenerateBody, answer=GenerateAnswer
        )
        route(
            "POST",
            f"{model}/generate_stream",
            service.generate_stream,
            body=GenerateBody,
            event=GenerateAnswer,
        )
    for model in models:
        route("GET", model, service.model, answer=metadata.ModelMetadata, errors=[404])


def _path_parameter(name: str) -> Schema:
    example = MODEL_NAMES[0] if name == "name" else VERSION
    schema = {"type": "string", "examples": [example]}
    return {"name": name, "in": "path", "required": True, "schema": schema}


class _Service:
    """The endpoints."""

    def __init__(
        self, frontend: Frontend, backend: Backend, max_body_bytes: int, explain: Explain
    ) -> None:
        self._frontend = frontend
        self._backend = backend
        self._max_body_bytes = max_body_bytes
        self._tell = explain

    # --- how it is, what there is ---

    async def server(self, http: Request) -> Response:
        """Triton's server metadata."""
        return _json(metadata.ServerMetadata(version=http.app.version))

    async def live(self, http: Request) -> Response:
        """200: this server answers."""
        return Response()

    async def ready(self, http: Request) -> Response:
        """200 while the engine can serve, else 503."""
        if reason := await self._backend.failure():
            raise unavailable(reason)
        return Response()

    async def model_ready(self, http: Request, name: str, version: str = VERSION) -> Response:
        """200 while the model can be used, else 503."""
        self._check_model(name, version)
        return await self.ready(http)

    async def model(self, http: Request, name: str, version: str = VERSION) -> Response:
        """The model's tensors."""
        self._check_model(name, version)
        return _json(metadata.model(name, VERSION))

    async def model_config(self, http: Request, name: str, version: str = VERSION) -> Response:
        """The model in the terms of Triton's model configuration."""
        self._check_model(name, version)
        return _json(metadata.model_config(name))

    # --- generation ---

    async def infer(self, http: Request, name: str, version: str = VERSION) -> Response:
        """Tensors in, tensors out; a row of the batch is a request."""
        self._check_model(name, version)
        body = await self._body(http)

        def prepare() -> tuple[InferRequest, list[Fields], list[str], list[PreparedRequest]]:
            request = read_request(body, http.headers.get(HEADER_LENGTH))
            rows = batch_rows(request.inputs)
            priority = request_priority(request.parameters)
            wanted = wanted_outputs(request, rows)
            log_probs = not {"output_log_probs", "cum_log_probs"}.isdisjoint(wanted)
            prepared = [self._prepare(row, log_probs=log_probs, priority=priority) for row in rows]
            return request, rows, wanted, prepared

        request, rows, wanted, prepared = await asyncio.to_thread(prepare)

        async def whole() -> Response:
            answers = await all_of([self._frontend.collect(self._backend, one) for one in prepared])
            for row, answer in zip(rows, answers, strict=True):
                begin_with_prompt(row, answer)
            tensors = [output_tensor(each, answers) for each in wanted]
            content, headers = write_answer(request, name, VERSION, tensors)
            return Response(content, headers=headers)

        return WholeResponse(whole(), self._explain, {})

    async def generate(self, http: Request, name: str, version: str = VERSION) -> Response:
        """Triton's generate extension: one JSON answer."""
        self._check_model(name, version)
        ask = await self._ask(http)
        if ask.fields.get("stream"):
            raise bad_request("stream: use generate_stream to stream.", "stream")
        return WholeResponse(self._whole(name, ask), self._explain, {})

    async def generate_stream(self, http: Request, name: str, version: str = VERSION) -> Response:
        """The same as server-sent events: with `stream` as tokens come, else all in one."""
        self._check_model(name, version)
        ask = await self._ask(http)
        return EventStream(self._events(name, ask), self._explain, {})

    async def _whole(self, name: str, ask: _Ask) -> bytes:
        answer = await self._frontend.collect(self._backend, ask.prepared)
        begin_with_prompt(ask.fields, answer)
        return msgspec.json.encode(ask.told(name, answer.outputs, answer.prompt_token_ids))

    async def _events(self, name: str, ask: _Ask) -> AsyncGenerator[bytes, None]:
        if not ask.fields.get("stream"):
            yield _event(await self._whole(name, ask))
            return
        deltas = cast(
            "AsyncGenerator[RequestOutputDelta, None]",
            self._frontend.stream(self._backend, ask.prepared),
        )
        async with aclosing(deltas):
            async for delta in deltas:
                for output in delta.outputs:
                    if output.text or output.finish_reason:
                        told = ask.told(name, [output], ask.prepared.request.prompt)
                        yield _event(msgspec.json.encode(told))

    async def _ask(self, http: Request) -> _Ask:
        body = await self._body(http)

        def prepare() -> _Ask:
            try:
                sent = msgspec.json.decode(body, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise BadRequest(f"the request is no JSON object: {error}") from None
            given = sent.pop("parameters", None) or {}
            if not isinstance(given, dict):
                raise BadRequest("parameters must be an object of names and values")
            request_id = str(sent.pop("id", ""))[:200]
            fields = checked_fields({**given, **sent})
            prepared = self._prepare(
                fields, log_probs=bool(fields.get("return_log_probs")), priority=0
            )
            return _Ask(request_id, fields, prepared)

        return await asyncio.to_thread(prepare)

    def _prepare(self, fields: Fields, *, log_probs: bool, priority: int) -> PreparedRequest:
        try:
            return self._frontend.request(
                fields["text_input"],
                self._frontend.params(
                    **sampling(fields, self._frontend.tokenizer, log_probs=log_probs)
                ),
                request_id=f"triton-{uuid.uuid4().hex}",
                priority=priority,
            )
        except BadRequest as error:
            theirs = THEIR_NAMES.get(error.param or "")
            if theirs is None:
                raise
            raise BadRequest(f"{theirs}: {error}", param=theirs) from None

    # --- common steps ---

    async def _body(self, http: Request) -> bytes:
        encoding = http.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ApiError(
                415, f"Content-Encoding {encoding[:40]!r} is not supported; send it plain."
            )
        return await read_body(http, self._max_body_bytes)

    def _check_model(self, name: str, version: str) -> None:
        names = [*self._frontend.model_names, *MODEL_NAMES]
        if name not in names:
            raise ApiError(
                404, f"There is no model {name[:200]!r} here; there are {', '.join(names)}."
            )
        if version != VERSION:
            raise ApiError(404, f"Model {name} has version {VERSION} only, not {version[:40]!r}.")

    async def _explain(self, error: Exception) -> ApiError:
        return TritonError.of(await self._tell(error))


@dataclass(frozen=True)
class _Ask:
    """A request of the generate extension."""

    id: str
    fields: Fields
    prepared: PreparedRequest

    def told(self, name: str, outputs: Sequence[CompletionOutput], prompt: list[int]) -> Fields:
        """The answer's JSON: a list where there is more than one sequence."""
        answer = RequestOutput("", None, prompt, list(outputs))
        told: Fields = {"id": self.id} if self.id else {}
        told |= {"model_name": name, "model_version": VERSION}
        told |= {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
        if self.fields.get("stream"):
            told["sequence_index"] = outputs[0].index
        for output in OUTPUTS:
            asked = ASKED_BY.get(output)
            if asked is None or self.fields.get(asked):
                values = output_tensor(output, [answer]).values
                told[output] = values[0] if len(values) == 1 else values
        return told


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _json(value: msgspec.Struct) -> Response:
    return json_response(msgspec.json.encode(value))
