"""One question to many, none of whom holds up the others.

A scrape asks every router how it is, and there may be a thousand of them, one of which hangs. So
each has little time to answer; nobody is asked twice at a time, however many scrapes there are; and
few are asked at once, as each question is work for the event loop that streams run on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from tensorray.cluster.engine import EngineFailed

logger = logging.getLogger("ray.serve")

Asked = TypeVar("Asked", bound=Hashable)
Answer = TypeVar("Answer")

# How long somebody has to answer, in seconds. Who does not is not waited for until it does.
_PATIENCE = 2.0

# Asked at once. One who does not answer within a turn's seconds lets another one be asked.
_AT_ONCE = 32
_TURN_SECONDS = 0.25

# What asking one takes of an event loop. Answers are good for as long as asking all takes, so that
# scrapes take half of a loop's time at the most.
_ASKING_SECONDS = 0.001


@dataclass(frozen=True)
class Said(Generic[Answer]):
    """What somebody said last, and how many seconds ago. `silent` is why it was not said just now;
    empty if it was."""

    answer: Answer
    age: float
    silent: str = ""


@dataclass(eq=False)
class _Line(Generic[Answer]):
    """What is known of one who is asked. Times are by time.monotonic()."""

    said: tuple[Answer, float] | None = None  # and when
    silent: str = ""
    asked: float = -math.inf  # when it was put last
    question: asyncio.Future[Answer] | None = None  # that has not been answered
    wait: asyncio.Task[None] | None = None  # for the answer, as long as it may take


class RollCall(Generic[Asked, Answer]):
    """Puts one question. Belongs to one event loop."""

    def __init__(
        self,
        ask: Callable[[Asked], Awaitable[Answer]],
        *,
        patience: float = _PATIENCE,
        at_once: int = _AT_ONCE,
        turn_seconds: float = _TURN_SECONDS,
        asking_seconds: float = _ASKING_SECONDS,
    ) -> None:
        """`ask` raises EngineFailed if there is no answer, and does so in the end; in `patience`
        seconds it should be there."""
        self._ask = ask
        self._patience = patience
        self._turns = asyncio.Semaphore(at_once)
        self._turn_seconds = turn_seconds
        self._asking_seconds = asking_seconds
        self._lines: dict[Asked, _Line[Answer]] = {}

    async def answers(self, everyone: Iterable[Asked]) -> list[Said[Answer]]:
        """What they say, in order, but for those who have never said anything."""
        self._lines = {who: self._lines.get(who) or _Line() for who in everyone}
        lines = list(self._lines.values())
        good_until = time.monotonic() - self._asking_seconds * len(lines)
        for who, line in self._lines.items():
            if line.wait is None and line.question is None and line.asked < good_until:
                line.wait = asyncio.create_task(self._put(who, line))
        if waits := [line.wait for line in lines if line.wait is not None]:
            await asyncio.wait(waits)
        now = time.monotonic()
        return [
            Said(line.said[0], now - line.said[1], line.silent)
            for line in lines
            if line.said is not None
        ]

    async def _put(self, who: Asked, line: _Line[Answer]) -> None:
        try:
            async with self._turns:
                line.asked = time.monotonic()
                line.question = question = asyncio.ensure_future(self._ask(who))
                question.add_done_callback(partial(self._heard, line))
                await asyncio.wait([question], timeout=min(self._turn_seconds, self._patience))
            if not question.done():
                left = line.asked + self._patience - time.monotonic()
                await asyncio.wait([question], timeout=max(0.0, left))
            if not question.done():
                line.silent = f"it has not answered within {self._patience:g} s"
        finally:
            line.wait = None

    def _heard(self, line: _Line[Answer], question: asyncio.Future[Answer]) -> None:
        line.question = None
        if question.cancelled():
            return
        error = question.exception()
        if error is None:
            line.said, line.silent = (question.result(), time.monotonic()), ""
            return
        line.silent = str(error) or repr(error)
        if not isinstance(error, EngineFailed):
            logger.warning("asking how an engine is went wrong", exc_info=error)
