"""What the service costs: first tokens, streaming against whole answers, many streams.

    python tests/benchmarks/bench_serve.py [--modes default,throughput,haproxy,both]

A null device answers after a fixed time, so all that is measured is everything else. References
run in the same cluster in the same minute:

- an empty Serve application with the same hops (proxy, FastAPI ingress, second deployment), whose
  second deployment streams fixed chunks, for the time to the first token;
- the same requests answered whole, for the cost of streaming.

Each mode is Serve with other environment flags, in a process and a cluster of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODES = {
    "default": {},
    "throughput": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    "both": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"},
}
HOST = "127.0.0.1"


# --- the client: a socket, no HTTP library, so that two cores are enough ---


@dataclass
class Reply:
    """One answer; times in seconds."""

    first: float  # from the request's last byte to the first byte of a chunk of the body
    total: float
    chunks: int  # server-sent events
    body: bytes


class Exchange(asyncio.Protocol):
    """Sends one request and reads its answer; the server closes the connection after it."""

    def __init__(self, request: bytes) -> None:
        self.done: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._request = request
        self._received = bytearray()
        self._first = 0.0
        self._in_body = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._sent = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._in_body and (end := self._received.find(b"\r\n\r\n")) >= 0:
            self._in_body = len(self._received) > end + 4
            self._first = time.perf_counter() - self._sent

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.cancelled():
            return
        head, _, body = bytes(self._received).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError((head + body)[:500].decode(errors="replace")))
            return
        total = time.perf_counter() - self._sent
        self.done.set_result(Reply(self._first, total, body.count(b"data: "), body))


async def ask(port: int, path: str, fields: dict[str, Any]) -> Reply:
    body = json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    _, exchange = await loop.create_connection(lambda: Exchange(head.encode() + body), HOST, port)
    return await asyncio.wait_for(exchange.done, 300)


def fields(tokens: int, *, stream: bool, seed: int = 0) -> dict[str, Any]:
    return {"prompt": "Hello", "max_tokens": tokens, "stream": stream, "seed": seed}


async def first_tokens(port: int, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first token, ours and the empty application's, in turn."""
    ours, empty = [], []
    for i in range(rounds + 20):
        a = await ask(port, "/v1/completions", fields(2, stream=True, seed=i))
        b = await ask(port, "/empty/stream", {"chunks": 2})
        if i >= 20:  # both warm
            ours.append(a.first * 1e3)
            empty.append(b.first * 1e3)
    return ours, empty


async def rate(port: int, streams: int, tokens: int, *, stream: bool) -> tuple[float, int]:
    """Output tokens per second of `streams` requests at once, and chunks received."""
    began = time.perf_counter()
    replies = await asyncio.gather(
        *[
            ask(port, "/v1/completions", fields(tokens, stream=stream, seed=i))
            for i in range(streams)
        ]
    )
    seconds = time.perf_counter() - began
    for reply in replies:
        ended = b"[DONE]" in reply.body if stream else b'"usage"' in reply.body
        if not (ended and b'"length"' in reply.body):
            raise RuntimeError(f"an answer broke off: …{reply.body[-500:]!r}")
    return streams * tokens / seconds, sum(reply.chunks for reply in replies)


# --- references ---


def empty_app() -> Any:
    """A Serve application with our hops and nothing in them."""
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse
    from ray import serve

    api = FastAPI()

    class Source:
        async def chunks(self, count: int) -> AsyncIterator[bytes]:
            for _ in range(count):
                yield b"data: {}\n\n"

    class Front:
        def __init__(self, source: Any) -> None:
            self._source = source.options(stream=True)

        @api.post("/stream")
        async def stream(self, request: Request) -> StreamingResponse:
            count = (await request.json())["chunks"]
            return StreamingResponse(
                self._source.chunks.remote(count), media_type="text/event-stream"
            )

    Front.stream.__annotations__.update(request=Request)
    options: dict[str, Any] = {
        "max_ongoing_requests": 1000,
        "ray_actor_options": {"num_cpus": 0},
    }
    source = serve.deployment(Source, **options).bind()
    return serve.deployment(serve.ingress(api)(Front), name="Front", **options).bind(source)


async def in_process(model: Path, streams: int, tokens: int, step_ms: float) -> dict[str, float]:
    """Tokens per second without Serve: the engine alone, behind its link, and as text."""
    from tensorray.actors.link import LocalLink
    from tensorray.actors.null_shard import NullShard
    from tensorray.cluster.config import EngineConfig
    from tensorray.cluster.engine import Engine
    from tensorray.cluster.engine_link import Endpoint, EngineLink, EngineServer
    from tensorray.cluster.frontend import Frontend

    config = EngineConfig(model=str(model), device="null", null_step_ms=step_ms)
    frontend = Frontend.load(config)
    shard = NullShard.from_config(config.shard())
    engine = Engine(LocalLink(shard), config.scheduler(shard.info))
    await engine.start()
    server = EngineServer(engine)
    endpoint = await server.start(HOST)

    async def find() -> Endpoint:
        return endpoint

    link = EngineLink(find)

    async def drain(items: AsyncIterator[Any]) -> None:
        async for _ in items:
            pass

    rates = {}
    params = frontend.params(max_tokens=tokens, seed=0)
    for name, client, text in (
        ("engine", engine, False),
        ("link", link, False),
        ("link and text", link, True),
    ):
        best = 0.0
        for attempt in range(3):
            prepared = [
                frontend.request("Hello", params, request_id=f"{name}-{attempt}-{i}")
                for i in range(streams)
            ]
            began = time.perf_counter()
            await asyncio.gather(
                *[
                    drain(frontend.stream(client, each) if text else client.generate(each.request))
                    for each in prepared
                ]
            )
            best = max(best, streams * tokens / (time.perf_counter() - began))
        rates[name] = best
    await link.close()
    await server.close()
    await engine.close()
    return rates


# --- one mode ---


def measure(mode: str, port: int, args: argparse.Namespace) -> None:
    import ray
    from ray import serve

    from tensorray.cluster import app
    from tensorray.cluster.config import EngineConfig

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.helpers.null_engine import write_model

    model = write_model(Path(tempfile.mkdtemp()))

    def deploy(step_ms: float) -> None:
        config = EngineConfig(
            model=str(model),
            device="null",
            null_step_ms=step_ms,
            num_ingress_replicas=args.ingress,
        )
        app.run(config, HOST, port, blocking=False)

    print(f"\n== {mode} ({' '.join(f'{k}={v}' for k, v in MODES[mode].items()) or 'no flags'})")
    deploy(0.0)
    serve.run(empty_app(), name="empty", route_prefix="/empty")
    time.sleep(2)
    ours, empty = asyncio.run(first_tokens(port, args.rounds))
    a, b = statistics.median(ours), statistics.median(empty)
    print(
        f"first token, 1 stream, median of {args.rounds}: {a:.2f} ms; empty application "
        f"{b:.2f} ms; difference {a - b:+.2f} ms"
    )
    tokens = 200
    best = max(asyncio.run(rate(port, 256, tokens, stream=True)) for _ in range(3))
    print(
        f"256 streams over HTTP, steps of 0 ms: {best[0]:,.0f} tokens/s "
        f"({best[1] / (256 * tokens):.2f} chunks a token)"
    )
    deploy(20.0)
    pairs = [
        (
            asyncio.run(rate(port, 32, 100, stream=True))[0],
            asyncio.run(rate(port, 32, 100, stream=False))[0],
        )
        for _ in range(5)
    ]
    streamed, whole = (max(column) for column in zip(*pairs, strict=True))
    print(
        f"32 streams, steps of 20 ms: streamed {streamed:,.0f} tokens/s, whole {whole:,.0f}; "
        f"ratio of the best {streamed / whole:.3f}, "
        f"of each pair {', '.join(f'{s / w:.3f}' for s, w in pairs)}"
    )
    best = max(asyncio.run(rate(port, 256, 100, stream=True)) for _ in range(3))
    print(
        f"256 streams over HTTP, steps of 20 ms: {best[0]:,.0f} tokens/s of 12,800 "
        f"({best[1] / 25600:.2f} chunks a token)"
    )
    serve.shutdown()
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modes", default="default", help=f"of {', '.join(MODES)}; default")
    parser.add_argument("--rounds", type=int, default=200, help="requests for the first token")
    parser.add_argument("--ingress", type=int, default=1, help="ingress replicas")
    parser.add_argument("--port", type=int, default=18300)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.one, args.port, args)
        return
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.helpers.null_engine import write_model

    model = write_model(Path(tempfile.mkdtemp()))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for step_ms in (0.0, 20.0):
        rates = asyncio.run(in_process(model, 256, 100, step_ms))
        told = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
        print(f"256 streams in process, steps of {step_ms:.0f} ms, tokens/s: {told}")
    for mode in args.modes.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", mode]
        subprocess.run(command, env={**os.environ, **MODES[mode]}, check=True)


if __name__ == "__main__":
    main()
