"""An engine's answer to one request, as whoever asked reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from tensorray.cluster.request import Delta, GenerationRequest
from tensorray.cluster.request_id import request_id


class TokenStream(AsyncIterator[list[Delta]]):
    """What one request's sequences produce. Each item is all that came since the last one.

    Ends when every sequence has finished. `aclose` (or dropping out of `async for` and closing)
    cancels what still runs.
    """

    def __init__(
        self,
        request: GenerationRequest,
        sequences: dict[int, int],
        cancel: Callable[[str], Awaitable[None]],
    ) -> None:
        """`cancel` ends a request, by its id."""
        self.request = request
        self.sequences = sequences  # the engine's ids, by index
        self.log_id = request_id.get()
        self._cancel = cancel
        self._pending: dict[int, Delta] = {}
        self._unfinished = set(sequences)
        self._ready = asyncio.Event()

    def push(self, delta: Delta) -> None:
        waiting = self._pending.get(delta.index)
        if waiting is None:
            self._pending[delta.index] = delta
        else:
            waiting.tokens += delta.tokens
            if delta.logprobs:
                waiting.logprobs = waiting.logprobs + delta.logprobs
            if delta.prompt_logprobs:
                waiting.prompt_logprobs = waiting.prompt_logprobs + delta.prompt_logprobs
            waiting.finish_reason = delta.finish_reason
            waiting.stop_token = delta.stop_token
            waiting.error = delta.error
            waiting.refused = delta.refused
            waiting.source = delta.source or waiting.source
            if delta.drafted:
                waiting.drafted, waiting.accepted = delta.drafted, delta.accepted
            waiting.pooled = delta.pooled
        if delta.finish_reason is not None:
            self._unfinished.discard(delta.index)
        elif self.request.whole:
            return
        self._ready.set()

    async def __anext__(self) -> list[Delta]:
        if not self._ready.is_set():
            if not self._unfinished:
                raise StopAsyncIteration
            await self._ready.wait()
        self._ready.clear()
        deltas = list(self._pending.values())
        self._pending.clear()
        return deltas

    async def aclose(self) -> None:
        await self._cancel(self.request.request_id)
