"""Placement groups that nobody is left for.

A replica's group is detached, as its shards outlive their router. What is left of a replica gives
the group back: its router, or the last of its shards, whose lease lapses. Where all of them are
killed at once, nobody is; so whoever reserves room looks for such groups too. A group's name says
which actors to look for: its shards, by what their names begin with, and who reserved it.

A router that has adopted shards is not in the name of their group. So a group is taken for orphaned
only if it is without actors in look after look, for longer than it takes to replace lost shards.
Looking goes on for minutes, as Ray may take that long to know of a node's death.
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
_INTERVAL = 5.0  # seconds between looks
_LOOKS = 60
_ORPHANED = 5  # looks in turn at which a group has to be without anyone

_running: set[asyncio.Task[None]] = set()  # asyncio itself keeps no task alive


def group_name(replica: str) -> str:
    """What to call the group of shards whose names begin with `replica` and a slash."""
    owner = ray.get_runtime_context().get_actor_name()
    return f"{_PREFIX}/{replica}/{owner or ''}"


def free_in_background() -> None:
    """Free orphaned groups for some minutes. Needs a running event loop."""
    task = asyncio.get_running_loop().create_task(free_orphaned_groups())
    _running.add(task)
    task.add_done_callback(_running.discard)


async def free_orphaned_groups(looks: int = _LOOKS, interval: float = _INTERVAL) -> None:
    """Remove the cluster's groups that have nobody, until so many looks were taken."""
    seen: dict[str, int] = {}  # looks in turn, by the group's id
    for _ in range(looks):
        try:
            orphaned = await asyncio.to_thread(_orphaned)
            seen = {id: 1 + seen.get(id, 0) for id in orphaned}
            for id, owner in orphaned.items():
                if seen[id] >= _ORPHANED:
                    logger.warning("freeing what %s had reserved: it and its shards died", owner)
                    await asyncio.to_thread(_remove, id)
        except ray.exceptions.RayError as error:
            logger.warning("could not look for placement groups without owner: %s", error)
        await asyncio.sleep(interval)


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


def _remove(id: str) -> None:
    ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(id)))
