"""Requests' bodies, and several answers at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from fastapi import Request

from tensorray.cluster.errors import ApiError
from tensorray.cluster.outputs import RequestOutputDelta

T = TypeVar("T")


async def read_body(http: Request, limit: int) -> bytes:
    """The request's body. Raises ApiError as soon as it is known to be over the limit."""
    too_large = ApiError(
        413,
        f"The request's body is over this server's limit of {limit} bytes "
        "(max_body_bytes); send less.",
        code="body_too_large",
    )
    declared = http.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    chunks = []
    size = 0
    async for chunk in http.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; if one fails, or the caller is cancelled, cancel the others."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def together(
    streams: Sequence[AsyncIterator[RequestOutputDelta]],
) -> AsyncGenerator[tuple[int, RequestOutputDelta], None]:
    """Items of all streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async with aclosing(cast(AsyncGenerator[RequestOutputDelta, None], streams[0])) as only:
            async for delta in only:
                yield 0, delta
        return
    # One item at a time, so that a client who lags makes the engine merge tokens.
    arrived: asyncio.Queue[tuple[int, RequestOutputDelta] | Exception | None] = asyncio.Queue(1)

    async def pump(number: int, stream: AsyncIterator[RequestOutputDelta]) -> None:
        try:
            async with aclosing(cast(AsyncGenerator[RequestOutputDelta, None], stream)) as items:
                async for delta in items:
                    await arrived.put((number, delta))
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)

    tasks = [asyncio.ensure_future(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
