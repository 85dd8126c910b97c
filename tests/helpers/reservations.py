"""What is reserved on the Ray cluster that this process is connected to."""

from __future__ import annotations

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table


def reserved(part: str = "") -> dict[str, str]:
    """The names of placement groups, by id, that have this in them."""
    return {
        id: group["name"]
        for id, group in placement_group_table().items()
        if group["state"] != "REMOVED" and part in group["name"]
    }


def give_back(part: str = "") -> None:
    """Remove all placement groups whose names have this in them."""
    for id in reserved(part):
        ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(id)))
