"""Data parallelism: several replicas of a model behind what looks like one engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import cast

from tensorray.cluster.frontend import EngineClient
from tensorray.cluster.request import Delta, GenerationRequest


class Replicas:
    """An EngineClient over several: each request goes to the one with the fewest sequences that
    came this way and have not ended; among equals they take turns. Belongs to one event loop."""

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        self._clients = list(clients)
        self._sequences = [0] * len(self._clients)
        self._last = -1
        self._running: dict[str, int] = {}  # by request id, the replica that has it

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """See EngineClient."""
        chosen = self._choose()
        self._last = chosen
        self._sequences[chosen] += request.n
        self._running[request.request_id] = chosen
        try:
            arriving = self._clients[chosen].generate(request)
            async with aclosing(cast("AsyncGenerator[list[Delta], None]", arriving)) as items:
                async for deltas in items:
                    yield deltas
        finally:
            self._sequences[chosen] -= request.n
            del self._running[request.request_id]

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """See EngineClient."""
        if request_id in self._running:
            await self._clients[self._running[request_id]].cancel(request_id, index)

    def _choose(self) -> int:
        count = len(self._clients)
        turns = [(self._last + 1 + i) % count for i in range(count)]
        return min(turns, key=self._sequences.__getitem__)
