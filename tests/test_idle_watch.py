"""Idle shards that do not answer are noticed, and that they do again."""

from __future__ import annotations

from collections.abc import Iterator

from tensorray.actors.shard_actor import Description
from tensorray.cluster.idle_watch import IdleWatch


class Clock:
    now = 0.0

    def until(self, end: float) -> Iterator[None]:
        """A look every two seconds."""
        while self.now < end:
            yield
            self.now += 2


WELL: Description = {"pid": 1, "peak_rss_bytes": 0, "node": "n"}


async def test_who_does_not_answer_in_time_is_named_until_it_does() -> None:
    clock = Clock()
    answers: list[Description | None] = [WELL, WELL]
    asked = 0

    async def ask() -> list[Description | None]:
        nonlocal asked
        asked += 1
        return answers

    watch = IdleWatch(ask, 30.0, lambda: clock.now)
    for _ in clock.until(60):
        await watch.look(idle=True)
        assert watch.silent is None
    assert 4 <= asked <= 6  # not at every look
    answers = [WELL, None]
    for _ in clock.until(80):
        await watch.look(idle=True)
        assert watch.silent is None
    for _ in clock.until(110):
        await watch.look(idle=True)
    assert watch.silent == "of the shards, rank 1 does not answer"
    await watch.look(idle=False)  # steps tell
    assert watch.silent is None
    for _ in clock.until(160):
        await watch.look(idle=True)
    assert watch.silent is not None
    answers = [WELL, WELL]
    for _ in clock.until(180):
        await watch.look(idle=True)
    assert watch.silent is None
