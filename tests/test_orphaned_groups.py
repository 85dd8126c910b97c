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
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tensorray.actors.orphaned_groups import NAMESPACE, free_orphaned_groups
from tensorray.actors.placement import Placement, reserve
from tests.helpers.reservations import give_back, reserved

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
    give_back("/kept-")


def kept() -> list[str]:
    """The replicas that have something reserved."""
    return sorted(name.split("/")[1] for name in reserved("/kept-").values())


def living() -> int:
    """How many named actors live, as far as Ray knows."""
    return len(ray.util.list_named_actors(all_namespaces=True))


async def kill(*actors: Any) -> None:
    """What the OOM killer does; returns once Ray knows."""
    before = living()
    for pid in await asyncio.gather(*(actor.pid.remote() for actor in actors)):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while living() > before - len(actors):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def start_router() -> Any:
    return Process.options(name=f"router-{uuid4()}", namespace="other").remote()


def start_shard(replica: str, group: PlacementGroup) -> Any:
    return Process.options(
        name=f"{replica}/0/{uuid4()}",
        namespace=NAMESPACE,
        num_cpus=1,
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    ).remote()


async def test_only_what_nobody_is_left_for_is_given_back() -> None:
    """Of four replicas the second loses its router, the third its shard, the last both."""
    routers = [start_router() for _ in range(4)]
    groups = await asyncio.gather(
        *(router.reserve.remote(f"kept-{i}") for i, router in enumerate(routers))
    )
    shards = [start_shard(f"kept-{i}", group) for i, group in enumerate(groups)]
    await kill(routers[1], routers[3], shards[2], shards[3])
    assert kept() == ["kept-0", "kept-1", "kept-2", "kept-3"]

    await free_orphaned_groups(looks=6, interval=0.5)
    assert kept() == ["kept-0", "kept-1", "kept-2"]


async def test_a_shard_that_comes_in_time_keeps_its_place() -> None:
    """As that of a router that has adopted the one before it, and lost it; and Ray may not know at
    first that a node died."""
    router = start_router()
    freeing = asyncio.create_task(free_orphaned_groups(looks=1000, interval=1.0))
    group = await router.reserve.remote("kept-0")
    await kill(router)
    await asyncio.sleep(2.0)
    shard = start_shard("kept-0", group)
    assert await shard.pid.remote()
    await asyncio.sleep(6.0)
    assert kept() == ["kept-0"]
    await kill(shard)
    deadline = time.monotonic() + PATIENCE
    while kept():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    freeing.cancel()
