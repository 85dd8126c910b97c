"""One question to many, none of whom holds up the others.

A scrape asks every router how it is, and there may be a thousand of them, one of which hangs. So
nobody is asked twice at a time, however many scrapes there are; few are asked at once, as each
question is work for the event loop that streams run on; and after a while those who have not said
anything yet are left to answer by the next roll call. What they said last is told meanwhile, with
its age.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tensorray.cluster.engine import EngineFailed

logger = logging.getLogger("ray.serve")

Asked = TypeVar("Asked", bound=Hashable)
Answer = TypeVar("Answer")

# How long a roll call waits for somebody, in seconds.
_PATIENCE = 2.0

# Asked at once. One who does not answer within a turn's seconds lets another one be asked.
_AT_ONCE = 32
_TURN_SECONDS = 0.25

# What asking one takes of an event loop. Answers are good for as long as asking all takes, so that
# scrapes take half of a loop's time at the most.
_ASKING_SECONDS = 0.001


@dataclass(frozen=True)
class Said(Generic[Answer]):
    """What somebody said last, and how many seconds before it was asked for.

    `silent` is why it says nothing any more; empty if it did, or was asked only just now.
    """

    answer: Answer
    age: float
    silent: str = ""


@dataclass(eq=False)
class _Line(Generic[Answer]):
    """What is known of one who is asked."""

    said: Said[Answer] | None = None  # `age` is the time then, by time.monotonic()
    question: asyncio.Task[None] | None = None  # under way
    asked: float = -math.inf  # when it was put last


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
        """`ask` raises EngineFailed if there is no answer, and does so in the end. A roll call
        waits for `patience` seconds."""
        self._ask = ask
        self._patience = patience
        self._turns = asyncio.Semaphore(at_once)
        self._turn_seconds = turn_seconds
        self._asking_seconds = asking_seconds
        self._lines: dict[Asked, _Line[Answer]] = {}

    async def answers(self, everyone: Iterable[Asked]) -> list[Said[Answer]]:
        """What they say, in order, but for those who have never said anything."""
        self._lines = {who: self._lines.get(who) or _Line() for who in everyone}
        lines = list(self._lines.items())
        good_until = time.monotonic() - self._asking_seconds * len(lines)
        for who, line in lines:
            if line.question is None and line.asked < good_until:
                line.asked = time.monotonic()
                line.question = asyncio.create_task(self._put(who, line))
        # One that hangs costs one roll call's patience, not that of all until it is given up.
        since = time.monotonic() - self._patience
        waited = [each.question for _, each in lines if each.question and each.asked > since]
        if waited:
            await asyncio.wait(waited, timeout=self._patience)
        now = time.monotonic()
        return [
            Said(line.said.answer, now - line.said.age, line.said.silent)
            for _, line in lines
            if line.said is not None
        ]

    async def _put(self, who: Asked, line: _Line[Answer]) -> None:
        try:
            async with self._turns:
                asked = asyncio.ensure_future(self._ask(who))
                await asyncio.wait([asked], timeout=self._turn_seconds)
            line.said = Said(await asked, time.monotonic())
        except Exception as error:
            if not isinstance(error, EngineFailed):
                logger.warning("asking %s went wrong", who, exc_info=error)
            if line.said is not None:
                line.said = Said(line.said.answer, line.said.age, str(error) or repr(error))
        finally:
            line.question = None
