"""The Ray actor that hosts a shard, and the router's way to start one."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
import ray.exceptions
import ray.util
from ray.actor import ActorHandle

from tensorray.actors.config import ShardConfig
from tensorray.actors.link import ShardError
from tensorray.actors.shard_host import ShardHost
from tensorray.actors.tcp_link import TcpLink
from tensorray.actors.wire import Endpoint

logger = logging.getLogger(__name__)


class ShardActor:
    """One shard in a process of its own. Ray starts, places and watches it; steps come over TCP."""

    def load(self, config: ShardConfig) -> Endpoint:
        """Load the shard and listen. Returns where the router connects, once it can serve.

        Not the constructor, because Ray hands a method's exception on as it is.
        """
        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._host = ShardHost(config, host)
        return self._host.loaded.steps

    def describe(self) -> dict[str, int]:
        """Process id and peak resident memory in bytes (0 where the platform does not tell)."""
        return {"pid": os.getpid(), "peak_rss_bytes": _peak_rss_bytes()}


class RunningShard:
    """A started shard: its actor, and the link that steps go over."""

    def __init__(self, actor: ActorHandle[ShardActor], link: TcpLink) -> None:
        self.actor = actor
        self.link = link

    async def close(self) -> None:
        await self.link.close()
        ray.kill(self.actor)


async def start_shard(config: ShardConfig) -> RunningShard:
    """Start a shard actor and connect to it. Returns once it has loaded and can serve.

    Raises ShardError with the shard's own reason when it can't come up.
    """
    threads = config.num_threads or os.cpu_count() or 1
    actor: Any = (
        ray.remote(ShardActor)
        .options(
            num_cpus=0 if config.device == "null" else 1,
            num_gpus=1 if _wants_gpu(config.device) else 0,
            max_restarts=0,
            # Ray sets OMP_NUM_THREADS=1 for actors with few CPUs; the shard's threads are its own.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        .remote()
    )
    try:
        endpoint = await actor.load.remote(config)
    except ray.exceptions.RayTaskError as error:
        ray.kill(actor)
        cause = getattr(error, "cause", error)
        raise ShardError(f"{type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayActorError as error:
        raise ShardError(f"the shard died while loading: {error}") from error
    return RunningShard(actor, await TcpLink.connect(endpoint))


def _wants_gpu(device: str) -> bool:
    """Whether the shard is to be placed on a GPU: if asked for, or where the cluster has any."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return device == "cuda" or (device == "auto" and found.get("GPU", 0) > 0)


def _peak_rss_bytes() -> int:
    try:
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return 0
