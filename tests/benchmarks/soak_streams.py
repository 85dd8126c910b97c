"""Many streams at once, for minutes: is one lost, does memory grow, what does serving add?

    python tests/benchmarks/soak_streams.py [--streams 1000] [--seconds 300] [--step-ms 500]
    python tests/benchmarks/soak_streams.py --gemma --streams 64

Each stream asks for a completion, reads it token by token, and asks for the next until the time is
over. The null device's step takes a fixed time, so whatever a stream waits beyond it is ours. Ends
with an error if an answer is not whole, or if a process of the service grows by more than
`--growth` between the first and the last minute (or quarter, if that is less).
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
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
_SAMPLE_SECONDS = 2.0
# Ray's titles of the service's own processes.
_KINDS = {"Ingress": "ingress", "Router": "router", "ShardActor": "shard", "ProxyActor": "proxy"}


@dataclass
class Load:
    """What the streams saw. Times in seconds."""

    answers: int = 0
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # from asking to the first token
    gaps: list[float] = field(default_factory=list)  # between arrivals of tokens, of one stream


class Stream(asyncio.Protocol):
    """Asks once over a connection of its own, which the server closes after its answer."""

    def __init__(self, request: bytes, load: Load) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._load = load
        self._events = 0
        self._head = b""
        self._tail = b""
        self._last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._last = time.perf_counter()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._head:
            self._head = data[:200]
        if events := data.count(b"data: "):
            now = time.perf_counter()
            (self._load.gaps if self._events else self._load.first).append(now - self._last)
            self._last = now
            self._events += events
        self._tail = (self._tail + data)[-600:]

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        self._load.answers += 1
        if not self._head.startswith(b"HTTP/1.1 200"):
            self._load.lost.append((self._head or str(error).encode()).decode(errors="replace"))
        elif b"data: [DONE]" not in self._tail:
            self._load.lost.append(f"broke off: …{self._tail[-200:]!r}")
        self.done.set_result(None)

    @property
    def usage(self) -> int:
        """Tokens the server says it sent."""
        _, found, rest = self._tail.rpartition(b'"completion_tokens":')
        return int(rest.split(b",")[0]) if found else 0


async def streams(port: int, count: int, seconds: float, tokens: int) -> Load:
    """`count` streams of `tokens` each, over and over; every one is read to its end."""
    load = Load()
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        await asyncio.sleep(number / count)  # not all in one instant: that is another test
        seed = number
        while time.perf_counter() < end:
            body = json.dumps(
                {
                    "prompt": f"Stream {number} asks",
                    "max_tokens": tokens,
                    "ignore_eos": True,
                    "seed": seed,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            ).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            stream = Stream(head.encode() + body, load)
            try:
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda made=stream: made, HOST, port)
                await asyncio.wait_for(stream.done, 600)
            except (OSError, asyncio.TimeoutError) as error:
                load.answers += 1
                load.lost.append(f"{type(error).__name__}: {error}")
                continue
            load.tokens += stream.usage
            if stream.usage != tokens and not load.lost:
                load.lost.append(f"{stream.usage} of {tokens} tokens")
            seed += count

    await asyncio.gather(*map(one, range(count)))
    return load


class Memory:
    """Resident bytes of the service's processes, by kind, as time goes on."""

    def __init__(self, server: psutil.Process) -> None:
        self._server = server
        self.samples: dict[str, list[tuple[float, int]]] = defaultdict(list)

    async def watch(self) -> None:
        while True:
            self.sample()
            await asyncio.sleep(_SAMPLE_SECONDS)

    def sample(self) -> None:
        now = time.perf_counter()
        sums: dict[str, int] = defaultdict(int)
        for process in self._server.children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                title = " ".join(process.cmdline())
                kind = next((name for part, name in _KINDS.items() if part in title), None)
                if kind is not None and title.startswith("ray::"):
                    sums[kind] += process.memory_info().rss
        for kind, total in sums.items():
            self.samples[kind].append((now, total))

    def growth(self) -> dict[str, tuple[float, float]]:
        """Mean MiB in the first and last minute (or quarter), by kind."""
        found = {}
        for kind, samples in self.samples.items():
            begin, end = samples[0][0], samples[-1][0]
            part = min(60.0, (end - begin) / 4)
            first = [total for when, total in samples if when <= begin + part]
            last = [total for when, total in samples if when >= end - part]
            found[kind] = (statistics.fmean(first) / 2**20, statistics.fmean(last) / 2**20)
        return found


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    ranks = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    at = {name: ordered[min(len(ordered) - 1, int(len(ordered) * p))] for name, p in ranks.items()}
    return {name: round(1e3 * value, 1) for name, value in {**at, "max": ordered[-1]}.items()}


async def soak(
    port: int, server: psutil.Process, args: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """What there is to report, and what is wrong with it."""
    await streams(port, args.streams, args.warm_up, args.tokens)  # buffers grow to their size
    memory = Memory(server)
    watching = asyncio.ensure_future(memory.watch())
    began = time.perf_counter()
    load = await streams(port, args.streams, args.seconds, args.tokens)
    seconds = time.perf_counter() - began
    watching.cancel()
    step = 0.0 if args.gemma else args.step_ms / 1e3
    growth = memory.growth()
    report: dict[str, Any] = {
        "streams": args.streams,
        "seconds": round(seconds, 1),
        "answers": load.answers,
        "lost": len(load.lost),
        "tokens": load.tokens,
        "tokens_per_second": round(load.tokens / seconds, 1),
        "mib_first_and_last": {
            kind: [round(value, 1) for value in pair] for kind, pair in sorted(growth.items())
        },
        "first_token_ms": percentiles(load.first) if load.first else None,
    }
    if load.gaps:
        name = "between_tokens_ms" if args.gemma else "added_to_a_step_ms"
        report[name] = percentiles([gap - step for gap in load.gaps])
    faults = [f"{len(load.lost)} lost: {load.lost[:3]}"] if load.lost else []
    if not load.tokens:
        faults.append("nothing was generated")
    for kind, (first, last) in growth.items():
        if last > first * (1 + args.growth):
            faults.append(f"the {kind} grew from {first:.0f} to {last:.0f} MiB")
    return report, faults


def serve(args: argparse.Namespace) -> None:
    """The service, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints to stdout too
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tensorray.cluster import app, demo
    from tensorray.cluster.config import EngineConfig

    common: dict[str, Any] = {
        "max_num_seqs": args.streams,
        "max_waiting": args.streams,
        "num_ingress_replicas": args.ingress,
        "served_model_name": ["soak"],
    }
    if args.gemma:
        model = str(demo.model_path())
        # A cache that the first minute has been all through: memory grows as its blocks are first
        # written to, which is no leak.
        config = EngineConfig(
            model=model,
            max_model_len=512,
            device="cpu",
            kv_cache_memory_bytes=256 << 20,
            **common,
        )
    else:
        from tests.helpers.null_engine import write_model

        model = str(write_model(Path(tempfile.mkdtemp()) / "model"))
        config = EngineConfig(model=model, device="null", null_step_ms=args.step_ms, **common)
    app.run(config, HOST, args.port, blocking=False)
    print("ready", file=answers, flush=True)
    sys.stdin.read()
    app.stop(own_cluster=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds that do not count")
    parser.add_argument("--step-ms", type=float, default=500.0, help="a step of the null device")
    parser.add_argument("--tokens", type=int, default=60, help="of each answer")
    parser.add_argument("--ingress", type=int, default=1, help="ingress replicas")
    parser.add_argument("--growth", type=float, default=0.1, help="share that memory may grow by")
    parser.add_argument("--gemma", action="store_true", help="the demo model in place of no model")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return 0
    if not args.port:
        args.port = _free_port()
    server = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--serve", "--port", str(args.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2" if args.gemma else "1"},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        if server.stdout.readline().strip() != "ready":
            raise RuntimeError("the service did not start")
        report, faults = asyncio.run(soak(args.port, psutil.Process(server.pid), args))
    finally:
        server.stdin.close()
        server.wait(120)
    print(json.dumps(report, indent=2))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())
