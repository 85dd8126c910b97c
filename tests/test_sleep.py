"""A model that nobody uses frees its shards; the next request has them back, and waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from pydantic import ValidationError

from tensorray.actors.config import ShardConfig
from tensorray.actors.link import LocalLink, ShardLink
from tensorray.actors.null_shard import NullShard
from tensorray.actors.protocol import Sampling
from tensorray.actors.replica import Replica, Where
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.engine import Busy, Engine, EngineFailed
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.ingress import create_app
from tensorray.cluster.request import GenerationRequest
from tests.helpers.null_engine import LocalBackend, null_engine, write_model
from tests.helpers.tiny_models import directory


class Bed:
    """Shards in this process, that say whether they are there."""

    def __init__(self, engine: Engine) -> None:
        self._info = engine.info
        self.there = True
        self.naps = 0
        self.may_wake = asyncio.Event()
        self.may_wake.set()
        self.broken = False

    async def sleep(self) -> None:
        assert self.there
        self.there = False
        self.naps += 1

    async def wake(self) -> ShardLink:
        assert not self.there
        await self.may_wake.wait()
        if self.broken:
            raise RuntimeError("no room")
        self.there = True
        return LocalLink(NullShard(self._info))


@asynccontextmanager
async def resting(idle_seconds: float | None) -> AsyncIterator[tuple[Engine, Bed]]:
    engine = null_engine()
    bed = engine._rest = Bed(engine)
    engine._idle_seconds = idle_seconds
    await engine.start()
    yield engine, bed
    await engine.close()


async def until(holds: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not holds():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), 60)


async def tokens(engine: Engine, name: str) -> list[int]:
    request = GenerationRequest(name, [1, 2, 3], Sampling(seed=5), 20)
    return [
        token async for deltas in engine.generate(request) for d in deltas for token in d.tokens
    ]


async def test_idle_shards_sleep_and_a_request_wakes_them() -> None:
    async with resting(0.01) as (engine, bed):
        first = await tokens(engine, "first")
        await until(lambda: engine.asleep and not bed.there)
        bed.may_wake.clear()
        waiting = [asyncio.create_task(tokens(engine, f"late{i}")) for i in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        engine.check(step_timeout=0.01)  # nobody stalls
        bed.may_wake.set()
        assert await asyncio.gather(*waiting) == [first] * 3
        await until(lambda: bed.naps == 2 and engine.asleep)
        stats = engine.scheduler.stats()
        assert stats.free_blocks == stats.total_blocks
        assert stats.cached_blocks == 0


async def test_told_to_sleep_and_to_wake_up() -> None:
    async with resting(None) as (engine, bed):
        stream: Any = engine.generate(GenerationRequest("it", [1], Sampling(seed=5), 200))
        with pytest.raises(Busy):
            engine.sleep()
        await stream.aclose()
        engine.sleep()
        await until(lambda: engine.asleep)
        assert not bed.there
        engine.wake_up()
        await until(lambda: not engine.asleep)
        assert bed.there
        assert len(await tokens(engine, "on")) == 20
        assert bed.naps == 1


async def test_shards_that_do_not_wake_fail_who_waits() -> None:
    async with resting(None) as (engine, bed):
        engine.sleep()
        await until(lambda: engine.asleep)
        bed.broken = True
        stream = engine.generate(GenerationRequest("it", [1], Sampling(seed=5), 5))
        last = [delta async for deltas in stream for delta in deltas][-1]
        assert (last.finish_reason, last.error) == ("error", "the shards do not wake: no room")
        with pytest.raises(EngineFailed, match="no room"):
            engine.check(60.0)


class RestingBackend(LocalBackend):
    """A Sleeper."""

    def __init__(self) -> None:
        super().__init__()
        self.engine._rest = Bed(self.engine)

    async def sleep(self) -> str | None:
        try:
            self.engine.sleep()
        except Busy as error:
            return str(error)
        return None

    async def wake_up(self) -> None:
        self.engine.wake_up()

    async def asleep(self) -> bool:
        return self.engine.asleep


async def test_endpoints(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "tiny"))
    for enabled in (True, False):
        config = EngineConfig(model=model, enable_sleep_mode=enabled)
        async with RestingBackend() as backend:
            app = create_app(Frontend.load(config), backend, config)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                if not enabled:
                    assert (await client.post("/sleep")).status_code == 404
                    continue
                assert (await client.get("/is_sleeping")).json() == {"is_sleeping": False}
                assert (await client.post("/sleep")).json() == {"is_sleeping": True}
                assert (await client.get("/health")).status_code == 200
                assert (await client.post("/wake_up")).json() == {"is_sleeping": False}
                request = GenerationRequest("it", [1], Sampling(), 200)
                stream: Any = backend.engine.generate(request)
                refused = await client.post("/sleep")
                assert refused.status_code == 409
                assert "1 sequences run or wait" in refused.json()["error"]["message"]
                await stream.aclose()


def test_a_time_needs_the_mode() -> None:
    with pytest.raises(ValidationError, match="enable_sleep_mode"):
        EngineConfig(model="m", idle_timeout_seconds=5)


@pytest.mark.ray
async def test_a_replica_that_sleeps_holds_no_place(free_cluster: None) -> None:
    model = str(directory("gemma3"))
    shard = ShardConfig(model, device="cpu", max_model_len=64, num_kv_blocks=64, num_threads=1)

    def free() -> float:
        return float(ray.available_resources().get("CPU", 0.0))  # type: ignore[no-untyped-call]

    before = free()
    replica = await Replica.open("sleeper", [shard], Where(timeout=60.0, lease=30.0))
    try:
        (first,) = await replica.describe()
        await until(lambda: free() == before - 1)
        await replica.sleep()
        await until(lambda: free() == before)
        link = await replica.wake()
        (second,) = await replica.describe()
        assert second["pid"] != first["pid"]
        assert link.info.max_model_len == 64
        await until(lambda: free() == before - 1)
    finally:
        await replica.close()
