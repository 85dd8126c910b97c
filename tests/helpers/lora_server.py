"""The API over a CPU shard with LoRA adapters on a real port, all in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from tensorray.actors.link import LocalLink
from tensorray.actors.shard import Shard
from tensorray.cluster.adapters import EngineAdapters, LocalHost
from tensorray.cluster.backend import EngineStatus
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Engine
from tensorray.cluster.fleet import Fleet, LocalDoor
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.ingress import create_app
from tensorray.cluster.replicas import Replicas
from tensorray.cluster.request import Delta, GenerationRequest


class Backend:
    """Engines of this process, each with a shard of its own."""

    def __init__(self, config: EngineConfig) -> None:
        self.shards = [Shard.load(config.shard()) for _ in range(config.data_parallel_size)]
        self.engines: list[Engine] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        for shard in self.shards:
            adapters = EngineAdapters(LocalHost([shard]), config.max_cpu_loras)
            scheduler = config.scheduler(shard.info)
            self.engines.append(Engine(LocalLink(shard), scheduler, adapters=adapters))
        self._client: Any = self.engines[0] if len(self.engines) == 1 else Replicas(self.engines)

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Await something on the engines' loop, from another thread."""
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def doors(self) -> list[LocalDoor]:
        return [LocalDoor(each.adapters) for each in self.engines if each.adapters is not None]

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        found: AsyncIterator[list[Delta]] = self._client.generate(request)
        return found

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        await self._client.cancel(request_id, index)

    async def failure(self) -> str | None:
        return self.engines[0].failure

    async def metrics(self) -> bytes:
        return b""

    async def status(self) -> list[EngineStatus]:
        return []


@contextmanager
def lora_server(model: Path, **settings: Any) -> Iterator[tuple[int, Backend]]:
    """Its port, and what is behind it. `settings` are EngineConfig's."""
    config = EngineConfig(
        model=str(model),
        served_model_name=["base"],
        enable_lora=True,
        allow_runtime_lora_updating=True,
        **{"num_threads": 1, "max_model_len": 64, "num_kv_blocks": 512, **settings},
    )
    backend = Backend(config)
    started = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        backend.loop = asyncio.get_running_loop()
        for engine in backend.engines:
            await engine.start()
        app = create_app(Frontend.load(config), backend, config, Fleet(backend.doors))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        servers.append(server)
        running = asyncio.ensure_future(server.serve())
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        started.set()
        await running
        for engine in backend.engines:
            await engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(120), "the server did not start"
    try:
        yield servers[0].servers[0].sockets[0].getsockname()[1], backend
    finally:
        servers[0].should_exit = True
        thread.join(120)
