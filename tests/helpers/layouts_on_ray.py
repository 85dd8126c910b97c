"""Runs layouts as Ray actors, on the cluster that RAY_ADDRESS names, and says what they generated.

A script, since the process that runs the tests keeps a connection to a cluster of its own:

    python -m helpers.layouts_on_ray '[["llama3", {"tensor_parallel_size": 2}]]'

prints, a line for each, the greedy tokens for the checkpoint's reference prompts, how clear each
choice was, and the nodes that the shards were on, by replica and rank.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import ray

from helpers.tiny_models import directory, references
from tensorray.actors.protocol import Sampling
from tensorray.actors.replica import Replica, Where
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Engine
from tensorray.cluster.frontend import EngineClient
from tensorray.cluster.generate import results_on_stdout
from tensorray.cluster.replicas import Replicas
from tensorray.cluster.request import GenerationRequest


async def run(name: str, layout: dict[str, Any]) -> dict[str, Any]:
    cases = references(name)
    config = EngineConfig(
        model=str(directory(name)),
        device="cpu",
        num_threads=1,
        max_model_len=max(len(case.prompt) for case in cases) + 16,
        block_size=4,
        num_kv_blocks=512,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        **layout,
    )
    shards = [config.shard(rank) for rank in range(config.num_shards)]
    count = config.data_parallel_size
    where = Where(timeout=300.0, lease=30.0, replicas=count)
    replicas = [await Replica.open(config.digest(), shards, where) for _ in range(count)]
    engines = []
    for replica in replicas:
        link = await replica.connect()
        engines.append(Engine(link, config.scheduler(link.info)))
        await engines[-1].start()
    client: EngineClient = Replicas(engines) if count > 1 else engines[0]

    async def one(index: int) -> tuple[list[int], list[float]]:
        prompt = cases[index].prompt.tolist()
        request = GenerationRequest(str(index), prompt, Sampling(temperature=0, logprobs=2), 16)
        tokens, margins = [], []
        async for deltas in client.generate(request):
            for delta in deltas:
                tokens += delta.tokens
                margins += [each.top_logprobs[0] - each.top_logprobs[1] for each in delta.logprobs]
        return tokens, margins

    found = await asyncio.gather(*map(one, range(len(cases))))
    nodes = [[each["node"] for each in await replica.describe()] for replica in replicas]
    for engine, replica in zip(engines, replicas, strict=True):
        await engine.close()
        await replica.close()
    tokens, margins = zip(*found, strict=True)
    return {"tokens": tokens, "margins": margins, "nodes": nodes}


async def main() -> None:
    with results_on_stdout() as results:
        ray.init(log_to_driver=False, logging_level="ERROR")
        # All at once: each waits until the cluster has room for it.
        asked = [run(name, layout) for name, layout in json.loads(sys.argv[1])]
        for found in await asyncio.gather(*asked):
            print(json.dumps(found), file=results, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
