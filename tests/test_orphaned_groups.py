"""What a router and its shards had reserved, once all of them were killed at once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

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


def named(prefix: str) -> set[str]:
    """The actors that Ray knows to live."""
    names = {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if name.startswith(prefix)}


async def kill(*actors: Any) -> None:
    """What the OOM killer does; returns once Ray knows."""
    before = len(named(""))
    for pid in await asyncio.gather(*(actor.pid.remote() for actor in actors)):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while len(named("")) > before - len(actors):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def start(name: str, namespace: str, group: Any = "DEFAULT") -> Any:
    placed = PlacementGroupSchedulingStrategy(group) if group != "DEFAULT" else group
    cpus = int(group != "DEFAULT")
    options = {"num_cpus": cpus, "scheduling_strategy": placed}
    return Process.options(name=name, namespace=namespace, **options).remote()


async def test_only_what_nobody_is_left_for_is_given_back() -> None:
    """Of four replicas the second loses its router, the third its shard, the last both."""
    routers = [start(f"router-{uuid4()}", "other") for _ in range(4)]
    groups = await asyncio.gather(
        *(router.reserve.remote(f"kept-{i}") for i, router in enumerate(routers))
    )
    shards = [start(f"kept-{i}/0/{uuid4()}", NAMESPACE, group) for i, group in enumerate(groups)]
    await kill(routers[1], routers[3], shards[2], shards[3])
    assert kept() == ["kept-0", "kept-1", "kept-2", "kept-3"]

    await free_orphaned_groups(looks=6, interval=0.5)
    assert kept() == ["kept-0", "kept-1", "kept-2"]


async def test_a_shard_that_comes_in_time_keeps_its_place() -> None:
    """As that of a router that has adopted the one before it, and lost it; and Ray may not know at
    first that a node died."""
    router = start(f"router-{uuid4()}", "other")
    freeing = asyncio.create_task(free_orphaned_groups(looks=1000, interval=1.0))
    group = await router.reserve.remote("kept-0")
    await kill(router)
    await asyncio.sleep(2.0)
    shard = start(f"kept-0/0/{uuid4()}", NAMESPACE, group)
    assert await shard.pid.remote()
    await asyncio.sleep(6.0)
    assert kept() == ["kept-0"]
    await kill(shard)
    deadline = time.monotonic() + PATIENCE
    while kept():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    freeing.cancel()
