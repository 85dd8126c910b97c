"""The router: a Serve deployment each of whose replicas is one engine over its shards.

Serve starts, watches and replaces it. Requests do not pass through Serve: ingress replicas ask for
the endpoint and talk to the engine over a connection of their own (engine_link.py).
"""

from __future__ import annotations

import logging

import ray

from tensorray.actors.protocol import ShardInfo
from tensorray.actors.replica import Replica, Where
from tensorray.actors.segment_table import table
from tensorray.actors.shard_actor import Description, describe_process
from tensorray.actors.wire import Endpoint
from tensorray.cluster.backend import EngineStatus, ShardStatus
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Engine
from tensorray.cluster.engine_link import EngineServer
from tensorray.cluster.metrics import EngineMetrics

logger = logging.getLogger("ray.serve")


class Router:
    """One engine. The constructor returns when its shards have loaded; Serve awaits it.

    It takes over the shards that a router before it has left behind.
    """

    async def __init__(self, config: EngineConfig, number: int = 0) -> None:  # type: ignore[misc]
        """`number` is which of the data-parallel engines it is."""
        where = Where(
            accelerator_type=config.accelerator_type,
            strategy=config.placement_strategy,
            timeout=config.placement_timeout_seconds,
            lease=config.shard_lease_seconds,
            replicas=config.data_parallel_size,
        )
        shards = [config.shard(rank) for rank in range(config.num_shards)]
        self._replica = await Replica.open(config.digest(), shards, where)
        link = await self._replica.connect()
        self._metrics = EngineMetrics(config.names()[0], engine=str(number))
        self._engine = Engine(
            link,
            config.scheduler(link.info),
            observer=self._metrics,
            recover=self._replica.recover,
        )
        self._metrics.watch(self._engine)
        self._number = number
        self._step_timeout = config.step_timeout_seconds
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

    async def endpoint(self) -> Endpoint:
        """Where ingress replicas connect, with the secret to say."""
        return self._server.endpoint

    async def info(self) -> ShardInfo:
        return self._engine.info

    async def failure(self) -> str | None:
        """Why the engine can't serve, for good or for now; None while it can."""
        if self._engine.failure is None and self._engine.recovering is not None:
            return f"shards failed and are started again: {self._engine.recovering}"
        return self._engine.failure

    async def metrics(self) -> bytes:
        """A Prometheus scrape."""
        return self._metrics.text()

    async def status(self) -> EngineStatus:
        """The engine and its shards; one that does not answer at once is told as such."""
        info = self._engine.info
        return EngineStatus(
            engine=str(self._number),
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

    async def shards(self) -> list[Description]:
        """Each shard's process, by rank."""
        return await self._replica.describe()

    async def process(self) -> Description:
        """The router's own process."""
        return describe_process()

    async def check_health(self) -> None:
        """Serve calls this; an exception has the replica replaced."""
        self._engine.check(self._step_timeout)

    async def __del__(self) -> None:
        # Serve calls this, and waits, when it retires the replica: let running streams end.
        if hasattr(self, "_server"):
            await self._server.drain()
            await self._server.close()
            await self._engine.close()
            await self._replica.close()
