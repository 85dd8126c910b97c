"""Shards that have nothing to do are asked how they are, as one that works shows by its steps."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

from tensorray.actors.shard_actor import Description


class IdleWatch:
    """Asks idle shards now and then; `silent` says which have not answered for `seconds`."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[Sequence[Description | None]]],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.silent: str | None = None
        self._ask = ask
        self._seconds = seconds
        self._clock = clock
        self._asked = clock()
        self._answered: dict[int, float] = {}  # by rank, when

    async def look(self, idle: bool) -> None:
        """To be called every few seconds. Asks all when there is nothing to do, at most three times
        in the time that they have to answer in."""
        now = self._clock()
        if not idle:
            self.silent = None
            self._answered.clear()
            return
        if now - self._asked < self._seconds / 3:
            return
        self._asked = now
        for rank, answer in enumerate(await self._ask()):
            if answer is not None or rank not in self._answered:
                self._answered[rank] = self._clock()
        since = {rank: self._clock() - when for rank, when in self._answered.items()}
        late = [rank for rank, seconds in since.items() if seconds >= self._seconds]
        self.silent = None
        if late:
            names = ", ".join(map(str, late))
            self.silent = f"of the shards, rank {names} does not answer"
