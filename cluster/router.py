"""The router: a Serve deployment each of whose replicas is one engine over its shards.

Serve starts, watches and replaces it. Requests do not pass through Serve: ingress replicas ask for
the endpoint and talk to the engine over a connection of their own (engine_link.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import ray
from ray import serve

from tensorray.actors.adapter import Adapter
from tensorray.actors.protocol import ShardInfo
from tensorray.actors.replica import Replica, Where
from tensorray.actors.segment_table import table
from tensorray.actors.shard_actor import Description, describe_process
from tensorray.cluster import request_log
from tensorray.cluster.adapters import EngineAdapters
from tensorray.cluster.autoscaling import METRIC, target_tokens
from tensorray.cluster.backend import EngineStatus, ShardStatus
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Busy, Engine
from tensorray.cluster.engine_link import EngineServer
from tensorray.cluster.fleet import LocalDoor
from tensorray.cluster.idle_watch import IdleWatch
from tensorray.cluster.metrics import EngineMetrics
from tensorray.cluster.replica_number import replica_number
from tensorray.cluster.routers import RouterAddress

logger = logging.getLogger("ray.serve")


class Router:
    """One engine. The constructor returns when its shards have loaded; Serve awaits it.

    It takes over the shards that a router before it has left behind.
    """

    async def __init__(  # type: ignore[misc]
        self, config: EngineConfig, role: str = ""
    ) -> None:
        """`role` tells its metrics from those of another deployment's routers."""
        request_log.set_up(config.log_format)
        where = Where(
            accelerator_type=config.accelerator_type,
            strategy=config.placement_strategy,
            timeout=config.placement_timeout_seconds,
            lease=config.shard_lease_seconds,
            replicas=config.min_replicas + config.prefill_replicas,
        )
        shards = [config.shard(rank) for rank in range(config.num_shards)]
        self._replica = await Replica.open(config.digest(), shards, where)
        try:
            adapters = await _adapters(config, self._replica)
        except BaseException:
            await self._replica.close()
            raise
        link = await self._replica.connect()
        self._number = f"{role}{replica_number()}"
        self._metrics = EngineMetrics(config.names()[0], engine=self._number)
        self._engine = Engine(
            link,
            config.scheduler(link.info),
            observer=self._metrics,
            recover=self._replica.recover,
            rest=self._replica if config.enable_sleep_mode else None,
            idle_seconds=config.idle_timeout_seconds,
            hold_seconds=config.handover_timeout_seconds,
            adapters=adapters,
        )
        self._metrics.watch(self._engine)
        self._model = config.model_digest()
        self._target_tokens = target_tokens(config)
        self._drain_timeout = config.drain_timeout_seconds
        self._step_timeout = config.step_timeout_seconds
        self._stall = config.stall_seconds
        self._watch = IdleWatch(self._replica.look, self._stall)
        self._server = EngineServer(self._engine)
        await self._engine.start()
        await self._server.start(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        info = self._engine.info
        logger.info(
            "serving %s on %s: context %d, %d KV blocks of %d tokens, loaded in %.1f s",
            config.model,
            info.device,
            info.max_model_len,
            info.kv.num_blocks - 1,
            info.kv.block_size,
            info.load_seconds,
        )
        if info.segments:
            logger.info("what runs its segments, by the number of rows:\n%s", table(info.segments))

    # Ingresses name the replica that they ask: see routers.ToReplica.

    async def address(self, replica: str | None = None) -> RouterAddress:
        """Where ingress replicas connect, with the secret to say, and what is served there."""
        _check_name(replica)
        max_model_len = self._engine.info.max_model_len
        return RouterAddress(self._server.endpoint, self._model, max_model_len)

    async def info(self) -> ShardInfo:
        return self._engine.info

    async def failure(self, replica: str | None = None) -> str | None:
        """Why the engine can't serve, for good or for now; None while it can."""
        _check_name(replica)
        if self._engine.failure is None and self._engine.recovering is not None:
            return f"shards failed and are started again: {self._engine.recovering}"
        if self._engine.waits > self._stall:
            return f"a shard has not answered a step for {self._engine.waits:.0f} s"
        return self._engine.failure or self._watch.silent

    async def metrics(self, replica: str | None = None) -> bytes:
        """A Prometheus scrape."""
        _check_name(replica)
        return self._metrics.text()

    async def status(self, replica: str | None = None) -> EngineStatus:
        """The engine and its shards; one that does not answer at once is told as such."""
        _check_name(replica)
        info = self._engine.info
        return EngineStatus(
            engine=self._number,
            failure=await self.failure(),
            device=info.device,
            weight_bytes=info.weight_bytes,
            kv_cache_bytes=info.kv_cache_bytes,
            load_seconds=info.load_seconds,
            shards=[
                ShardStatus(rank, False) if each is None else ShardStatus(rank, True, **each)
                for rank, each in enumerate(await self._replica.look())
            ],
        )

    # Sleep: see sleep_api.py.

    async def sleep(self, replica: str | None = None) -> str | None:
        """Why it does not; None if the shards are about to."""
        _check_name(replica)
        try:
            self._engine.sleep()
        except Busy as error:
            return str(error)
        return None

    async def wake_up(self, replica: str | None = None) -> None:
        _check_name(replica)
        self._engine.wake_up()

    async def asleep(self, replica: str | None = None) -> bool:
        _check_name(replica)
        return self._engine.asleep

    # LoRA adapters: see fleet.AdapterDoor.

    async def load_adapter(self, adapter: Adapter, replica: str | None = None) -> str | None:
        _check_name(replica)
        return await self._door().load_adapter(adapter)

    async def publish_adapter(self, id: int, replica: str | None = None) -> None:
        _check_name(replica)
        await self._door().publish_adapter(id)

    async def drop_adapter(self, id: int, replica: str | None = None) -> None:
        _check_name(replica)
        await self._door().drop_adapter(id)

    async def list_adapters(self, replica: str | None = None) -> list[Adapter]:
        _check_name(replica)
        return await self._door().list_adapters()

    def _door(self) -> LocalDoor:
        assert self._engine.adapters is not None  # or nobody asks
        return LocalDoor(self._engine.adapters)

    async def shards(self) -> list[Description]:
        """Each shard's process, by rank."""
        return await self._replica.describe()

    async def process(self) -> Description:
        """The router's own process."""
        return describe_process()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's autoscaler calls this: see autoscaling.py."""
        return {METRIC: self._engine.load / self._target_tokens}

    async def check_health(self) -> None:
        """Serve calls this; an exception has the replica replaced."""
        self._engine.check(self._step_timeout)
        engine = self._engine
        idle = not (engine.scheduler.unfinished or engine.recovering or engine.asleep)
        await self._watch.look(idle)

    async def __del__(self) -> None:
        # Serve calls this, and waits, when it retires the replica: let running streams end. Those
        # that take too long are handed on by their ingresses, as this router's end is noticed.
        if hasattr(self, "_server"):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._server.drain(), self._drain_timeout)
            await self._server.close()
            await self._engine.close()
            await self._replica.close()


async def _adapters(config: EngineConfig, replica: Replica) -> EngineAdapters | None:
    """The adapters that a router before this one had; if there was none, the configured ones."""
    if not config.enable_lora:
        return None
    adapters = EngineAdapters(replica, config.max_cpu_loras)
    if replica.adopted:
        adapters.adopt(replica.adapters)
        return adapters
    for number, module in enumerate(config.lora_modules, 1):
        adapter = Adapter(module.name, number, module.path)
        await adapters.load(adapter)
        adapters.publish(adapter.id)
    return adapters


def _check_name(replica: str | None) -> None:
    """That a call was meant for this router."""
    here = serve.get_replica_context().replica_id.unique_id
    if replica not in (None, here):
        raise RuntimeError(f"router {replica} is gone; this is {here}")
