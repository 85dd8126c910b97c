"""A service whose prompts are computed by one replica and decoded by another, on Ray."""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.llm import LLM
from tensorray.cluster.sampling_params import SamplingParams
from tests.helpers.reservations import reserved
from tests.helpers.tiny_models import directory

pytestmark = pytest.mark.ray

MODEL = directory("gemma3")  # has sliding windows
PROMPTS = [[3 + (i * i * k + 5 * i) % 80 for i in range(30)] for k in range(4, 10)]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 30},
    {"temperature": 0.9, "seed": 5, "frequency_penalty": 0.5, "max_tokens": 30},
]


@pytest.fixture(scope="module")
def port(serve_port: int) -> Iterator[int]:
    config = EngineConfig(
        model=str(MODEL),
        served_model_name=["tiny"],
        device="cpu",
        num_threads=1,
        block_size=4,
        max_model_len=64,
        num_kv_blocks=400,
        max_num_seqs=8,
        enable_prefix_caching=False,  # what is said twice is handed over twice
        prefill_replicas=1,
        prefill_min_tokens=16,
    )
    app.run(config, port=serve_port, blocking=False)
    until(lambda: "prefill-0" in scrape(serve_port)["engine_up"])
    yield serve_port
    app.stop(own_cluster=False)


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What one replica answers, for each of `asked`."""
    with LLM(str(MODEL), device="cpu", num_threads=1, max_model_len=64, num_kv_blocks=400) as llm:
        params = [SamplingParams(**sampling) for _, sampling in asked()]
        found = llm.generate([prompt for prompt, _ in asked()], params)
        return [each.outputs[0].text for each in found]


def asked() -> list[tuple[list[int], dict[str, Any]]]:
    return [(prompt, sampling) for prompt in PROMPTS for sampling in SAMPLING]


def until(condition: Any) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def scrape(port: int) -> dict[str, dict[str, float]]:
    """Values by name and engine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for family in text_string_to_metric_families(connection.getresponse().read().decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("tensorray:")
            found[name][sample.labels.get("engine", "")] = sample.value
    return found


def answers(port: int) -> list[Iterator[str]]:
    """A stream for each of `asked`, which is open."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)

    def read(stream: Any) -> Iterator[str]:
        for chunk in stream:
            yield chunk.choices[0].text

    def ask(one: tuple[list[int], dict[str, Any]]) -> Iterator[str]:
        prompt, sampling = one
        completions: Any = client.completions
        return read(completions.create(model="tiny", prompt=prompt, stream=True, **sampling))

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, asked()))


def test_two_replicas_answer_as_one_does(port: int, expected: list[str]) -> None:
    assert ["".join(each) for each in answers(port)] == expected
    seen = scrape(port)
    count = float(len(expected))
    assert seen["handover_held_total"] == {"prefill-0": count, "0": 0.0}
    assert seen["handover_fetched_total"] == {"prefill-0": 0.0, "0": count}
    assert seen["handover_failed_total"] == {"prefill-0": 0.0, "0": 0.0}
    assert seen["handover_bytes_total"]["0"] > 0
    assert seen["request_success_total"]
    until(lambda: not any(scrape(port)["num_requests_running"].values()))


def test_a_prefill_replica_that_is_killed_loses_nothing(port: int, expected: list[str]) -> None:
    (its_place,) = reserved("#Prefill#")
    prefill = serve.get_deployment_handle("Prefill", app.APP_NAME)
    pids = [prefill.process.remote().result()["pid"]]
    pids += [each["pid"] for each in prefill.shards.remote().result()]
    streams = answers(port)
    first = next(streams[0])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    texts = [first + "".join(streams[0])] + ["".join(each) for each in streams[1:]]
    assert texts == expected
    assert ["".join(each) for each in answers(port)] == expected, "while it is gone"

    until(lambda: "prefill-0" in scrape(port)["engine_up"])
    assert ["".join(each) for each in answers(port)] == expected
    assert scrape(port)["handover_held_total"]["prefill-0"] > 0
    until(lambda: its_place not in reserved("#Prefill#"))
