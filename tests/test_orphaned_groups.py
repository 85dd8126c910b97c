"""What a router and its shards had reserved, once all of them were killed at once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tensorray.actors.orphaned_groups import NAMESPACE, free_orphaned_groups
from tensorray.actors.placement import Placement, reserve

pytestmark = pytest.mark.ray

PATIENCE = 60.0


@ray.remote(num_cpus=0)
class Process:
    """A router or a shard, as far as Ray sees them."""

    def pid(self) -> int:
        return os.getpid()

    async def reserve(self, replica: str) -> Any:
        return await reserve(Placement(({"CPU": 2.0},), (0,), "STRICT_PACK"), replica, PATIENCE)


@pytest.fixture(autouse=True)
def nothing_left(free_cluster: None) -> Iterator[None]:
    yield
    for id, group in placement_group_table().items():
        if "/kept-" in group["name"]:
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(id)))


def kept() -> list[str]:
    """The replicas that have something reserved."""
    table = placement_group_table().values()
    names = [group["name"] for group in table if group["state"] != "REMOVED"]
    return sorted(name.split("/")[1] for name in names if "/kept-" in name)


async def kill(*actors: Any) -> None:
    for pid in await asyncio.gather(*(actor.pid.remote() for actor in actors)):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    for actor in actors:
        while True:
            try:
                await actor.pid.remote()
            except ray.exceptions.RayActorError:
                break
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)


async def test_only_what_nobody_is_left_for_is_given_back() -> None:
    """Of four replicas the second loses its router, the third its shard, the last both."""
    routers = [Process.options(name=f"router-{i}", namespace="other").remote() for i in range(4)]
    groups = await asyncio.gather(
        *(router.reserve.remote(f"kept-{i}") for i, router in enumerate(routers))
    )
    shards = [
        Process.options(
            name=f"kept-{i}/0/{i}",
            namespace=NAMESPACE,
            num_cpus=1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        ).remote()
        for i, group in enumerate(groups)
    ]
    await kill(routers[1], routers[3], shards[2], shards[3])
    assert kept() == ["kept-0", "kept-1", "kept-2", "kept-3"]

    await free_orphaned_groups(seconds=1.0)
    assert kept() == ["kept-0", "kept-1", "kept-2"]


async def test_a_shard_that_comes_in_time_keeps_its_place() -> None:
    """As that of a router that has adopted the one before it, and lost it."""
    router = Process.options(name="router", namespace="other").remote()
    group = await router.reserve.remote("kept-0")
    await kill(router)
    freeing = asyncio.create_task(free_orphaned_groups(seconds=3.0))
    await asyncio.sleep(1.0)
    placed = PlacementGroupSchedulingStrategy(group)
    shard = Process.options(
        name="kept-0/0/1", namespace=NAMESPACE, num_cpus=1, scheduling_strategy=placed
    ).remote()
    await freeing
    assert kept() == ["kept-0"]
    assert await shard.pid.remote()
