"""bench_table.py's work through `tensorray serve`: over HTTP, streamed, and the start from cold.

    python tests/gpu/bench_serve_table.py [--models Llama-3.1-8B,Qwen3-0.6B]
        [--work alone,16,256,mixed] [--clients 8] [--limit 100] [NAME=VALUE ...]

NAME=VALUE are flags of `tensorray serve` (device=null tries this out without a GPU). Needs the
project importable, and Ray; the service runs on a Ray cluster of its own. Requests are token ids,
from several client processes; a token's time counts until its event was received. The environment
may have RAY_SERVE_THROUGHPUT_OPTIMIZED and RAY_SERVE_ENABLE_HA_PROXY.

The start is measured from the service's own log lines: each process writes them to one file,
which Python's own hook for a site (sitecustomize) arranges.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_serve import HOST, Reply, ask
from gpu.bench_table import VLLM, WORK, print_table
from helpers.dummy_models import make_dummy_model

_SITE = """
import logging, os
logging.basicConfig(filename=os.environ["SERVE_LOG"], level=logging.INFO,
                    format="%(created).3f %(process)d %(name)s %(message)s")
"""
_SETTINGS = {
    "load-format": "dummy",
    "dtype": "float16",
    "max-model-len": "4096",
    "max-num-seqs": "256",
    "enable-prefix-caching": "false",
}


# --- the service ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Service:
    """A running `tensorray serve`."""

    port: int
    began: float  # when its process was started, seconds since the epoch
    log: Path
    output: Path
    process: subprocess.Popen[bytes]

    def wait(self, seconds: float) -> float:
        """Seconds from the process's start to its first answer of two tokens."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                break
            with suppress(OSError, RuntimeError):  # no door yet, or one that says 404 or 503
                asyncio.run(ask(self.port, "/v1/completions", completion([300] * 8, 2)))
                return time.time() - self.began
            time.sleep(0.05)
        raise RuntimeError(f"it does not answer; it said: {self.output.read_text()[-3000:]}")

    def stages(self) -> Iterator[tuple[float, str]]:
        """What was reached how many seconds after the start, as the log has it."""
        for line in self.log.read_text(errors="replace").splitlines():
            created, _, rest = line.partition(" ")
            _, _, rest = rest.partition(" ")
            name, _, message = rest.partition(" ")
            told = message.startswith(("Starting", "Loading", "loaded", "recorded", "serving"))
            if name.startswith(("tensorray.", "ray.serve")) and told:
                if message.startswith("recorded ") and " graphs in " not in message:
                    continue  # one of them
                yield float(created) - self.began, message


@contextmanager
def serving(model: Path, settings: dict[str, str]) -> Iterator[Service]:
    """`tensorray serve`, and its end."""
    folder = Path(tempfile.mkdtemp(prefix="bench-serve-"))
    (folder / "sitecustomize.py").write_text(_SITE)
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    flags = [str(model), "--host", HOST, "--port", str(port)]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        plain = {"true": [f"--{flag}"], "false": [f"--no-{flag}"]}
        flags += plain.get(value.lower(), [f"--{flag}", value])
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    log, output = folder / "log", folder / "output"
    log.touch()
    with output.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorray.cluster.cli", "serve", *flags],
            env={**os.environ, "PYTHONPATH": path, "SERVE_LOG": str(log)},
            stdout=said,
            stderr=said,
        )
    try:
        yield Service(port, time.time(), log, output, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


def completion(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# --- the clients ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What one client saw: seconds to the first event of each answer, and what went wrong."""

    first: list[float]
    chunks: int
    wrong: str


def _client(connection: Any, port: int) -> None:
    """A process: takes lists of (prompt, tokens), asks all at once, says what came."""
    connection.send(None)
    with suppress(EOFError):
        while True:
            connection.send(asyncio.run(_ask_all(port, connection.recv())))


async def _ask_all(port: int, requests: list[tuple[list[int], int]]) -> Answers:
    replies: list[Reply | BaseException] = await asyncio.gather(
        *(ask(port, "/v1/completions", completion(*each)) for each in requests),
        return_exceptions=True,
    )
    wrong = ""
    good = []
    for reply, (_, tokens) in zip(replies, requests, strict=True):
        if isinstance(reply, BaseException):
            wrong = wrong or repr(reply)[:500]
        elif f'"completion_tokens":{tokens},' not in reply.body[-1000:].decode(errors="replace"):
            wrong = wrong or f"not {tokens} tokens: {reply.body[-500:]!r}"
        else:
            good.append(reply)
    return Answers([each.first for each in good], sum(each.chunks for each in good), wrong)


class Clients:
    """Client processes, each with a share of the requests."""

    def __init__(self, count: int, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_client, args=(theirs, port), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)
        for connection in self._connections:
            connection.recv()

    def run(self, lengths: list[tuple[int, int]], seed: int) -> tuple[float, Answers]:
        """Seconds until all have their answers."""
        draw = random.Random(seed)
        requests = [([draw.randrange(300, 30000) for _ in range(n)], m) for n, m in lengths]
        count = len(self._connections)
        began = time.perf_counter()
        for i, connection in enumerate(self._connections):
            connection.send(requests[i::count])
        answers = [connection.recv() for connection in self._connections]
        seconds = time.perf_counter() - began
        first = sorted(time for each in answers for time in each.first)
        wrong = next((each.wrong for each in answers if each.wrong), "")
        return seconds, Answers(first, sum(each.chunks for each in answers), wrong)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(10)


# --- the table -----------------------------------------------------------------------------------


def measure(name: str, model: Path, arguments: argparse.Namespace) -> dict[str, float]:
    settings = {**_SETTINGS, **dict(each.split("=", 1) for each in arguments.settings)}
    with serving(model, settings) as service:
        figures = {"start": service.wait(arguments.limit)}
        for seconds, what in service.stages():
            print(f"{name}: {seconds:6.2f} s {what}", flush=True)
        print(f"{name}: {figures['start']:6.2f} s first answer", flush=True)
        clients = Clients(arguments.clients, service.port)
        for work in arguments.work.split(","):
            requests = WORK[work]
            runs = [clients.run(requests.lengths, seed) for seed in range(requests.tries)]
            seconds, answers = min(runs, key=lambda run: run[0])
            wrong = next((answers.wrong for _, answers in runs if answers.wrong), "")
            if wrong:
                print(f"{name} {work}: WRONG: {wrong}", flush=True)
                continue
            per_token = seconds / requests.output
            figures[work] = 1e3 * per_token if work == "alone" else 1 / per_token
            print(
                f"{name} {work}: {figures[work]:.2f}; first tokens after "
                f"{1e3 * answers.first[len(answers.first) // 2]:.0f} ms (median), "
                f"{answers.chunks / requests.output:.2f} events a token",
                flush=True,
            )
        clients.close()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(VLLM))
    parser.add_argument("--work", default=",".join(WORK))
    parser.add_argument("--clients", type=int, default=8, help="client processes")
    parser.add_argument("--limit", type=float, default=100, help="seconds for the start")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE")
    arguments = parser.parse_args()
    parent = Path(tempfile.mkdtemp(prefix="bench-serve-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the service
    found = {
        name: measure(name, make_dummy_model(name, parent), arguments)
        for name in arguments.models.split(",")
    }
    print_table(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))
    return int(any(len(figures) <= len(arguments.work.split(",")) for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
