"""OpenTelemetry traces: a span for each request, and in it the queue, the prefill and the decode.

The ingress makes them all: the router tells with the first token how long the request had waited.
A `traceparent` header makes the request part of its caller's trace. Attributes are those of
OpenTelemetry's conventions for generative AI; prompts and answers are not among them.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import cast

from opentelemetry import propagate, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tensorray.cluster.frontend import EngineClient
from tensorray.cluster.request import Delta, GenerationRequest
from tensorray.cluster.request_id import request_id

Attributes = Mapping[str, str | int | float | list[str]]

_BILLION = 1_000_000_000


def provider(endpoint: str) -> TracerProvider:
    """Sends spans to a collector, over HTTP, in the background."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    made = TracerProvider(resource=Resource.create({"service.name": "tensorray"}))
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return made


class Traces:
    """ASGI middleware: a span for each request that is posted."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app = app
        self._tracer = provider.get_tracer("tensorray")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        attributes = {
            "http.request.method": "POST",
            "url.path": scope["path"],
            "tensorray.request.id": request_id.get(),
        }

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        with self._tracer.start_as_current_span(
            f"POST {scope['path'][:100]}",
            context=propagate.extract(headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
        ) as span:
            await self._app(scope, receive, noted)


class TracedClient:
    """An EngineClient that tells of each request where its time went."""

    def __init__(self, client: EngineClient, provider: TracerProvider, model: str) -> None:
        self._client = client
        self._tracer = provider.get_tracer("tensorray")
        self._model = model

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """See EngineClient."""
        clock = _Clock()
        queued = first = last = 0
        generated, reasons = 0, {}
        arriving = self._client.generate(request)
        try:
            async with aclosing(cast("AsyncGenerator[list[Delta], None]", arriving)) as items:
                async for deltas in items:
                    last = clock.now()
                    for delta in deltas:
                        generated += len(delta.tokens)
                        if not first and delta.tokens:
                            first, queued = last, round(delta.queued * _BILLION)
                        if delta.finish_reason is not None:
                            reasons[delta.index] = delta.finish_reason
                    yield deltas
        finally:
            attributes: dict[str, str | int | float | list[str]] = {
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "tensorray",
                "gen_ai.request.model": self._model,
                "gen_ai.request.max_tokens": request.max_tokens,
                "gen_ai.request.temperature": request.sampling.temperature,
                "gen_ai.request.top_p": request.sampling.top_p,
                "gen_ai.usage.input_tokens": len(request.prompt),
                "gen_ai.usage.output_tokens": generated,
                "gen_ai.response.finish_reasons": [reasons[index] for index in sorted(reasons)],
                "gen_ai.response.id": request.request_id,
            }
            trace.get_current_span().set_attributes(attributes)
            end = clock.now()
            begun = min(clock.began + queued, first or end)
            self._span("queue", clock.began, begun if first else end, {})
            if first:
                self._span(
                    "prefill", begun, first, {"gen_ai.usage.input_tokens": len(request.prompt)}
                )
                self._span("decode", first, last, {"gen_ai.usage.output_tokens": generated})

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """See EngineClient."""
        await self._client.cancel(request_id, index)

    def _span(self, name: str, start: int, end: int, attributes: Attributes) -> None:
        span = self._tracer.start_span(name, start_time=start, attributes=attributes)
        span.end(end)


class _Clock:
    """Nanoseconds since 1970, of which no two go back when the machine's clock is set."""

    def __init__(self) -> None:
        self.began = time.time_ns()
        self._since = time.monotonic_ns()

    def now(self) -> int:
        return self.began + time.monotonic_ns() - self._since
