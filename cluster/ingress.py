"""The HTTP side: OpenAI's API over any engine, as a FastAPI application of its own.

It knows neither Serve nor Ray (app.py puts it behind Serve), so it runs in a test over an engine in
the same process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import msgspec
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from tensorray.cluster import messages_api, responses_api, triton_api, web_page
from tensorray.cluster import openai_api as api
from tensorray.cluster.backend import Backend, EngineStatus
from tensorray.cluster.bodies import all_of, read_body, together
from tensorray.cluster.chat_service import ChatService
from tensorray.cluster.closing import Closing, TurnsAway
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.deadlines import Deadlines, deadline_of
from tensorray.cluster.embeddings_api import EmbeddingService
from tensorray.cluster.error_shapes import for_path
from tensorray.cluster.errors import ApiError, bad_request, from_exception, unavailable
from tensorray.cluster.fleet import AdapterClient, Fleet
from tensorray.cluster.frontend import (
    EngineClient,
    Frontend,
    GenerationFailed,
    PreparedRequest,
)
from tensorray.cluster.guard import Guard
from tensorray.cluster.judge import Judge
from tensorray.cluster.key_digests import read_keys
from tensorray.cluster.lora_api import LoadAdapterRequest, Models, UnloadAdapterRequest
from tensorray.cluster.metrics import CONTENT_TYPE
from tensorray.cluster.openai_answers import Answer, ChatAnswer, CompletionAnswer
from tensorray.cluster.openapi import ALWAYS, OF_BODIES, OPEN, Description, ErrorAnswer
from tensorray.cluster.request_log import RequestIds
from tensorray.cluster.responses import EventStream, WholeResponse, error_response, json_response
from tensorray.cluster.sleep_api import Sleeper, Sleeping, SleepService

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger("ray.serve")

WARNINGS_HEADER = "X-Tensorray-Warnings"
VERSION = version("tensorray")

# Bodies above this are turned into tokens on another thread: running streams must not wait.
_LARGE_BODY = 1 << 15

# What is logged of a body at most, if bodies are.
_LOGGED_BYTES = 2000

R = TypeVar("R", bound=api.ApiRequest)


def create_app(
    frontend: Frontend,
    backend: Backend,
    config: EngineConfig,
    fleet: Fleet | None = None,
    traces: TracerProvider | None = None,
    closing: Closing | None = None,
) -> FastAPI:
    """The whole API as an ASGI application.

    `frontend` turns text into tokens and back, `backend` runs them; `fleet` has its LoRA adapters
    (None: there can be none), `traces` takes OpenTelemetry's spans, and `closing` says when no more
    requests are taken (None: never). Of `config` only the limits of the API are read.
    """
    app = FastAPI(
        title="Tensorray",
        version=VERSION,
        docs_url=None,  # that page loads scripts from elsewhere
        redoc_url=None,
    )
    app.router.route_class = _Route
    app.add_exception_handler(HTTPException, _no_route)
    models = Models(frontend, fleet, config, int(time.time()))
    client: EngineClient = backend if fleet is None else AdapterClient(backend, fleet)
    if traces is not None:
        client = traced(app, client, traces, frontend.model_name)
    app.add_middleware(TurnsAway, closing=closing or Closing())
    _protect(app, config)
    service = _Service(frontend, backend, client, models, config)
    description = Description(keys=bool(config.api_key or config.api_key_file))

    def route(
        method: str,
        path: str,
        endpoint: Callable[..., Coroutine[Any, Any, Response]],
        body: type[BaseModel] | None = None,
        answer: type[Any] | str | None = None,
        event: type[Any] | None = None,
        errors: Sequence[int] = (),
        usual: Sequence[int] = ALWAYS,
        error: type[Any] = ErrorAnswer,
    ) -> None:
        """`answer` is the answer's model (or media type, for text), `event` that of what is
        streamed, `errors` are the statuses this endpoint has beside the usual ones."""
        if body is not None:
            usual = (*usual, *OF_BODIES)
        extra = description.operation(
            body=body, answer=answer, event=event, errors=(*usual, *errors), error=error
        )
        app.add_api_route(
            path, endpoint, methods=[method], openapi_extra=extra, response_model=None
        )

    route(
        "POST",
        "/v1/completions",
        service.completions,
        api.CompletionRequest,
        api.Completion,
        api.Completion,
    )
    route(
        "POST",
        "/v1/chat/completions",
        service.chat,
        api.ChatRequest,
        api.ChatCompletion,
        api.ChatCompletionChunk,
    )
    route("GET", "/v1/models", service.models, answer=api.ModelList)
    route("GET", "/v1/models/{name:path}", service.model, answer=api.Model, errors=[404])
    if fleet is not None and config.allow_runtime_lora_updating:
        for path, endpoint, body in (
            ("/v1/load_lora_adapter", models.load, LoadAdapterRequest),
            ("/v1/unload_lora_adapter", models.unload, UnloadAdapterRequest),
        ):
            route("POST", path, endpoint, body, "text/plain")
    if config.enable_sleep_mode and isinstance(backend, Sleeper):
        sleeping = SleepService(backend)
        route("POST", "/sleep", sleeping.sleep, answer=Sleeping, errors=[409, 503])
        route("POST", "/wake_up", sleeping.wake_up, answer=Sleeping, errors=[503])
        route("GET", "/is_sleeping", sleeping.is_sleeping, answer=Sleeping, errors=[503])
    judge = None
    if config.score_template is not None:
        judge = Judge(frontend, config.score_template, config.score_tokens)
    embeddings = EmbeddingService(
        frontend, client, service.read, models.chosen, service.explain, judge
    )
    embeddings.add_routes(route)
    chats = ChatService(frontend, client, service.read, models.chosen, service.explain)
    responses_api.add_routes(route, chats)
    messages_api.add_routes(route, chats)
    route("POST", "/tokenize", service.tokenize, api.TokenizeRequest, api.Tokens)
    route("POST", "/detokenize", service.detokenize, api.DetokenizeRequest, api.Text)
    route("GET", "/health", service.health, answer=Health, errors=[503], usual=OPEN)
    route("GET", "/version", service.version, answer=Version, usual=OPEN)
    route("GET", "/metrics", service.metrics, answer="text/plain", errors=[503])
    route("GET", "/status", service.status, answer=Status, errors=[503])
    web_page.add_routes(app)
    triton_api.add_routes(
        app, frontend, backend, config.max_body_bytes, service.explain, description
    )
    description.add_to(app)
    return app


def traced(
    app: FastAPI, client: EngineClient, provider: TracerProvider, model: str
) -> EngineClient:
    """The client, with spans for what goes through it and through the application."""
    from tensorray.cluster.tracing import TracedClient, Traces

    app.add_middleware(Traces, provider=provider)
    return TracedClient(client, provider, model)


def _protect(app: FastAPI, config: EngineConfig) -> None:
    app.add_middleware(
        Deadlines,
        seconds=config.request_timeout_seconds,
        read_seconds=config.read_timeout_seconds,
    )
    named = read_keys(config.api_key_file) if config.api_key_file is not None else {}
    app.add_middleware(
        Guard,
        keys={*config.api_key, *named},
        per_minute=config.api_key_requests_per_minute,
        at_once=config.api_key_concurrency,
    )
    if config.allowed_origins:  # a browser asks first, without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key", "Anthropic-Version"],
        )
    app.add_middleware(RequestIds)  # outermost: refusals are logged as well


class Health(msgspec.Struct):
    """Answer of /health while the engine can serve."""

    status: Literal["ok"] = "ok"


class Version(msgspec.Struct):
    """Answer of /version."""

    version: str


class Status(msgspec.Struct):
    """Answer of /status: what is served, and each engine with its shards."""

    version: str
    models: list[str]
    max_model_len: int
    chat: bool
    defaults: dict[str, Any]
    engines: list[EngineStatus]


class _Service:
    """The endpoints."""

    def __init__(
        self,
        frontend: Frontend,
        backend: Backend,
        client: EngineClient,
        models: Models,
        config: EngineConfig,
    ) -> None:
        self._frontend = frontend
        self._backend = backend
        self._client = client
        self._models = models
        self._max_body_bytes = config.max_body_bytes
        self._log_prompts = config.log_prompts

    # --- generation ---

    async def completions(self, http: Request) -> Response:
        """OpenAI's completions: one choice, or n, for each prompt."""
        request, headers, large = await self.read(http, api.CompletionRequest)
        name, lora = self._models.chosen(request.model)
        answer = CompletionAnswer(request, name, self._frontend.tokenizer)

        def prepare() -> list[PreparedRequest]:
            params = self._frontend.params(**request.sampling())
            return [
                self._frontend.request(
                    prompt,
                    params,
                    request_id=f"{answer.id}-{i}",
                    priority=request.priority or 0,
                    user=request.user or "",
                    cache_salt=request.cache_salt or "",
                    lora=lora,
                    echo=bool(request.echo),
                    only_echo=request.only_echo,
                    add_special_tokens=request.add_special_tokens is not False,
                )
                for i, prompt in enumerate(request.prompts())
            ]

        prepared = await asyncio.to_thread(prepare) if large else prepare()
        return self._respond(request, prepared, answer, headers)

    async def chat(self, http: Request) -> Response:
        """OpenAI's chat completions."""
        request, headers, large = await self.read(http, api.ChatRequest)
        name, lora = self._models.chosen(request.model)
        answer = ChatAnswer(request, name)

        def prepare() -> PreparedRequest:
            params = self._frontend.params(**request.sampling())
            return self._frontend.converse(
                request.conversation(request.messages),
                params,
                request_id=answer.id,
                priority=request.priority or 0,
                user=request.user or request.safety_identifier or "",
                cache_salt=request.cache_salt or "",
                lora=lora,
                prediction=request.prediction.text if request.prediction else "",
            )

        prepared = await asyncio.to_thread(prepare) if large else prepare()
        return self._respond(request, [prepared], answer, headers)

    def _respond(
        self,
        request: api.GenerateRequest,
        prepared: Sequence[PreparedRequest],
        answer: Answer,
        headers: dict[str, str],
    ) -> Response:
        answer.prompts = [each.request.prompt for each in prepared]
        if request.stream:
            streams = [self._frontend.stream(self._client, each) for each in prepared]
            return EventStream(answer.events(together(streams)), self.explain, headers)

        async def whole() -> bytes:
            outputs = [self._frontend.collect(self._client, each) for each in prepared]
            return api.to_json(answer.whole(await all_of(outputs)))

        return WholeResponse(whole(), self.explain, headers)

    async def explain(self, error: Exception) -> ApiError:
        """What to tell the client. An engine that failed is unavailable to the requests it took
        with it as well."""
        if isinstance(error, GenerationFailed):
            reason = await self._backend.failure()
            return unavailable(reason) if reason else ApiError(500, str(error))
        return _told(error)

    # --- the rest ---

    async def models(self) -> Response:
        """The served model, under each of its names, and its adapters."""
        return json_response(api.to_json(api.ModelList(await self._models.listed())))

    async def model(self, name: str) -> Response:
        """One model."""
        return json_response(api.to_json(await self._models.get(name)))

    async def tokenize(self, http: Request) -> Response:
        """Token ids of a prompt, or of messages rendered as chat would."""
        request, headers, large = await self.read(http, api.TokenizeRequest)
        await self._models.get(request.model)
        tokenizer = self._frontend.tokenizer

        def encode() -> list[int]:
            if request.messages is not None:
                return self._frontend.render(request.conversation(request.messages))
            return tokenizer.encode(
                request.prompt or "", add_special_tokens=request.add_special_tokens is not False
            )

        tokens = await asyncio.to_thread(encode) if large else encode()
        answer = api.Tokens(len(tokens), self._frontend.max_model_len, tokens)
        if request.return_token_strs:
            answer.token_strs = [tokenizer.id_to_token(token) or "" for token in tokens]
        return json_response(api.to_json(answer), headers=headers)

    async def detokenize(self, http: Request) -> Response:
        """The text of token ids, special tokens included."""
        request, headers, _ = await self.read(http, api.DetokenizeRequest)
        await self._models.get(request.model)
        vocab_size = self._frontend.vocab_size
        for i, token in enumerate(request.tokens):
            if not 0 <= token < vocab_size:
                raise bad_request(
                    f"tokens[{i}] is {token}; this model's tokens are 0 to {vocab_size - 1}.",
                    "tokens",
                )
        text = self._frontend.tokenizer.decode(request.tokens, skip_special_tokens=False)
        return json_response(api.to_json(api.Text(text)), headers=headers)

    async def health(self) -> Response:
        """200 while the engine can serve, else 503 and why."""
        reason = await self._backend.failure()
        if reason is not None:
            return error_response(unavailable(reason))
        return json_response(api.to_json(Health()))

    async def version(self) -> Response:
        """This server's version."""
        return json_response(api.to_json(Version(VERSION)))

    async def metrics(self) -> Response:
        """Prometheus metrics of the engine, the same from every ingress replica."""
        return Response(await self._backend.metrics(), media_type=CONTENT_TYPE)

    async def status(self) -> Response:
        """What is served, and each engine with its shards: for the web page."""
        told = Status(
            version=VERSION,
            models=self._frontend.model_names,
            max_model_len=self._frontend.max_model_len,
            chat=self._frontend.can_chat,
            defaults=self._frontend.default_params,
            engines=await self._backend.status(),
        )
        return json_response(api.to_json(told))

    # --- common steps ---

    async def read(self, http: Request, kind: type[R]) -> tuple[R, dict[str, str], bool]:
        """The request, headers for its answer, and whether to prepare it on another thread."""
        body = await read_body(http, self._max_body_bytes)
        request = kind.model_validate_json(body)
        if self._log_prompts:
            logger.info("asked: %s", body[:_LOGGED_BYTES].decode("utf-8", "replace"))
        if isinstance(request, api.GenerateRequest):
            deadline_of(http.scope).at_most(request.timeout)
        headers = {}
        if ignored := request.ignored_fields():
            headers[WARNINGS_HEADER] = warning = api.warnings_header(ignored)
            logger.warning("%s: %s", http.url.path, warning)
        return request, headers, len(body) > _LARGE_BODY or request.takes_long


class _Route(APIRoute):
    """Answers whatever an endpoint raises with OpenAI's error object."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except Exception as error:
                return error_response(for_path(get_route_path(request.scope), _told(error)))

        return guarded


def _told(error: Exception) -> ApiError:
    """The error for the client; a bug of ours goes to the log with its traceback."""
    told = from_exception(error)
    if told.status == 500:
        logger.error("a request failed", exc_info=error)
    return told


async def _no_route(request: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    messages = {
        404: f"There is nothing at {request.method} {request.url.path}; see /openapi.json.",
        405: f"{request.url.path} does not take {request.method}; see /openapi.json.",
    }
    message = messages.get(error.status_code, str(error.detail))
    told = ApiError(error.status_code, message, headers=error.headers)
    return error_response(for_path(request.url.path, told))
