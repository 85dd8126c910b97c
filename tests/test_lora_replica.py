"""LoRA adapters of Ray's shards: there again after a death, adopted, the same in all replicas."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.lora_files import write_adapter
from helpers.tiny_models import directory

from tensorray.actors.adapter import Adapter
from tensorray.actors.config import ShardConfig
from tensorray.actors.link import ShardError
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan
from tensorray.actors.replica import Replica, Where
from tensorray.actors.shard import Shard
from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.lora_module import LoraModule

pytestmark = pytest.mark.ray

MODEL = directory("gemma3")
WHERE = Where(timeout=60.0, lease=60.0)


def configs(tp: int = 1) -> list[ShardConfig]:
    settings: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "num_kv_blocks": 64}
    settings |= {"num_threads": 1, "tensor_parallel_size": tp, "enable_lora": True}
    return [ShardConfig(str(MODEL), **settings, rank=rank) for rank in range(tp)]


def plan(adapter: int) -> StepPlan:
    sampling = Sampling(temperature=0.0, logprobs=3)
    start = SequenceStart(0, [9, 8, 7, 6, 5], 5, 0, [[1], [2]], sampling, adapter)
    return StepPlan(0, [0], [5], starts=[start])


def logprobs(result: Any) -> dict[int, float]:
    (found,) = result.logprobs.values()
    return dict(zip(found.top_tokens, found.top_logprobs, strict=True))


async def test_shards_started_again_and_adopted_ones_have_their_adapters(
    ray_cluster: None, tmp_path: Path
) -> None:
    one = Adapter("one", 1, str(write_adapter(MODEL, tmp_path / "one", seed=1, spread=0.5)))
    two = Adapter("two", 2, str(write_adapter(MODEL, tmp_path / "two", seed=2, spread=0.5)))
    large = Adapter("large", 3, str(write_adapter(MODEL, tmp_path / "large", seed=3, rank=17)))
    alone = Shard.load(configs()[0])
    alone.add_adapter(one)
    expected = logprobs(alone.execute(plan(1)))
    alone.reset()
    assert logprobs(alone.execute(plan(0))) != pytest.approx(expected, abs=0.01)

    async def check(replica: Replica) -> None:
        link = await replica.connect()
        link.send(plan(1))
        found = logprobs(await asyncio.wait_for(link.receive(), 60))
        assert found == pytest.approx(expected, abs=1e-3)

    first = await Replica.open("lora", configs(2), WHERE)
    try:
        await first.add_adapter(one)
        await first.add_adapter(two)
        with pytest.raises(ValueError, match="rank 17"):
            await first.add_adapter(large)
        await first.remove_adapter(2)
        assert first.adapters == [one]
        await check(first)

        os.kill((await first.describe())[1]["pid"], signal.SIGKILL)
        link = await first.connect()
        link.send(plan(1))
        with pytest.raises(ShardError, match="rank 1") as lost:
            await asyncio.wait_for(link.receive(), 60)
        await first.recover(lost.value, print)
        await check(first)
    except BaseException:
        await first.close()
        raise
    await first._link.close()  # type: ignore[union-attr]
    for lease in first._leases:
        lease.close()  # type: ignore[union-attr]
    second = await Replica.open("lora", configs(2), WHERE)
    try:
        assert second.adopted
        assert second.adapters == [one]
        await check(second)
    finally:
        await second.close()


def test_all_replicas_have_an_adapter_before_and_after_a_shard_died(
    serve_port: int, tmp_path: Path
) -> None:
    """Through Serve: two routers, two ingresses."""
    paths = [write_adapter(MODEL, tmp_path / f"{i}", seed=i, spread=0.5) for i in range(2)]
    config = EngineConfig(
        model=str(MODEL),
        device="cpu",
        num_threads=1,
        max_model_len=64,
        num_kv_blocks=64,
        data_parallel_size=2,
        num_ingress_replicas=2,
        routing="balanced",
        enable_lora=True,
        lora_modules=[LoraModule(name="fixed", path=str(paths[0]))],
        allow_runtime_lora_updating=True,
    )
    app.run(config, port=serve_port, blocking=False)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{serve_port}", timeout=120) as client:

            def answer(model: str) -> str:
                body = {"model": model, "prompt": [9, 8, 7], "max_tokens": 6, "temperature": 0}
                found = client.post("/v1/completions", json={**body, "ignore_eos": True})
                assert found.status_code == 200, found.text
                return str(found.json()["choices"][0]["text"])

            body = {"lora_name": "new", "lora_path": str(paths[1])}
            loaded = client.post("/v1/load_lora_adapter", json=body)
            assert loaded.status_code == 200, loaded.text
            names = ["gemma3", "fixed", "new"]
            listed = client.get("/v1/models").json()["data"]
            assert [each["id"] for each in listed] == names
            texts = {name: answer(name) for name in names}
            assert len(set(texts.values())) == 3
            for name in names * 4:  # whichever ingress and router they meet
                assert answer(name) == texts[name]

            engines = client.get("/status").json()["engines"]
            os.kill(engines[0]["shards"][0]["pid"], signal.SIGKILL)
            deadline = time.monotonic() + 180
            while True:
                shards = [each["shards"][0] for each in client.get("/status").json()["engines"]]
                before = [each["shards"][0]["pid"] for each in engines]
                now = [each["pid"] for each in shards if each["answers"]]
                if len(now) == 2 and sorted(now) != sorted(before):
                    break
                assert time.monotonic() < deadline, "the shard does not come back"
                time.sleep(0.2)
            for name in names * 4:
                assert answer(name) == texts[name]
            gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
            assert gone.status_code == 200
            for _ in range(6):
                body = {"model": "new", "prompt": [9], "max_tokens": 1}
                assert client.post("/v1/completions", json=body).status_code == 404
    finally:
        app.stop(own_cluster=False)
