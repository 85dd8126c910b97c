"""On a cluster of four nodes: layouts across them, then what is left when parts of it are killed.

SIGKILL of a shard, of a node and of the router under 32 streams is a pause, and nothing is lost:
three rounds of each here, twenty in `make soak`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import openai
import pytest
from helpers.equality import assert_same_tokens
from helpers.heard import Heard
from helpers.ports import free_port
from helpers.ray_nodes import RayNodes, ray_nodes
from helpers.serve_process import Service, service
from helpers.tiny_models import directory, references

pytestmark = pytest.mark.ray

ROUNDS = int(os.environ.get("TENSORRAY_SOAK_ROUNDS", "3"))
STREAMS = 32
TOKENS = 80


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(4) as started:
        yield started


# --- layouts, a node a shard -------------------------------------------------------------------


def layout(tp: int = 1, pp: int = 1, dp: int = 1, ep: bool = False) -> dict[str, Any]:
    return {
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "data_parallel_size": dp,
        "enable_expert_parallel": ep,
    }


LAYOUTS = {
    "llama3 TP2": ("llama3", layout(tp=2)),
    "llama-biased TP4": ("llama-biased", layout(tp=4)),
    "qwen2 PP2": ("qwen2", layout(pp=2)),
    "gemma3 PP3": ("gemma3", layout(pp=3)),
    "gemma2 TP2xPP2": ("gemma2", layout(tp=2, pp=2)),
    "mixtral EP2": ("mixtral", layout(tp=2, ep=True)),
    "gpt2 DP2": ("gpt2", layout(dp=2)),
}


@pytest.fixture(scope="module")
def ran(nodes: RayNodes) -> dict[str, Any]:
    """What each layout generated, and where."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.layouts_on_ray", json.dumps(list(LAYOUTS.values()))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=400,
        env=nodes.environment(PYTHONPATH=":".join(filter(None, sys.path))),
    )
    return dict(zip(LAYOUTS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", LAYOUTS)
def test_shards_on_nodes_of_their_own_choose_the_tokens_of_one(
    ran: dict[str, Any], case: str
) -> None:
    name, asked = LAYOUTS[case]
    found = ran[case]
    for tokens, margins, expected in zip(
        found["tokens"], found["margins"], references(name), strict=True
    ):
        assert_same_tokens(tokens, expected.greedy.tolist(), margins)
    shards = [node for replica in found["nodes"] for node in replica]
    assert len(shards) == prod(int(value) for key, value in asked.items() if "size" in key)
    assert len(set(shards)) == len(shards)  # a node has one CPU


# --- recovery ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(nodes: RayNodes) -> Iterator[Service]:
    settings = {
        "model": str(directory("gemma3")),
        "served_model_name": ["tiny"],
        "device": "cpu",
        "num_threads": 1,
        "tensor_parallel_size": 2,
        "block_size": 8,
        "num_kv_blocks": 2048,
        "max_num_seqs": STREAMS,
        "shard_lease_seconds": 30,
    }
    with service(nodes, free_port(), **settings) as started:
        yield started


async def listen(client: openai.AsyncOpenAI, number: int, first: asyncio.Event) -> Heard:
    stream = await client.completions.create(
        model="tiny",
        prompt=[3 + (number * 7 + i) % 200 for i in range(4 + number % 5)],
        max_tokens=TOKENS,
        temperature=0,
        logprobs=2,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    heard = Heard()
    async for chunk in stream:
        heard.pause_ends()
        (choice,) = chunk.choices
        if choice.logprobs is not None:
            heard.hear(choice.logprobs.tokens, choice.logprobs.top_logprobs)
            first.set()
        heard.finish_reason = choice.finish_reason
    return heard


async def all_streams(port: int, kill: Any = None) -> list[Heard]:
    """All streams at once; `kill` is called once each has had a token."""
    url = f"http://127.0.0.1:{port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=400) as client:
        firsts = [asyncio.Event() for _ in range(STREAMS)]
        tasks = [asyncio.create_task(listen(client, i, first)) for i, first in enumerate(firsts)]
        if kill is not None:
            await asyncio.gather(*(first.wait() for first in firsts))
            # A machine that is slow to let the last ones in may have answered the first by now.
            assert sum(task.done() for task in tasks) < STREAMS // 2
            await asyncio.to_thread(kill)
        return list(await asyncio.gather(*tasks))


@pytest.fixture(scope="module")
def undisturbed(running: Service) -> list[Heard]:
    heard = asyncio.run(all_streams(running.port))
    assert all(len(each.tokens) == TOKENS for each in heard)
    assert len({tuple(each.tokens) for each in heard}) > STREAMS // 2
    return heard


def kill_shard(running: Service, nodes: RayNodes, turn: int) -> None:
    os.kill(running.shards()[turn % 2]["pid"], signal.SIGKILL)


def kill_node(running: Service, nodes: RayNodes, turn: int) -> None:
    shards = [shard["node"] for shard in running.shards()]
    nodes.kill(next(node for node in nodes.nodes[1:] if node in shards))


def kill_router(running: Service, nodes: RayNodes, turn: int) -> None:
    os.kill(running.router()["pid"], signal.SIGKILL)


@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("kill", [kill_shard, kill_node, kill_router])
def test_no_request_is_lost_and_no_token_repeated_or_skipped(
    running: Service, nodes: RayNodes, undisturbed: list[Heard], kill: Any, turn: int
) -> None:
    before = [shard["pid"] for shard in running.shards()]
    found = asyncio.run(all_streams(running.port, lambda: kill(running, nodes, turn)))
    after = [shard["pid"] for shard in running.shards()]
    for heard, expected in zip(found, undisturbed, strict=True):
        assert heard.finish_reason == "length"
        assert len(heard.tokens) == TOKENS
        assert_same_tokens(heard.tokens, expected.tokens, expected.margins)  # type: ignore[arg-type]
    replaced = sum(old != new for old, new in zip(before, after, strict=True))
    assert replaced == (0 if kill is kill_router else 1)
    pauses = [heard.longest_pause for heard in found]
    print(f"\n{kill.__name__}: paused {np.median(pauses):.2f} s, at most {max(pauses):.2f} s")
    if kill is kill_node:
        nodes.add()
