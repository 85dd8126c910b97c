"""The whole service: OpenAI's client over HTTP, Ray Serve, router and shard, with a null device."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig
from tests.helpers.null_engine import write_model

pytestmark = pytest.mark.ray

STEP_MS = 20.0
PATIENCE = 120.0


def config(model: Path, step_ms: float = STEP_MS) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        device="null",
        null_step_ms=step_ms,
        num_ingress_replicas=2,
        max_num_seqs=8,
        max_waiting=8,
        stall_seconds=2,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def port(model: Path, serve_port: int) -> Iterator[int]:
    """Where the service listens; two ingress replicas before one router."""
    app.run(config(model), port=serve_port, blocking=False)
    yield serve_port
    app.stop(own_cluster=False)


@pytest.fixture(scope="module")
def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)


def completion(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"model": "tiny", "prompt": "Hello", "max_tokens": 6, "seed": 1, **fields}
    return client.completions.create(**fields)


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def scrape(port: int) -> dict[str, float]:
    status, text = get(port, "/metrics")
    assert status == 200
    return {
        sample.name.removeprefix("tensorray:"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def until_running(port: int, count: int, waiting: int = 0) -> dict[str, float]:
    """Figures of when so many requests run and wait."""
    deadline = time.monotonic() + PATIENCE
    while True:
        seen = scrape(port)
        if (seen["num_requests_running"], seen["num_requests_waiting"]) == (count, waiting):
            return seen
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


def until_idle(port: int) -> dict[str, float]:
    return until_running(port, 0)


def test_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = completion(client, max_tokens=20)
    assert (whole.model, whole.choices[0].finish_reason) == ("tiny", "length")
    assert whole.usage.completion_tokens == 20
    options = {"include_usage": True}
    *chunks, last = completion(client, max_tokens=20, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert last.usage.completion_tokens == 20


def test_tokens_come_as_they_are_made(client: openai.OpenAI, port: int) -> None:
    stream = completion(client, max_tokens=200, stream=True)
    next(stream)
    assert scrape(port)["num_requests_running"] == 1
    stream.close()
    until_idle(port)


def test_chat_with_choices_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=5,
        n=2,
        logprobs=True,
        top_logprobs=1,
        seed=3,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert len(choice.logprobs.content) == 5
    assert answer.usage.completion_tokens == 10


def test_a_stop_string_ends_the_answer(client: openai.OpenAI, port: int) -> None:
    text = completion(client, max_tokens=60).choices[0].text
    at = next(i for i in range(5, 60) if text[i : i + 2].isascii())
    (choice,) = completion(client, max_tokens=200, stop=text[at : at + 2]).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[at : at + 2])], "stop")
    until_idle(port)


def test_errors_have_their_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        completion(client, model="gpt")
    with pytest.raises(openai.BadRequestError, match="too long"):
        completion(client, prompt="x" * 300)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        completion(client, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="modalities"):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            modalities=["audio"],
        )


def test_a_full_queue_is_429(client: openai.OpenAI, port: int) -> None:
    body = json.dumps({"prompt": "Hello", "max_tokens": 200, "n": 8}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        socket.create_connection(("127.0.0.1", port)) as running,
        socket.create_connection(("127.0.0.1", port)) as waiting,
    ):
        running.sendall(head + body)
        until_running(port, 8)
        waiting.sendall(head + body)
        until_running(port, 8, 8)
        with pytest.raises(openai.RateLimitError) as refused:
            completion(client)
        assert int(refused.value.response.headers["retry-after"]) >= 1
    until_idle(port)


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_cancels(port: int, stream: bool) -> None:
    before = until_idle(port)
    body = json.dumps({"prompt": "Hello", "max_tokens": 200, "stream": stream, "n": 2})
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body.encode())
        )
        until_running(port, 2)
    seen = until_idle(port)
    assert seen["kv_cache_usage_perc"] == 0
    assert seen["generation_tokens_total"] - before["generation_tokens_total"] < 2 * 200


def test_models_health_version(port: int) -> None:
    assert json.loads(get(port, "/v1/models")[1])["data"][0]["id"] == "tiny"
    assert get(port, "/health") == (200, '{"status":"ok"}')
    assert json.loads(get(port, "/version")[1])["version"]
    status, body = get(port, "/v1/nothing")
    assert (status, json.loads(body)["error"]["type"]) == (404, "invalid_request_error")


def test_the_page_and_what_it_shows(port: int) -> None:
    status, page = get(port, "/")
    assert (status, page[:15]) == (200, "<!doctype html>")
    assert get(port, "/web/main.js")[0] == 200
    status, text = get(port, "/status")
    assert status == 200
    (engine,) = json.loads(text)["engines"]
    assert (engine["failure"], engine["device"]) == (None, "null")
    (shard,) = engine["shards"]
    assert shard["answers"]
    assert shard["pid"] > 1
    assert len(shard["node"]) > 8


def test_every_ingress_tells_the_same_figures(client: openai.OpenAI, port: int) -> None:
    until_idle(port)
    before = scrape(port)["generation_tokens_total"]
    for _ in range(6):
        completion(client)
    assert {scrape(port)["generation_tokens_total"] for _ in range(6)} == {before + 36}


def test_handle(port: int) -> None:
    handle = serve.get_app_handle(app.APP_NAME)
    whole = handle.generate.remote("Hello", max_tokens=6, seed=1).result()
    assert whole["outputs"][0]["finish_reason"] == "length"
    assert len(whole["outputs"][0]["token_ids"]) == 6
    deltas = list(
        handle.options(stream=True).stream.remote(
            messages=[{"role": "user", "content": "Hi"}], max_tokens=6
        )
    )
    assert sum(len(output["token_ids"]) for delta in deltas for output in delta["outputs"]) == 6
    assert deltas[-1]["finished"]
    with pytest.raises(Exception, match="tokens are 0 to 258"):
        handle.generate.remote([999]).result()


def test_a_redeploy_lets_streams_end(client: openai.OpenAI, port: int, model: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        stream = completion(client, max_tokens=200, stream=True)
        first = next(stream)
        rest = pool.submit(list, stream)
        app.run(config(model, step_ms=STEP_MS + 1), port=port, blocking=False)
        assert rest.result()[-1].choices[0].finish_reason == "length"
    assert first.choices[0].finish_reason is None
    assert completion(client).usage.completion_tokens == 6


def test_a_killed_shard_is_a_pause(client: openai.OpenAI, port: int) -> None:
    router = serve.get_deployment_handle("Router", app.APP_NAME)
    (shard,) = router.shards.remote().result()
    whole = completion(client, max_tokens=200).choices[0].text
    stream = completion(client, max_tokens=200, stream=True)
    text = next(stream).choices[0].text
    os.kill(shard["pid"], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while (seen := get(port, "/health"))[0] == 200:
        assert time.monotonic() < deadline, "not noticed"
    error = json.loads(seen[1])["error"]
    assert (seen[0], error["code"]) == (503, "engine_unavailable")
    assert "shards failed and are started again" in error["message"]
    late = completion(client)  # waits, too
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole
    assert late.usage.completion_tokens == 6
    assert get(port, "/health")[0] == 200
    (again,) = router.shards.remote().result()
    assert again["pid"] != shard["pid"]
    status, metrics = get(port, "/metrics")
    assert status == 200
    (failure,) = (
        sample
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "tensorray:last_shard_failure_seconds"
    )
    assert "rank 0: the shard's connection ended" in failure.labels["reason"]
    seen = scrape(port)
    assert (seen["shard_failures_total"], seen["recovery_seconds_count"]) == (1, 1)


def test_a_stalled_shard_turns_health_red(client: openai.OpenAI, port: int) -> None:
    def until(status: int, reason: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while (seen := get(port, "/health"))[0] != status or reason not in seen[1]:
            assert time.monotonic() < deadline, seen
            time.sleep(0.1)

    router = serve.get_deployment_handle("Router", app.APP_NAME)
    (shard,) = router.shards.remote().result()
    whole = completion(client, max_tokens=100).choices[0].text
    stream = completion(client, max_tokens=100, stream=True)
    text = next(stream).choices[0].text
    os.kill(shard["pid"], signal.SIGSTOP)
    try:
        until(503, "has not answered a step for")
    finally:
        os.kill(shard["pid"], signal.SIGCONT)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole
    until(200, "ok")
    until_idle(port)
    os.kill(shard["pid"], signal.SIGSTOP)  # one that has nothing to do, either
    try:
        until(503, "rank 0 does not answer")
    finally:
        os.kill(shard["pid"], signal.SIGCONT)
    until(200, "ok")


def test_a_killed_router_is_a_pause(client: openai.OpenAI, port: int) -> None:
    router = serve.get_deployment_handle("Router", app.APP_NAME)
    (shard,) = router.shards.remote().result()
    whole = completion(client, max_tokens=200).choices[0].text
    stream = completion(client, max_tokens=200, stream=True)
    text = next(stream).choices[0].text
    os.kill(router.process.remote().result()["pid"], signal.SIGKILL)
    late = completion(client)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole
    assert late.usage.completion_tokens == 6
    (again,) = router.shards.remote().result()
    assert again["pid"] == shard["pid"], "the new router took the shard over"


def test_two_replicas_share_the_requests(client: openai.OpenAI, port: int, model: Path) -> None:
    """The last test: it leaves another deployment behind."""
    two = config(model).model_copy(update={"data_parallel_size": 2, "num_ingress_replicas": 1})
    app.run(two, port=port, blocking=False)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: completion(client, max_tokens=30), range(8)))
    assert {answer.usage.completion_tokens for answer in answers} == {30}
    status, text = get(port, "/metrics")
    assert status == 200
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    generated = {
        sample.labels["engine"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "tensorray:generation_tokens_total"
    }
    assert sorted(generated) == ["0", "1"]
    assert sum(generated.values()) == 240
    assert get(port, "/health")[0] == 200

    # One prompt again and again goes where it is cached.
    for number in range(5):
        prompt = [token % 200 for token in range(150)] + [number]
        assert completion(client, prompt=prompt, max_tokens=3).usage.completion_tokens == 3
    scraped = get(port, "/metrics")[1]
    totals = {
        name: sum(
            float(line.rpartition(" ")[2])
            for line in scraped.splitlines()
            if line.startswith(f"tensorray:{name}_total{{")
        )
        for name in ("prefix_routed_requests", "prefix_cache_hits")
    }
    assert totals == {"prefix_routed_requests": 4, "prefix_cache_hits": 4 * 144}
