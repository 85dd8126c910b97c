"""Shards as Ray actors: started, used over TCP, killed."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from helpers.tiny_models import directory

from tensorray.actors.config import ShardConfig
from tensorray.actors.link import ShardError
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan
from tensorray.actors.shard import Shard
from tensorray.actors.shard_actor import start_shard

pytestmark = pytest.mark.ray

CONFIG = ShardConfig(str(directory("llama3")), max_model_len=64, num_kv_blocks=64, num_threads=1)
PLAN = StepPlan(
    0, [0], [5], starts=[SequenceStart(0, [9, 8, 7, 6, 5], 5, 0, [[1]], Sampling(temperature=0.0))]
)


async def test_a_shard_actor_answers_like_a_shard_and_its_death_is_noticed_at_once(ray_cluster):
    shard = await start_shard(CONFIG)
    shard.link.send(PLAN)
    result = await shard.link.receive()
    assert result.tokens == Shard.load(CONFIG).execute(PLAN).tokens

    described = await shard.actor.describe.remote()
    assert described["peak_rss_bytes"] > 10 * 2**20
    waiting = asyncio.create_task(shard.link.receive())
    await asyncio.sleep(0)
    os.kill(described["pid"], signal.SIGKILL)
    with pytest.raises(ShardError, match="connection ended"):
        await asyncio.wait_for(waiting, 2)


async def test_a_shard_that_can_not_load_says_why(ray_cluster):
    missing = ShardConfig("/nonexistent/model")
    with pytest.raises(ShardError, match="/nonexistent/model"):
        await start_shard(missing)
