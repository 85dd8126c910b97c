"""A shard where it lives: loaded once, then joined to its peers and served to a router, each anew
after a failure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from tensorray.actors.adapter import Adapter
from tensorray.actors.communicator import Alone, Communicator
from tensorray.actors.config import ShardConfig
from tensorray.actors.link import StepExecutor
from tensorray.actors.null_shard import NullShard
from tensorray.actors.protocol import ShardInfo
from tensorray.actors.tcp_link import ShardServer
from tensorray.actors.wire import Endpoint

if TYPE_CHECKING:
    from tensorray.actors.guidance import Guidance
    from tensorray.actors.host_communicator import HostCommunicator
    from tensorray.actors.kv_door import KVDoor

# How long a step may take to end once its router is gone or its peers have failed.
_SETTLE_SECONDS = 30.0


def load_executor(config: ShardConfig, gpu: int = 0) -> StepExecutor:
    """The shard a config asks for, loaded in this process; `gpu` counts those it sees."""
    if config.device == "null":
        return NullShard.from_config(config)
    # Imported here so that a null device needs neither the model code nor its libraries.
    if config.device in ("auto", "cuda"):
        from tensorray.actors.device import CudaDevice, find_device, has_devices

        # Shards of one replica can't be on different kinds of device: one that can't use its GPU
        # has to say so.
        with_others = config.layout.size > 1 and has_devices()
        device = CudaDevice(gpu) if config.device == "cuda" or with_others else find_device(gpu)
        if device is not None:
            from tensorray.actors.gpu_shard import GpuShard

            device.own_sums = not config.disable_custom_all_reduce
            return GpuShard.load(config, device)
    for flag, wanted in (
        ("--segment-backend tensorrt", config.segment_backend == "tensorrt"),
        ("--build-plans", config.build_plans),
    ):
        if wanted:
            raise ValueError(f"{flag}: plans run on a GPU, and the shard has none")
    from tensorray.actors.shard import Shard

    return Shard.load(config)


class Loaded(msgspec.Struct, frozen=True):
    """What a shard says once it is loaded: where its router and its peers find it."""

    steps: Endpoint
    peers: Endpoint
    info: ShardInfo


class ShardHost:
    """A loaded shard and its two doors."""

    def __init__(self, config: ShardConfig, host: str = "127.0.0.1", gpu: int = 0) -> None:
        # Not imported where a lone null device needs no arrays.
        from tensorray.actors.host_communicator import MeetingPoint

        self._config = config
        self._executor = load_executor(config, gpu)
        self._meeting = MeetingPoint(host)
        self._server = ShardServer(self._executor, host)
        self._world: HostCommunicator | None = None
        self._door: KVDoor | None = None
        if config.device != "null":
            from tensorray.actors.kv_door import KVDoor, Pages

            if isinstance(self._executor, Pages):
                self._door = KVDoor(self._executor, host)
        guidance: Guidance | None = getattr(self._executor, "guidance", None)
        if guidance is not None:
            guidance.prepare()

    @property
    def loaded(self) -> Loaded:
        return Loaded(self._server.endpoint, self._meeting.endpoint, self._executor.info)

    @property
    def has_router(self) -> bool:
        return self._server.has_router

    def join(self, epoch: int, members: Sequence[Endpoint], num_blocks: int) -> None:
        """Take its place among the replica's shards, whose endpoints for peers are `members`.

        A later epoch replaces the one before. The router connects once all shards have joined.
        Raises CommunicatorError naming a peer that does not come.
        """
        self._executor.interrupt("its replica starts anew")
        if not self._server.settled(_SETTLE_SECONDS):
            raise RuntimeError(f"a step has not ended for {_SETTLE_SECONDS:g} s")
        if self._world is not None:
            self._world.close()
            self._world = None
        world: Communicator = Alone()
        if len(members) > 1:
            world = self._world = self._meeting.join(
                self._config.rank,
                members,
                epoch=epoch,
                timeout=self._config.collective_timeout_seconds,
            )
        doors = [] if self._door is None else [self._door.renew()]
        self._executor.join(world, num_blocks)
        self._executor.info = msgspec.structs.replace(self._executor.info, doors=doors)

    def add_adapter(self, adapter: Adapter) -> None:
        """See StepExecutor.add_adapter."""
        self._executor.add_adapter(adapter)

    def remove_adapter(self, id: int) -> None:
        """See StepExecutor.remove_adapter."""
        self._executor.remove_adapter(id)

    def adapters(self) -> list[Adapter]:
        """See StepExecutor.adapters."""
        return self._executor.adapters()

    def close(self) -> None:
        self._executor.interrupt("closed")
        if self._door is not None:
            self._door.close()
        self._server.close()
        self._meeting.close()
        if self._world is not None:
            self._world.close()
