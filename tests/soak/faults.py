"""Break a running service in every way, under load, and say what clients saw.

    python tests/soak/faults.py [--readers 32] [--disconnects 10000]

One Ray Serve on this machine: two ingresses, a router, a shard on the null device. Readers ask for
one stream after the other, and hold each against the text it has when nothing happens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.context import _get_global_client

from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig
from tests.helpers.null_engine import write_model
from tests.helpers.ports import free_port

TOKENS = 150

# How a client can tell that its stream was cut off.
CUT_OFF = {"ClientPayloadError", "end without [DONE]", "HTTP 500", "HTTP 503"}
PATIENCE = 180.0


@dataclass
class Seen:
    """What readers saw from a fault on."""

    answers: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    pause: float = 0.0  # the longest between two tokens of one stream, or of an answer's start


class Readers:
    """So many clients, each with a stream at any time."""

    def __init__(self, url: str, count: int) -> None:
        self._url = url
        self._count = count
        self._expected: list[str] = []
        self._rounds = [0] * count
        self._ending = False
        self.seen = Seen()

    async def text(self, session: aiohttp.ClientSession, number: int) -> str:
        """One stream. Raises for whatever a client can tell is wrong with it."""
        body = {"prompt": f"reader {number}", "max_tokens": TOKENS, "seed": number, "stream": True}
        last = time.monotonic()
        text, done = "", False
        async with session.post(f"{self._url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}")
            async for line in answer.content:
                now = time.monotonic()
                self.seen.pause = max(self.seen.pause, now - last)
                last = now
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    done = True
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(f"event {event['error']['code']}")
                text += event["choices"][0]["text"]
        if not done:
            raise RuntimeError("end without [DONE]")
        return text

    async def _read(self, session: aiohttp.ClientSession, number: int) -> None:
        while not self._ending:
            try:
                text = await self.text(session, number)
            except Exception as error:
                told = str(error) if isinstance(error, RuntimeError) else type(error).__name__
                self.seen.errors[told] += 1
                await asyncio.sleep(0.1)
                continue
            self.seen.answers += 1
            self.seen.wrong += text != self._expected[number]
            self._rounds[number] += 1

    async def all_answered(self) -> None:
        """Until every reader has had two more answers, the first of which may have begun before."""
        goal = [done + 2 for done in self._rounds]
        await until(lambda: all(a >= b for a, b in zip(self._rounds, goal, strict=True)))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=PATIENCE)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            self._expected = [await self.text(session, number) for number in range(self._count)]
            tasks = [asyncio.create_task(self._read(session, i)) for i in range(self._count)]
            try:
                yield
            finally:
                self._ending = True
                await asyncio.gather(*tasks)


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(holds):
        if time.monotonic() > deadline:
            raise TimeoutError("it does not come to pass")
        await asyncio.sleep(0.05)


class Running:
    """The service, and its processes."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def pids(self, name: str) -> list[int]:
        """The processes of a deployment's replicas that run."""
        details = _get_global_client().get_serve_details()
        found = details["applications"][app.APP_NAME]["deployments"][name]["replicas"]
        return [each["pid"] for each in found if each["state"] == "RUNNING"]

    def proxies(self) -> list[int]:
        return [
            process.pid
            for process in psutil.process_iter(["name", "cmdline"])
            if "ProxyActor" in " ".join(process.info["cmdline"] or ())
        ]

    def shard(self) -> int:
        router = serve.get_deployment_handle("Router", app.APP_NAME)
        (shard,) = router.shards.remote().result(timeout_s=PATIENCE)
        return int(shard["pid"])

    def memory(self) -> dict[str, float]:
        """MiB that ingresses, router and Serve's proxy hold."""
        parts = {
            "ingresses": self.pids("Ingress"),
            "router": self.pids("Router"),
            "proxy": self.proxies(),
        }
        return {
            name: sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20
            for name, pids in parts.items()
        }

    async def figures(self) -> dict[str, float]:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{self.url}/metrics") as answer,
        ):
            text = await answer.text()
        return {
            sample.name.removeprefix("tensorray:"): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def idle(self) -> bool:
        """Whether nothing runs or waits within a while, and no block is held."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = await self.figures()
            if not found["num_requests_running"] and not found["num_requests_waiting"]:
                return found["kv_cache_usage_perc"] == 0
            await asyncio.sleep(0.1)
        return False


def growth(*memory: dict[str, float]) -> str:
    """How each part's MiB went on from one look to the next."""
    return "MiB: " + ", ".join(
        f"{name} " + ", then ".join(f"{each[name]:.0f}" for each in memory) for name in memory[0]
    )


@dataclass
class Row:
    fault: str
    clients: str
    lost: str
    recovery: str
    errors: int = 0  # streams that ended with one
    answers: int = 0
    wrong: int = 0  # answers that were not the undisturbed one
    told: frozenset[str] = frozenset()  # what the errors were


async def under_load(
    running: Running, readers: Readers, fault: str, act: Callable[[], Awaitable[None]]
) -> Row:
    """Break something while streams run; back to normal is when every reader had its answers."""
    await readers.all_answered()
    readers.seen = Seen()
    began = time.monotonic()
    await act()
    await readers.all_answered()
    took = time.monotonic() - began
    seen = readers.seen
    listed = ", ".join(f"{count} x {told}" for told, count in seen.errors.items())
    clients = f"{listed or 'no error'}; longest pause {seen.pause:.1f} s"
    errors = sum(seen.errors.values())
    lost = f"{errors} of {seen.answers + errors} streams"
    if seen.wrong:
        lost += f", {seen.wrong} WRONG"
    recovery = f"{seen.pause:.1f} s (all answered after {took:.0f} s)"
    told = frozenset(seen.errors)
    return Row(fault, clients, lost, recovery, errors, seen.answers, seen.wrong, told)


async def disconnects(running: Running, count: int) -> Row:
    """Clients that ask and go, wherever their request is by then."""
    body = json.dumps({"prompt": "bye", "max_tokens": 200, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(body)
    before = running.memory()
    began = time.monotonic()

    async def client(numbers: Iterator[int]) -> None:
        for number in numbers:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(head + body)
                if number % 3:
                    await reader.read(64)
                writer.close()

    async def clients(some: range) -> dict[str, float]:
        numbers = iter(some)
        await asyncio.gather(*(client(numbers) for _ in range(32)))
        if not await running.idle():
            raise RuntimeError("blocks are held with nothing running")
        return running.memory()

    half = await clients(range(count // 2))
    after = await clients(range(count // 2, count))
    took = time.monotonic() - began
    return Row(
        f"{count} clients that disconnect",
        f"{count / took:.0f} a second",
        "nothing: all blocks free again",
        growth(before, half, after),
    )


async def never_reading(running: Running, readers: Readers, count: int = 16) -> Row:
    """Clients that ask for long streams and read nothing, beside others that do."""
    body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": True, "logprobs": 1}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % len(body)
    before = running.memory()
    sockets = []
    for _ in range(count):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", running.port))
        client.sendall(head + body)
        sockets.append(client)
    readers.seen = Seen()
    await readers.all_answered()
    held = running.memory()
    seen = readers.seen
    for client in sockets:
        client.close()
    errors = sum(seen.errors.values())
    return Row(
        f"{count} clients that never read",
        f"others: {errors} errors, longest pause {seen.pause:.1f} s",
        f"{errors} streams of others",
        growth(before, held),
    )


def kill(pids: list[int], how: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pids[0], how)


async def faults(running: Running, readers: Readers, names: list[str], count: int) -> list[Row]:
    async def ingress() -> None:
        pid, *_ = running.pids("Ingress")
        kill([pid])
        await until(lambda: pid not in (left := running.pids("Ingress")) and len(left) == 2)

    async def router() -> None:
        kill(running.pids("Router"))

    async def shard() -> None:
        kill([await asyncio.to_thread(running.shard)])

    async def stall() -> None:
        kill([await asyncio.to_thread(running.shard)], signal.SIGSTOP)

    rows = []
    async with readers.running():
        for name, fault, act in (
            ("ingress", "SIGKILL of one of two ingresses", ingress),
            ("router", "SIGKILL of the router", router),
            ("shard", "SIGKILL of the shard", shard),
            ("stall", "SIGSTOP of the shard, step time-out 5 s", stall),
        ):
            if name in names:
                rows.append(await under_load(running, readers, fault, act))
                show(rows[-1])
        if "unread" in names:
            rows.append(await never_reading(running, readers))
            show(rows[-1])
    if not await running.idle():
        raise RuntimeError("blocks are held with nothing running")
    if "disconnects" in names:
        rows.append(await disconnects(running, count))
        show(rows[-1])
    return rows


def show(row: Row) -> None:
    print(f"| {row.fault} | {row.clients} | {row.lost} | {row.recovery} |", flush=True)


def run(port: int, readers: int, names: list[str], count: int) -> list[Row]:
    """On Ray as it is connected to; `port` is Serve's, or will be."""
    with tempfile.TemporaryDirectory() as directory:
        config = EngineConfig(
            model=str(write_model(Path(directory) / "tiny")),
            device="null",
            null_step_ms=5.0,
            num_ingress_replicas=2,
            max_num_seqs=256,
            max_waiting=20_000,
            step_timeout_seconds=5.0,
            hf_overrides={"max_position_embeddings": 8192},
            num_kv_blocks=1 << 17,
        )
        app.run(config, port=port, blocking=False)
        try:
            found = Running(port)
            return asyncio.run(faults(found, Readers(found.url, readers), names, count))
        finally:
            app.stop(own_cluster=False)


NAMES = ["ingress", "router", "shard", "stall", "unread", "disconnects"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, default=32)
    parser.add_argument("--disconnects", type=int, default=10_000)
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    arguments: Any = parser.parse_args()
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print("| fault | what clients saw | lost | time to recover |\n|---|---|---|---|")
    run(free_port(), arguments.readers, arguments.only, arguments.disconnects)
    ray.shutdown()


if __name__ == "__main__":
    main()
