"""SIGKILL parts of a service under running streams, and say what the streams' readers saw.

    python tests/soak/kills.py [--device cuda] [--tp 2] [--pp 1] [--kill shard,node,router]
        [--rounds 4] [--streams 32] [--tokens 1000]

A service on a Ray cluster of its own, of a head and a node for each shard (with a GPU each, on a
GPU), and a small model of random weights in float32. Each round kills one part once every stream
has had a token: a shard; a node, that is its raylet and all it had started, whose place another
takes at once; the router. What each stream got, over the pause, is held against what it gets when
nothing happens. Ends with status 1 if a token was lost, repeated or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import aiohttp
import psutil
import ray
from helpers.equality import assert_same_tokens
from helpers.heard import Heard
from helpers.ports import agent_ports, free_port
from helpers.ray_nodes import HEALTH_CHECKS, add_node
from helpers.serve_process import keep_on_head
from helpers.tiny_models import directory
from ray import serve
from ray.cluster_utils import Cluster

from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig

_SECONDS = 120.0


async def listen(
    session: aiohttp.ClientSession, url: str, number: int, tokens: int, first: asyncio.Event
) -> Heard:
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
        heard = Heard()
        async for line in answer.content:
            data = line.removeprefix(b"data:").strip()
            if data in (b"", b"[DONE]"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"])
            heard.pause_ends()
            (choice,) = event["choices"]
            if choice["logprobs"] is not None:
                heard.hear(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"])
                first.set()
            heard.finish_reason = choice["finish_reason"]
    return heard


async def all_streams(url: str, count: int, tokens: int, ready: Callable[[], None]) -> list[Heard]:
    """All streams at once; `ready` is called once each has had a token."""
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
        await asyncio.wait_for(asyncio.gather(*(first.wait() for first in firsts)), _SECONDS)
        print(f"{sum(not task.done() for task in tasks)} of {count} streams run", flush=True)
        ready()
        return list(await asyncio.gather(*tasks))


def streams(
    url: str, count: int, tokens: int, kill: Callable[[], None] = lambda: None
) -> list[Heard]:
    """What all streams hear, on a thread of their own; `kill` is called once each has had a token,
    on this one, since Ray starts nodes on a process's first only."""
    with ThreadPoolExecutor(1) as others:
        ready = threading.Event()
        heard = others.submit(asyncio.run, all_streams(url, count, tokens, ready.set))
        heard.add_done_callback(lambda _: ready.set())  # also if they failed
        ready.wait()
        if not heard.done():
            kill()
        return heard.result()


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


class Nodes:
    """A head, which has neither shards nor anything that is killed but the router, and a node for
    each shard."""

    def __init__(self, shards: int, device: str) -> None:
        self._gpus = device == "cuda"
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "num_gpus": 0,
                "include_dashboard": False,
                **agent_ports(),
                "object_store_memory": 100 << 20,
                "_system_config": HEALTH_CHECKS,
            },
        )
        self.address: str = self._cluster.address
        self._nodes = [self._add(number) for number in range(shards)]
        self._cluster.wait_for_nodes(_SECONDS)

    def _add(self, number: int) -> Any:
        environment = {"CUDA_VISIBLE_DEVICES": _gpus()[number]} if self._gpus else {}
        return add_node(
            self._cluster,
            num_cpus=1,
            num_gpus=int(self._gpus),
            object_store_memory=100 << 20,
            env_vars=environment,
        )

    def replace(self, id: str) -> None:
        """SIGKILL a node, and start another in its place."""
        (number,) = (i for i, node in enumerate(self._nodes) if node.node_id == id)
        node = self._nodes[number]
        (raylet,) = node.all_processes["raylet"]
        for process in psutil.Process(raylet.process.pid).children(recursive=True):
            process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes[number] = self._add(number)

    def stop(self) -> None:
        self._cluster.shutdown()


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA calls them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    return visible.split(",")


def run(arguments: Any, nodes: Nodes) -> int:
    """The number of streams that went wrong."""
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
    keep_on_head()
    app.run(config, port=port, blocking=False)
    print(f"up after {time.monotonic() - began:.1f} s", flush=True)
    url = f"http://127.0.0.1:{port}"
    router = serve.get_deployment_handle("Router", app.APP_NAME)

    def shards() -> list[dict[str, Any]]:
        return router.shards.remote().result(timeout_s=_SECONDS)  # type: ignore[no-any-return]

    began = time.monotonic()
    undisturbed = streams(url, count, tokens)
    took = time.monotonic() - began
    each = 1e3 * took / tokens
    print(f"undisturbed: {count} streams in {took:.1f} s, {each:.2f} ms a token", flush=True)
    failures = 0
    for what in arguments.kill.split(","):
        for turn in range(arguments.rounds):
            before = shards()
            rank = turn % len(before)
            part = before[rank]
            if what == "router":
                part = router.process.remote().result(timeout_s=_SECONDS)
            kill = partial(os.kill, part["pid"], signal.SIGKILL)
            if what == "node":
                kill = partial(nodes.replace, part["node"])
            found = streams(url, count, tokens, kill)
            after = shards()
            wrong = differences(found, undisturbed, tokens)
            failures += len(wrong)
            pauses = [heard.longest_pause for heard in found]
            pids = [(old["pid"], new["pid"]) for old, new in zip(before, after, strict=True)]
            replaced = [i for i, (old, new) in enumerate(pids) if old != new]
            if replaced != ([] if what == "router" else [rank]):
                failures += 1
                wrong.append(f"shards {replaced} are new")
            print(
                f"SIGKILL of {what}{'' if what == 'router' else f' {rank}'}: shards {replaced} are "
                f"new; {len(wrong)} of {count} streams wrong; paused "
                f"{statistics.median(pauses):.2f} s, at most {max(pauses):.2f} s",
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
    parser.add_argument("--kill", default="shard,node,router", help="in this order")
    parser.add_argument("--rounds", type=int, default=4, help="of each")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1000)
    arguments = parser.parse_args()
    if unknown := {*arguments.kill.split(",")} - {"shard", "node", "router"}:
        parser.error(f"--kill: {', '.join(unknown)} is none of shard, node and router")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    # Workers find modules as this process does.
    os.environ["PYTHONPATH"] = ":".join(filter(None, sys.path))
    nodes = Nodes(arguments.tp * arguments.pp, arguments.device)
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        try:
            failures = run(arguments, nodes)
        finally:
            serve.shutdown()
            ray.shutdown()
    finally:
        nodes.stop()
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
