"""The API over a null engine on a real port, in a thread: for clients that bring their own HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.ingress import create_app
from tests.helpers.null_engine import LocalBackend


@contextmanager
def http_server(
    model: Path, *, name: str = "tiny", limits: dict[str, Any] | None = None, **settings: Any
) -> Iterator[tuple[int, LocalBackend]]:
    """Its port, and the engine behind it. `limits` are EngineConfig's fields, `settings` are
    `null_engine`'s."""
    config = EngineConfig(model=str(model), served_model_name=[name], **(limits or {}))
    started = threading.Event()
    serving: list[tuple[uvicorn.Server, LocalBackend]] = []

    async def serve() -> None:
        async with LocalBackend(**settings) as backend:
            app = create_app(Frontend.load(config), backend, config)
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
            serving.append((server, backend))
            running = asyncio.ensure_future(server.serve())
            while not server.started and not running.done():
                await asyncio.sleep(0.01)
            started.set()
            await running

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(120), "the server did not start"
    server, backend = serving[0]
    try:
        yield server.servers[0].sockets[0].getsockname()[1], backend
    finally:
        server.should_exit = True
        thread.join(120)
