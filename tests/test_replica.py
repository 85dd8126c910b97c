"""Replicas of Ray actors: started, used, broken in every way, put right, adopted, orphaned."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
import ray
from helpers.tiny_models import directory

from tensorray.actors.config import ShardConfig
from tensorray.actors.link import ShardError
from tensorray.actors.placement import PlacementError
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan
from tensorray.actors.replica import Replica, Where
from tensorray.actors.shard import Shard

pytestmark = pytest.mark.ray

MODEL = str(directory("gemma3"))
PLAN = StepPlan(
    0,
    [0],
    [5],
    starts=[SequenceStart(0, [9, 8, 7, 6, 5], 5, 0, [[1], [2]], Sampling(temperature=0.0))],
)
PATIENCE = 180.0
WHERE = Where(timeout=PATIENCE, lease=PATIENCE)


def configs(tp: int = 1, pp: int = 1, **changes: Any) -> list[ShardConfig]:
    settings: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "num_kv_blocks": 64}
    settings |= {"num_threads": 1, "tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    settings |= changes
    return [ShardConfig(MODEL, **settings, rank=rank) for rank in range(tp * pp)]


def expected() -> list[int]:
    return Shard.load(configs()[0]).execute(PLAN).tokens


@asynccontextmanager
async def replica(shards: list[ShardConfig], name: str = "test") -> AsyncIterator[Replica]:
    opened = await Replica.open(name, shards, WHERE)
    try:
        yield opened
    finally:
        await opened.close()


async def first_tokens(link: Any) -> list[int]:
    link.send(PLAN)
    return list((await link.receive()).tokens)


async def until_gone(pids: list[int], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "shards live on"
        await asyncio.sleep(0.1)


async def test_a_shard_answers_like_one_in_this_process_and_its_death_is_noticed(
    ray_cluster: None,
) -> None:
    async with replica(configs()) as alone:
        link = await alone.connect()
        assert await first_tokens(link) == expected()
        (described,) = await alone.describe()
        assert described["peak_rss_bytes"] > 10 * 2**20
        waiting = asyncio.create_task(link.receive())
        await asyncio.sleep(0)
        os.kill(described["pid"], signal.SIGKILL)
        with pytest.raises(ShardError, match="connection ended"):
            await asyncio.wait_for(waiting, PATIENCE)


async def test_what_can_not_load_says_why_and_leaves_nothing(ray_cluster: None) -> None:
    with pytest.raises(ShardError, match="sizes that do: 1, 2, 4"):
        await Replica.open("bad", configs(tp=3), WHERE)
    missing = [ShardConfig("/nonexistent/model", device="cpu")]
    with pytest.raises(ShardError, match="/nonexistent/model"):
        await Replica.open("bad", missing, WHERE)
    deadline = time.monotonic() + PATIENCE
    while any(each.startswith("bad.") for each in names()):
        assert time.monotonic() < deadline, names()
        await asyncio.sleep(0.1)


def names() -> list[str]:
    return [
        each["name"]
        for each in ray.util.list_named_actors(all_namespaces=True)  # type: ignore[call-overload]
    ]


async def test_only_the_lost_shard_is_started_again(ray_cluster: None) -> None:
    async with replica(configs(tp=2, pp=2)) as four:
        link = await four.connect()
        assert await first_tokens(link) == expected()
        before = [each["pid"] for each in await four.describe()]
        for lost in (1, 2, 0):  # of each stage, the one that samples among them
            waiting = asyncio.create_task(link.receive())
            await asyncio.sleep(0)
            killed = time.monotonic()
            os.kill(before[lost], signal.SIGKILL)
            with pytest.raises(ShardError, match=f"rank {lost}: the shard's conn") as e:
                await asyncio.wait_for(waiting, PATIENCE)
            noticed = time.monotonic() - killed
            told: list[str] = []
            link = await four.recover(e.value, told.append)
            print(f"noticed after {noticed:.3f} s, back after {time.monotonic() - killed:.2f} s")
            assert f"rank {lost}" in told[0]
            after = [each["pid"] for each in await four.describe()]
            assert [rank for rank in range(4) if after[rank] != before[rank]] == [lost]
            assert await first_tokens(link) == expected()
            before = after


async def test_a_shard_that_fails_of_itself_is_started_again(ray_cluster: None) -> None:
    async with replica(configs(tp=2)) as pair:
        link = await pair.connect()
        link.send(StepPlan(0, [7], [1]))  # a sequence that nobody has heard of
        with pytest.raises(ShardError, match=r"rank \d: KeyError: 7") as e:
            await link.receive()
        link = await pair.recover(e.value, print)
        assert await first_tokens(link) == expected()


async def test_a_shard_that_hangs_is_started_again(ray_cluster: None) -> None:
    async with replica(configs(tp=2, collective_timeout_seconds=3.0)) as pair:
        link = await pair.connect()
        before = [each["pid"] for each in await pair.describe()]
        os.kill(before[0], signal.SIGSTOP)
        link.send(PLAN)
        asyncio.get_running_loop().call_later(60, link.fail, ShardError("no step for 60 s"))
        with pytest.raises(ShardError, match=r"rank 0 at .* has not answered for 3 s") as e:
            await link.receive()
        link = await pair.recover(e.value, print)
        after = [each["pid"] for each in await pair.describe()]
        assert after[0] != before[0]
        assert after[1] == before[1]
        assert await first_tokens(link) == expected()


async def test_the_next_router_adopts_what_the_last_one_left(ray_cluster: None) -> None:
    shards = configs(tp=2)
    first = await Replica.open("left", shards, WHERE)
    before = [each["pid"] for each in await first.describe()]
    other = await Replica.open("left", configs(), WHERE)  # the first one lives
    assert not {each["pid"] for each in await other.describe()} & set(before)
    await other.close()

    await abandon(first)
    os.kill(before[1], signal.SIGKILL)
    async with replica(shards, "left") as second:
        after = [each["pid"] for each in await second.describe()]
        assert after[0] == before[0]
        assert after[1] != before[1]
        assert await first_tokens(await second.connect()) == expected()
    await until_gone(after)


async def test_shards_that_nobody_adopts_end_themselves(free_cluster: None) -> None:
    where = Where(timeout=PATIENCE, lease=5.0)  # test_lease.py shows that a held one does not lapse
    orphans = await Replica.open("orphans", configs(tp=2), where)
    pids = [each["pid"] for each in await orphans.describe()]
    await abandon(orphans)
    await until_gone(pids)
    deadline = time.monotonic() + PATIENCE
    while ray.available_resources().get("CPU", 0) < 8:
        assert time.monotonic() < deadline, "the placement group is still there"
        await asyncio.sleep(0.1)


async def abandon(replica: Replica) -> None:
    """What a router's death does."""
    assert replica._link is not None
    await replica._link.close()
    for lease in replica._leases:
        assert lease is not None
        lease.close()


async def test_too_large_a_layout_is_refused_with_what_there_is(ray_cluster: None) -> None:
    with pytest.raises(PlacementError, match=r"room for 8 such shards\. It has .*: 8 CPU\. Add"):
        await Replica.open("large", configs(tp=4, pp=3), WHERE)


async def test_room_that_is_taken_is_waited_for_with_an_end(free_cluster: None) -> None:
    other = ray.util.placement_group([{"CPU": 6}])
    try:
        assert other.wait(PATIENCE)
        with pytest.raises(PlacementError, match=r"no room for 1 x 4 CPU within 1 s .*: 2 CPU"):
            await Replica.open("late", configs(tp=4), Where(timeout=1.0))
    finally:
        ray.util.remove_placement_group(other)
