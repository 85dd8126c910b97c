"""The router: a Serve deployment each of whose replicas is one engine over its shards.

Serve starts, watches and replaces it. Requests do not pass through Serve: ingress replicas ask for
the endpoint and talk to the engine over a connection of their own (engine_link.py).
"""

from __future__ import annotations

import logging

import ray

from tensorray.actors.protocol import ShardInfo
from tensorray.actors.segment_table import table
from tensorray.actors.shard_actor import start_shard
from tensorray.actors.wire import Endpoint
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Engine
from tensorray.cluster.engine_link import EngineServer
from tensorray.cluster.metrics import EngineMetrics

logger = logging.getLogger("ray.serve")


class Router:
    """One engine. The constructor returns when its shard has loaded; Serve awaits it."""

    async def __init__(self, config: EngineConfig) -> None:  # type: ignore[misc]
        shard = await start_shard(config.shard())
        self._metrics = EngineMetrics(config.names()[0])
        self._engine = Engine(shard.link, config.scheduler(shard.link.info), observer=self._metrics)
        self._metrics.watch(self._engine)
        self._shard = shard
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
        """Why the engine can't serve; None while it can."""
        return self._engine.failure

    async def metrics(self) -> bytes:
        """A Prometheus scrape."""
        return self._metrics.text()

    async def shards(self) -> list[dict[str, int]]:
        """Each shard's process id and peak memory; see ShardActor.describe."""
        return [await self._shard.actor.describe.remote()]

    async def check_health(self) -> None:
        """Serve calls this; an exception has the replica replaced."""
        self._engine.check(self._step_timeout)

    async def __del__(self) -> None:
        # Serve calls this, and waits, when it retires the replica: let running streams end.
        if hasattr(self, "_server"):
            await self._server.drain()
            await self._server.close()
            await self._engine.close()
            await self._shard.close()
