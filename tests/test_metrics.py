"""The figures that Prometheus gets are those of what ran."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tensorray.actors.protocol import Sampling
from tensorray.cluster.metrics import Histogram
from tensorray.cluster.request import GenerationRequest
from tests.helpers.null_engine import LocalBackend, serving, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def server(model: Path) -> AsyncIterator[tuple[httpx.AsyncClient, LocalBackend]]:
    async with serving(model, step_ms=2) as pair:
        yield pair


async def scrape(http: httpx.AsyncClient) -> dict[str, float]:
    """Samples by name, `{finished_reason}` where there is one; buckets left out."""
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            if not sample.name.endswith("_bucket"):
                name = sample.name.removeprefix("tensorray:")
                samples[name + sample.labels.get("finished_reason", "")] = sample.value
    return samples


def request(name: str) -> GenerationRequest:
    return GenerationRequest(name, [1, 2, 3], Sampling(), 100)


async def test_counts_and_latencies(server: tuple[httpx.AsyncClient, LocalBackend]) -> None:
    http, _ = server
    for n in (1, 3):
        fields = {"prompt": "x" * 40, "max_tokens": 5, "n": n}
        assert (await http.post("/v1/completions", json=fields)).status_code == 200
    seen = await scrape(http)
    assert seen["request_success_totallength"] == 4
    assert seen["prompt_tokens_total"] == 4 * 41
    assert seen["generation_tokens_total"] == 20
    assert seen["rejected_plans"] == 0
    assert seen["time_to_first_token_seconds_count"] == 4
    assert seen["time_to_first_token_seconds_sum"] > 4 * 0.002
    assert seen["request_queue_time_seconds_count"] == 4
    assert seen["request_prefill_time_seconds_sum"] > 4 * 0.002
    parts = ("request_queue_time", "request_prefill_time")
    assert sum(seen[f"{part}_seconds_sum"] for part in parts) == pytest.approx(
        seen["time_to_first_token_seconds_sum"]
    )
    assert seen["inter_token_latency_seconds_count"] == 16
    assert seen["inter_token_latency_seconds_sum"] > 16 * 0.002
    assert seen["e2e_request_latency_seconds_count"] == 4
    assert seen["e2e_request_latency_seconds_sum"] > 4 * 5 * 0.002
    assert seen["request_prompt_tokens_sum"] == 4 * 41
    assert seen["request_generation_tokens_sum"] == 20
    assert seen["batch_size_sum"] == 20  # sequence-steps: each chunk of a prefill, each decode
    assert seen["step_duration_seconds_count"] == seen["batch_size_count"]
    assert seen["prefix_cache_queries_total"] > 0
    assert seen["prefix_cache_hits_total"] == 3 * 32
    assert seen["engine_up"] == 1
    assert (seen["num_requests_running"], seen["num_requests_waiting"]) == (0, 0)
    assert seen["kv_cache_usage_perc"] == 0


async def test_a_stop_string_counts_as_stopped_and_a_client_that_left_as_aborted(
    server: tuple[httpx.AsyncClient, LocalBackend],
) -> None:
    http, backend = server
    fields = {"prompt": "Hi", "max_tokens": 50, "seed": 1}
    text = (await http.post("/v1/completions", json=fields)).json()["choices"][0]["text"]
    stop = next(text[i : i + 2] for i in range(3, 40) if text[i : i + 2].isascii())
    answer = await http.post("/v1/completions", json={**fields, "stop": stop})
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    stream = backend.generate(request("left"))
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    seen = await scrape(http)
    reasons = {r: seen[f"request_success_total{r}"] for r in ("length", "stop", "abort", "error")}
    assert reasons == {"length": 1, "stop": 1, "abort": 1, "error": 0}


async def test_what_runs_and_waits_is_told(model: Path) -> None:
    async with serving(model, step_ms=10, max_num_seqs=2) as (http, backend):
        streams = [backend.generate(request(str(i))) for i in range(5)]
        await anext(streams[0])
        seen = await scrape(http)
        assert (seen["num_requests_running"], seen["num_requests_waiting"]) == (2, 3)
        assert 0 < seen["kv_cache_usage_perc"] < 1
        backend.engine.fail("over")
        assert (await scrape(http))["engine_up"] == 0


def test_histogram_buckets_hold_their_upper_bound() -> None:
    histogram = Histogram([1, 2])
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value)
    samples = histogram.family("h", "help", {}).samples
    buckets = {s.labels["le"]: s.value for s in samples if s.name == "h_bucket"}
    assert buckets == {"1.0": 2, "2.0": 4, "+Inf": 5}
    assert next(s.value for s in samples if s.name == "h_sum") == 8
