"""SIGKILL shards of a layout under running streams, and say what the streams' readers saw.

    python tests/soak/kill_shards.py [--device cuda] [--tp 2] [--pp 1] [--rounds 4]
        [--streams 32] [--tokens 1000]

A service on a Ray of its own, with a small model of random weights in float32. Each round kills one
shard once every stream has had a token, and holds what each stream got, over the pause, against
what it gets when nothing happens. Ends with status 1 if a token was lost, repeated or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import ray
from helpers.equality import assert_same_tokens
from helpers.ports import free_port
from helpers.tiny_models import directory
from ray import serve

from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig

_SECONDS = 120.0


@dataclass
class Heard:
    """What one stream's reader got."""

    tokens: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    longest_pause: float = 0.0


async def listen(
    session: aiohttp.ClientSession, url: str, number: int, tokens: int, first: asyncio.Event
) -> Heard:
    heard = Heard()
    body = {
        "model": "tiny",
        "prompt": [3 + (number * 7 + i) % 80 for i in range(4 + number % 5)],
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 2,
        "stream": True,
        "ignore_eos": True,
    }
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        last = time.monotonic()
        async for line in answer.content:
            data = line.removeprefix(b"data:").strip()
            if data in (b"", b"[DONE]"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"])
            now = time.monotonic()
            heard.longest_pause = max(heard.longest_pause, now - last) if heard.tokens else 0.0
            last = now
            (choice,) = event["choices"]
            if choice["logprobs"] is not None:
                heard.tokens += choice["logprobs"]["tokens"]
                for top in choice["logprobs"]["top_logprobs"]:
                    best = sorted(top.values(), reverse=True)
                    heard.margins.append(best[0] - best[1] if len(best) > 1 else 0.0)
                first.set()
            heard.finish_reason = choice["finish_reason"]
    return heard


async def all_streams(
    url: str, count: int, tokens: int, kill: Callable[[], None] | None = None
) -> list[Heard]:
    """All streams at once; `kill` is called once each has had a token."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, read_bufsize=1 << 20
    ) as session:
        firsts = [asyncio.Event() for _ in range(count)]
        tasks = [
            asyncio.create_task(listen(session, url, i, tokens, first))
            for i, first in enumerate(firsts)
        ]
        if kill is not None:
            await asyncio.wait_for(asyncio.gather(*(first.wait() for first in firsts)), _SECONDS)
            running = sum(not task.done() for task in tasks)
            kill()
            print(f"{running} of {count} streams ran", flush=True)
        return list(await asyncio.gather(*tasks))


def differences(found: list[Heard], expected: list[Heard], tokens: int) -> list[str]:
    """What is wrong with each stream that is not what it should be."""
    wrong = []
    for number, (heard, other) in enumerate(zip(found, expected, strict=True)):
        try:
            assert heard.finish_reason == "length", heard.finish_reason
            assert len(heard.tokens) == tokens, f"{len(heard.tokens)} tokens"
            assert_same_tokens(heard.tokens, other.tokens, other.margins)  # type: ignore[arg-type]
        except AssertionError as error:  # noqa: PERF203
            wrong.append(f"stream {number}: {error}")
    return wrong


def run(arguments: Any) -> int:
    """The number of streams that went wrong, on Ray as it is connected to."""
    count, tokens = arguments.streams, arguments.tokens
    port = free_port()
    config = EngineConfig(
        model=str(directory("llama3")),
        served_model_name=["tiny"],
        device=arguments.device,
        dtype="float32",
        num_threads=1,
        tensor_parallel_size=arguments.tp,
        pipeline_parallel_size=arguments.pp,
        hf_overrides={"max_position_embeddings": 16 + tokens},
        num_kv_blocks=2 + count * (2 + tokens // 16),
        max_num_seqs=count,
        max_logprobs=2,
    )
    began = time.monotonic()
    app.run(config, port=port, blocking=False)
    print(f"up after {time.monotonic() - began:.1f} s", flush=True)
    url = f"http://127.0.0.1:{port}"
    router = serve.get_deployment_handle("Router", app.APP_NAME)

    def pids() -> list[int]:
        return [shard["pid"] for shard in router.shards.remote().result(timeout_s=_SECONDS)]

    began = time.monotonic()
    undisturbed = asyncio.run(all_streams(url, count, tokens))
    took = time.monotonic() - began
    each = 1e3 * took / tokens
    print(f"undisturbed: {count} streams in {took:.1f} s, {each:.2f} ms a token", flush=True)
    failures = 0
    for turn in range(arguments.rounds):
        before = pids()
        rank = turn % len(before)
        found = asyncio.run(
            all_streams(url, count, tokens, lambda pid=before[rank]: os.kill(pid, signal.SIGKILL))
        )
        after = pids()
        wrong = differences(found, undisturbed, tokens)
        failures += len(wrong)
        pauses = [heard.longest_pause for heard in found]
        replaced = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        print(
            f"SIGKILL of shard {rank}: shards {replaced} are new; {len(wrong)} of {count} streams "
            f"wrong; paused {statistics.median(pauses):.2f} s, at most {max(pauses):.2f} s",
            *wrong[:4],
            sep="\n  ",
            flush=True,
        )
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1000)
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    # Workers find modules as this process does.
    os.environ["PYTHONPATH"] = ":".join(filter(None, sys.path))
    gpus = arguments.tp * arguments.pp if arguments.device == "cuda" else 0
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=gpus,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        failures = run(arguments)
    finally:
        serve.shutdown()
        ray.shutdown()
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
