"""Spans of a request: what they are called, where they hang, how they follow each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import ValidationError

from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.ingress import create_app
from tests.helpers.null_engine import LocalBackend, write_model

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> Iterator[tuple[TracerProvider, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider, exporter
    provider.shutdown()


async def ask(
    tmp_path: Path, provider: TracerProvider, body: dict[str, object], **headers: str
) -> httpx.Response:
    config = EngineConfig(model=str(write_model(tmp_path / "tiny")), served_model_name=["tiny"])
    async with LocalBackend(step_ms=5) as backend:
        app = create_app(Frontend.load(config), backend, config, traces=provider)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/completions", json=body, headers=headers)


def named(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_queue_prefill_and_decode(
    tmp_path: Path, spans: tuple[TracerProvider, InMemorySpanExporter], stream: bool
) -> None:
    provider, exporter = spans
    body = {"prompt": "my secret", "max_tokens": 7, "temperature": 0.5, "stream": stream}
    parent = f"00-{TRACE}-{PARENT}-01"
    answer = await ask(tmp_path, provider, body, traceparent=parent, **{"x-request-id": "it"})
    assert answer.status_code == 200
    found = named(exporter)
    assert set(found) == {"POST /v1/completions", "queue", "prefill", "decode"}
    request = found["POST /v1/completions"]
    assert request.parent is not None
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    attributes = dict(request.attributes or {})
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.usage.output_tokens"] == 7
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["http.response.status_code"] == 200
    assert attributes["tensorray.request.id"] == "it"
    parts = [found[name] for name in ("queue", "prefill", "decode")]
    for part in parts:
        assert part.parent is not None
        assert part.parent.span_id == request.context.span_id
    times = [time for part in parts for time in (part.start_time, part.end_time)]
    assert times == sorted(times)
    assert parts[0].end_time == parts[1].start_time
    assert parts[1].end_time == parts[2].start_time
    assert "secret" not in "".join(span.to_json() for span in found.values())


async def test_a_refusal_is_a_span_alone(
    tmp_path: Path, spans: tuple[TracerProvider, InMemorySpanExporter]
) -> None:
    provider, exporter = spans
    assert (await ask(tmp_path, provider, {"prompt": "a", "n": 0})).status_code == 400
    (span,) = exporter.get_finished_spans()
    assert (span.attributes or {})["http.response.status_code"] == 400
    assert span.parent is None


def test_an_endpoint_without_the_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install '\.\[otel\]'"):
        EngineConfig(model="m", otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")
