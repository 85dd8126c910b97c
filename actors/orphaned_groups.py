"""Placement groups that nobody is left for.

A replica's group is detached, as its shards outlive their router. What is left of a replica gives
the group back: its router, or the last of its shards, whose lease lapses. Where all of them are
killed at once, nobody is; so whoever reserves room looks for such groups too. A group's name says
which actors to look for: its shards, by what their names begin with, and who reserved it.

A router that has adopted shards is not in the name of their group, so a group is only taken for
orphaned if it has no shards for longer than it takes to replace lost ones.
"""

from __future__ import annotations

import asyncio
import logging

import ray
import ray.exceptions
import ray.util
from ray.util.placement_group import PlacementGroup, placement_group_table

logger = logging.getLogger("ray.serve")

#: Of the shards' actors.
NAMESPACE = "tensorray"

_PREFIX = "tensorray"
_SECONDS = 20.0  # that a group has to be without anyone

_running: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive


def group_name(replica: str) -> str:
    """What to call the group of shards whose names begin with `replica` and a slash."""
    owner = ray.get_runtime_context().get_actor_name()
    return f"{_PREFIX}/{replica}/{owner or ''}"


def free_in_background() -> None:
    """Start to free orphaned groups. Needs a running event loop."""
    task = asyncio.get_running_loop().create_task(_free_or_warn())
    _running.add(task)
    task.add_done_callback(_running.discard)


async def free_orphaned_groups(seconds: float = _SECONDS) -> None:
    """Remove all of the cluster's groups that have nobody for so long."""
    before = await asyncio.to_thread(_orphaned)
    if not before:
        return
    await asyncio.sleep(seconds)
    for id, name in (await asyncio.to_thread(_orphaned)).items():
        if id in before:
            logger.warning("freeing what %s had reserved, as it and its shards have died", name)
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(id)))


async def _free_or_warn() -> None:
    try:
        await free_orphaned_groups()
    except ray.exceptions.RayError as error:
        logger.warning("could not look for placement groups without owner: %s", error)


def _orphaned() -> dict[str, str]:
    """The groups that have nobody just now, by id: who reserved each."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    alive = {each["name"] for each in actors}  # an actor does not know its namespace
    shards = [each["name"] for each in actors if each["namespace"] == NAMESPACE]
    replicas = {name.partition("/")[0] for name in shards}
    found = {}
    for id, group in placement_group_table().items():
        prefix, _, rest = group["name"].partition("/")
        if prefix == _PREFIX and group["state"] != "REMOVED":
            replica, _, owner = rest.partition("/")
            # Of an owner that has no name, as a driver has none, nobody can tell.
            if owner and owner not in alive and replica not in replicas:
                found[id] = owner
    return found
