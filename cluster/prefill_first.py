"""Requests that are prefilled by one replica and decoded by another.

A request goes to a replica that prefills, as far as its first tokens; that replica holds the
prompt's blocks. Then it goes to one that decodes, as one goes on whose replica was lost, with the
tokens told so far; this time with word of where the blocks are. As long as the first stream is open
they are held, so whatever happens here ends that as well.

The replica that decodes can do all of it, so whatever goes wrong on the other side costs time only.
And it does all of it where that is better: where it has most of a prompt in its cache, or where its
queue looks full. Then it is for that replica to say so before anything has been computed; a request
that comes with its first tokens told can't be turned away any more.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Protocol, cast

import msgspec

from tensorray.cluster.engine import EngineFailed
from tensorray.cluster.errors import InternalError
from tensorray.cluster.frontend import EngineClient
from tensorray.cluster.replicas import UnderWay
from tensorray.cluster.request import Delta, GenerationRequest, RequestRefused, Source

logger = logging.getLogger("ray.serve")


class Decoders(EngineClient, Protocol):
    """Replicas that decode, and what is known of them beforehand."""

    def has_room(self, sequences: int) -> bool:
        """Whether so many would be queued, as far as is known."""
        ...

    def expected_hit(self, request: GenerationRequest) -> int:
        """Prompt tokens that the replica is thought to have which the request would go to now."""
        ...


class PrefillFirst:
    """An EngineClient over two: replicas that prefill, and replicas that decode."""

    def __init__(self, prefill: EngineClient, decode: Decoders, min_tokens: int) -> None:
        """What goes wrong on `prefill` is logged once, and no error while `decode` serves. Prompts
        with fewer than `min_tokens` tokens to compute are computed where they are decoded."""
        self._prefill = prefill
        self._decode = decode
        self._min_tokens = min_tokens
        self._running: dict[str, UnderWay] = {}  # by request id
        self._to_come = 0  # sequences that `decode` will get
        self._wrong = ""  # what went wrong last, and has not gone well since

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """See EngineClient. Raises RequestRefused, QueueFull or EngineFailed."""
        under_way = self._running[request.request_id] = UnderWay(request)
        try:
            async with AsyncExitStack() as held:
                source: Source | None = None
                if self._is_split(request):
                    async with aclosing(self._begin(under_way, held)) as items:
                        async for deltas in items:
                            source = next((each.source for each in deltas if each.source), source)
                            yield deltas
                if under_way.finished:
                    return
                asked = under_way.request(self._decode)
                left: set[int] = set()
                if source is not None:
                    asked = msgspec.structs.replace(asked, source=source, whole=False)
                    left = {each.index for each in asked.resumed or ()}
                async with aclosing(_stream(self._decode, asked)) as items:
                    async for deltas in items:
                        if left and not (left := left - {each.index for each in deltas}):
                            await held.aclose()  # each has its blocks, or does without
                        under_way.take(deltas)
                        yield deltas
        finally:
            del self._running[request.request_id]

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """See EngineClient."""
        if request_id in self._running:
            await self._running[request_id].cancel(index)

    def _is_split(self, request: GenerationRequest) -> bool:
        """Whether it is worth it, and the replica that decodes could use the prompt's blocks."""
        return (
            len(request.prompt) >= self._min_tokens
            and request.max_tokens > 1
            and request.reuse_prefix
            and request.resumed is None
            and request.beams is None
            and not request.pooling
            and not request.lora  # adapters are loaded where requests are decoded
            and self._decode.has_room(self._to_come + request.n)
            and len(request.prompt) - self._decode.expected_hit(request) >= self._min_tokens
        )

    async def _begin(
        self, under_way: UnderWay, held: AsyncExitStack
    ) -> AsyncGenerator[list[Delta], None]:
        """Until each sequence has ended, or is held; `held` ends that. If it can't be done, that is
        logged, and not all of them are."""
        asked = under_way.request(self._prefill)
        self._to_come += asked.n
        asked = msgspec.structs.replace(asked, hand_over=True, whole=False)
        left = set(range(asked.n))
        try:
            arriving = await held.enter_async_context(aclosing(_stream(self._prefill, asked)))
            async for deltas in arriving:
                fresh = []
                for each in deltas:
                    if each.index not in left:
                        continue
                    if each.source is not None:
                        each.finish_reason = None  # not held any more; so it will not be found
                    if each.source is not None or each.finish_reason is not None:
                        left.remove(each.index)
                    if each.finish_reason not in ("error", "abort"):
                        fresh.append(each)
                    elif each.error:
                        self._note(each.error)
                    if each.source is not None:
                        self._wrong = ""
                if fresh:
                    under_way.take(fresh)
                    yield fresh
                if not left:
                    break
        except (EngineFailed, RequestRefused, InternalError) as error:
            self._note(str(error))
        finally:
            self._to_come -= asked.n
        under_way.refused()  # by who prefills, from here on

    def _note(self, wrong: str) -> None:
        if wrong != self._wrong:
            logger.warning("prompts are not prefilled apart: %s", wrong)
        self._wrong = wrong


def _stream(client: EngineClient, request: GenerationRequest) -> AsyncGenerator[list[Delta], None]:
    return cast("AsyncGenerator[list[Delta], None]", client.generate(request))
