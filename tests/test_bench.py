"""The load generator: when it sends, what it measures, what it counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest
from aiohttp import web

from tensorray.cluster import cli, loadgen
from tensorray.cluster.bench import Lengths, Workload, table
from tensorray.cluster.loadgen import Prompt, Record, Target
from tensorray.cluster.usage_error import UsageError

FIRST, STEP = 0.1, 0.05  # seconds the fake server takes to the first token and between tokens


class FakeServer:
    """Streams `max_tokens` tokens of OpenAI's completions at a fixed pace."""

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, object]] = []
        self.arrived: list[float] = []
        self.running = self.most_running = 0
        self.key = ""

    async def models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        return web.json_response({"data": [{"id": "m"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        assert not self.key or request.headers["Authorization"] == f"Bearer {self.key}"
        body = await request.json()
        self.bodies.append(body)
        self.arrived.append(time.perf_counter())
        if body["prompt"] == "refuse":
            return web.json_response({"error": {"message": "no"}}, status=429)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        response = web.StreamResponse()
        await response.prepare(request)
        for token in range(body["max_tokens"]):
            await asyncio.sleep(STEP if token else FIRST)
            await self.send(response, {"choices": [{"text": "x"}]})
            if body["prompt"] == "break":
                await self.send(response, {"error": {"message": "it broke"}})
                return response
        # The end carries no text, and is no token.
        await self.send(response, {"choices": [{"text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await self.send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        self.running -= 1
        return response

    @staticmethod
    async def send(response: web.StreamResponse, event: dict[str, object]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.router.add_post("/v1/completions", fake.complete)
    app.router.add_get("/v1/models", fake.models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    fake.url = f"http://{host}:{port}"
    yield fake
    await runner.cleanup()


Load = Callable[..., Awaitable[list[Record]]]


@pytest.fixture
def load(server: FakeServer) -> Load:
    async def send(prompts: list[Prompt], **options: float) -> list[Record]:
        return (await loadgen.run(Target(server.url, "m"), prompts, **options))[0]  # type: ignore[arg-type]

    return send


async def test_a_server_with_keys_is_sent_one(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.key = "sesame"
    line = ["bench", "serve", "--base-url", f"{server.url}/v1", "--num-prompts=1"]
    line += ["--random-input-len=2", "--random-output-len=3", "--json"]
    monkeypatch.setattr("sys.argv", ["tensorray", *line])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SystemExit) as refused:
        await asyncio.to_thread(cli.main)
    assert refused.value.code == 2
    assert "give the server's --api-key" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with contextlib.suppress(SystemExit):
        await asyncio.to_thread(cli.main)
    assert json.loads(capsys.readouterr().out)["output_tokens"] == 3


async def test_measures_the_servers_pace(load: Load) -> None:
    (record,) = await load([Prompt([1, 2, 3], 5)])
    figures = loadgen.summarize([record], seconds=1.0)
    assert figures["output_tokens"] == 5
    assert figures["prompt_tokens"] == 3
    assert len(record.chunks) == 5
    # The server never answers sooner than its pace; how much later is the machine's affair.
    assert figures["ttft_ms"]["mean"] >= 1e3 * FIRST * 0.98
    whole = figures["ttft_ms"]["mean"] + 4 * figures["tpot_ms"]["mean"]
    assert whole >= 1e3 * (FIRST + 4 * STEP) * 0.98
    assert whole == pytest.approx(1e3 * (record.chunks[-1] - record.sent), rel=1e-3)


async def test_asks_for_a_stream_with_usage(server: FakeServer) -> None:
    target = Target(server.url, "m", extra_body={"ignore_eos": True})
    await loadgen.run(target, [Prompt("hello", 1)])
    assert server.bodies == [
        {
            "model": "m",
            "prompt": "hello",
            "max_tokens": 1,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]


async def test_concurrency_holds_requests_back(server: FakeServer, load: Load) -> None:
    await load([Prompt("x", 1)] * 6, concurrency=2)
    assert server.most_running == 2


async def test_without_limits_everything_is_sent_at_once(server: FakeServer, load: Load) -> None:
    await load([Prompt("x", 2)] * 6)
    assert server.most_running > 2


async def test_requests_leave_at_the_rate_whatever_the_server_does(
    server: FakeServer, load: Load
) -> None:
    due = loadgen._arrivals(20, 50.0, seed=3)
    began = time.perf_counter()
    await load([Prompt("x", 3)] * 20, rate=50.0, seed=3)
    gaps = [at - began for at in sorted(server.arrived)]
    assert all(gap >= at for gap, at in zip(gaps, due, strict=True))
    assert server.most_running > 1


def test_arrivals_are_poisson() -> None:
    due = loadgen._arrivals(20_001, 4.0, seed=0)
    gaps = [after - before for before, after in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.25, rel=0.03)
    assert deviation == pytest.approx(mean, rel=0.05)  # as of an exponential distribution


async def test_failures_are_counted_not_measured(load: Load) -> None:
    records = await load([Prompt("refuse", 2), Prompt("break", 3), Prompt("fine", 1)])
    figures = loadgen.summarize(records, seconds=2.0)
    assert (figures["requests"], figures["failed"]) == (3, 2)
    assert figures["output_tokens"] == 1
    assert "it broke" in figures["errors"]
    assert figures["errors"][0].startswith("HTTP 429")


async def test_a_server_that_is_not_there_is_an_error_of_each_request() -> None:
    records, _ = await loadgen.run(Target("http://127.0.0.1:9", "m"), [Prompt("x", 1)])
    assert "ClientConnector" in records[0].error


def test_summary_of_known_times() -> None:
    records = [
        Record(sent=0.0, chunks=[1.0, 1.5, 3.0], done=3.0, prompt_tokens=4, output_tokens=5),
        Record(sent=2.0, chunks=[2.5], done=2.5, prompt_tokens=4, output_tokens=1),
    ]
    figures = loadgen.summarize(records, seconds=3.0)
    assert figures["requests_per_second"] == pytest.approx(2 / 3, abs=1e-3)
    assert figures["output_tokens_per_second"] == 2.0
    assert figures["ttft_ms"] == {"mean": 750, "p50": 500, "p90": 1000, "p99": 1000, "max": 1000}
    assert figures["tpot_ms"]["mean"] == 500  # two seconds for the four tokens after the first
    assert figures["itl_ms"] == {"mean": 1000, "p50": 500, "p90": 1500, "p99": 1500, "max": 1500}
    assert figures["e2e_ms"]["max"] == 3000


def test_percentiles_are_nearest_rank() -> None:
    found = loadgen.distribution([i / 1000 for i in range(1, 101)])
    assert (found["p50"], found["p90"], found["p99"], found["max"]) == (50, 90, 99, 100)
    assert loadgen.distribution([]) == {}


def test_random_prompts_keep_to_their_ranges() -> None:
    lengths = Lengths.parse("3:5", "7", "10:12")
    prompts = lengths.prompts(200, seed=1)
    assert {len(each.prompt) for each in prompts} == {3, 4, 5}
    assert {each.max_tokens for each in prompts} == {7}
    assert {token for each in prompts for token in each.prompt} == {10, 11, 12}
    assert prompts == lengths.prompts(200, seed=1)
    assert prompts != lengths.prompts(200, seed=2)


@pytest.mark.parametrize("text", ["", "a", "0", "9:3", "1:2:3"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--input-len"):
        Lengths.parse(text, "1", "1")


def test_a_dataset_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt_token_ids": [1], "max_tokens": 3}\n')
    lengths = Lengths.parse("1", "9", "1")
    workload = Workload.make(str(path), None, lengths, 0)
    assert workload == Workload([Prompt("a", 9), Prompt([1], 3)], ignore_eos=False)
    assert len(Workload.make(str(path), 1, lengths, 0).prompts) == 1


def test_table_shows_every_figure() -> None:
    shown = table({"requests": 3, "ttft_ms": {"mean": 1.5, "p50": 1}, "errors": [], "rate": None})
    assert shown.splitlines() == [
        "requests  3",
        "ttft ms   mean 1.5  p50 1",
        "errors    none",
        "rate      none",
    ]
