"""Where a replica's shards go: one placement group a replica.

The shards of a pipeline stage talk to each other many times a layer and to other stages once a
step. So a stage is one bundle, which Ray never splits over nodes, wherever any node is large enough
for it; else each shard is a bundle of its own. Stages are packed onto few nodes or spread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import ray
import ray.util
from ray.util.placement_group import PlacementGroup

from tensorray.actors.orphaned_groups import free_in_background, group_name

logger = logging.getLogger("ray.serve")

_WARN_SECONDS = 30.0

Strategy = Literal["pack", "spread"]
Resources = Mapping[str, float]


class PlacementError(RuntimeError):
    """The cluster has no room for the layout; says what it has."""


@dataclass(frozen=True)
class Placement:
    """What to ask Ray for: bundles, and which of them each rank is in."""

    bundles: tuple[dict[str, float], ...]
    bundle_of: tuple[int, ...]  # by rank
    strategy: str  # Ray's


def needs(device: str, accelerator_type: str | None, cluster: Resources) -> dict[str, float]:
    """What one shard takes. A null device computes nothing and takes next to nothing."""
    if device == "null":
        return {"CPU": 0.001}
    if device == "cuda" or (device == "auto" and cluster.get("GPU", 0) > 0):
        found = {"CPU": 1.0, "GPU": 1.0}
    else:
        found = {"CPU": 1.0}
    if accelerator_type is not None:
        found[f"accelerator_type:{accelerator_type}"] = 0.001
    return found


def choose_placement(
    nodes: Mapping[str, Resources],
    need: Resources,
    *,
    stages: int,
    shards_a_stage: int,
    replicas: int = 1,
    strategy: Strategy = "pack",
) -> Placement:
    """Bundles for one of `replicas` replicas on nodes with these total resources.

    Raises PlacementError, at once, if the nodes can't hold all replicas even when nothing else
    runs on them.
    """
    stage = {name: amount * shards_a_stage for name, amount in need.items()}
    by_stage = replicas * stages <= sum(_fits(total, stage) for total in nodes.values())
    shards = stages * shards_a_stage
    if not by_stage:
        room = sum(_fits(total, need) for total in nodes.values())
        if room < replicas * shards:
            raise PlacementError(
                f"{_count(replicas, 'replica')} of {_count(shards, 'shard')} "
                f"({stages} x {shards_a_stage}), each with {_list(need)}: the cluster has room for "
                f"{room} such shards. It has {_describe(nodes)}. Add nodes, or lower "
                "--tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size"
            )
        if shards_a_stage > 1:
            logger.warning(
                "no node has room for a stage of %d shards: they will be on several nodes, and "
                "their sums cross the network",
                shards_a_stage,
            )
    share = stage if by_stage else dict(need)
    count = stages if by_stage else shards
    each = shards // count
    return Placement(
        bundles=tuple(dict(share) for _ in range(count)),
        bundle_of=tuple(rank // each for rank in range(shards)),
        strategy="STRICT_PACK" if count == 1 else strategy.upper(),
    )


def cluster_resources() -> dict[str, float]:
    """What the live nodes have in all."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def cluster_nodes() -> dict[str, dict[str, float]]:
    """The live nodes' total resources, by address and id."""
    return {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": node["Resources"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }


async def reserve(placement: Placement, replica: str, timeout: float) -> PlacementGroup:
    """The placement group, once its bundles are reserved. It outlives this process.

    `replica` is what its shards' names begin with. Frees what dead replicas have left reserved.
    Warns every half a minute while other work is in the way. Raises PlacementError after `timeout`
    seconds.
    """
    group: PlacementGroup = ray.util.placement_group(
        list(placement.bundles),
        strategy=placement.strategy,
        name=group_name(replica),
        lifetime="detached",
    )
    free_in_background()
    waited = 0.0
    while True:
        step = min(_WARN_SECONDS, timeout - waited)
        if await asyncio.to_thread(group.wait, step):
            return group
        waited += step
        wanted = f"{len(placement.bundles)} x {_list(placement.bundles[0])}"
        free = _list(ray.available_resources())  # type: ignore[no-untyped-call]
        if waited >= timeout:
            ray.util.remove_placement_group(group)
            raise PlacementError(
                f"no room for {wanted} within {timeout:g} s ({placement.strategy}); free in the "
                f"cluster: {free}. Stop what else runs on it, add nodes, or wait longer "
                "(--placement-timeout-seconds)"
            )
        logger.warning(
            "waiting for room for %s since %.0f s; free in the cluster: %s", wanted, waited, free
        )


def _fits(total: Resources, need: Resources) -> int:
    """How many times a node has what is needed."""
    return min(int(total.get(name, 0.0) / amount + 1e-6) for name, amount in need.items())


def _describe(nodes: Mapping[str, Resources]) -> str:
    return "; ".join(f"{name}: {_list(total)}" for name, total in nodes.items()) or "no nodes"


def _list(resources: Resources) -> str:
    """Amounts of what a user can count."""
    shown: Sequence[str] = [
        f"{amount:g} {name}"
        for name, amount in resources.items()
        if name in ("CPU", "GPU") or name.startswith("accelerator_type:")
    ]
    return ", ".join(shown) or "nothing"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
