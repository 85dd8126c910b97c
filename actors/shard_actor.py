"""The Ray actor that hosts a shard."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TypedDict

import ray
import ray.util
from ray.util.placement_group import PlacementGroup

from tensorray.actors.adapter import Adapter
from tensorray.actors.config import ShardConfig
from tensorray.actors.lease import Lease
from tensorray.actors.shard_host import Loaded, ShardHost
from tensorray.actors.wire import Endpoint

logger = logging.getLogger(__name__)


class Description(TypedDict):
    """A process."""

    pid: int
    peak_rss_bytes: int  # 0 where the platform does not tell
    node: str  # Ray's id


class ShardActor:
    """One shard in a process of its own. Ray starts, places and watches it; steps come over TCP.

    It outlives its router, under a lease: see lease.py.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._lease = Lease(self._address, lease_seconds, _end)
        self._host: ShardHost | None = None

    def lease(self) -> Endpoint:
        """Where an owner takes the lease."""
        return self._lease.endpoint

    def group(self) -> PlacementGroup:
        """The placement group of its replica."""
        group = ray.util.get_current_placement_group()
        assert group is not None
        return group

    def load(self, config: ShardConfig) -> Loaded:
        """Load the shard and listen. Raises what loading raises."""
        self._host = ShardHost(config, self._address)
        return self._host.loaded

    def loaded(self) -> Loaded | None:
        """What `load` returned; None if it has not."""
        return None if self._host is None else self._host.loaded

    def join(self, epoch: int, members: Sequence[Endpoint], num_blocks: int) -> None:
        """See ShardHost.join."""
        assert self._host is not None
        self._host.join(epoch, members, num_blocks)

    def add_adapter(self, adapter: Adapter) -> None:
        """See StepExecutor.add_adapter."""
        assert self._host is not None
        self._host.add_adapter(adapter)

    def remove_adapter(self, id: int) -> None:
        """See StepExecutor.remove_adapter."""
        if self._host is not None:
            self._host.remove_adapter(id)

    def adapters(self) -> list[Adapter]:
        """Those that are loaded."""
        return [] if self._host is None else self._host.adapters()

    def describe(self) -> Description:
        return describe_process()


def describe_process() -> Description:
    """This process, which is a worker of Ray's."""
    return {
        "pid": os.getpid(),
        "peak_rss_bytes": _peak_rss_bytes(),
        "node": ray.get_runtime_context().get_node_id(),
    }


def _end() -> None:
    """End this process, and free what was reserved for its replica, which is as orphaned."""
    group = ray.util.get_current_placement_group()
    if group is not None:
        ray.util.remove_placement_group(group)
    os._exit(0)


def _peak_rss_bytes() -> int:
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return 0
