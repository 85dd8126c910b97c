"""Under load, deployments change: replicas are added and taken away, everything is replaced. No
request fails, and every stream's text is what it is undisturbed."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tensorray.cluster import app
from tests.helpers.null_engine import write_model

pytestmark = pytest.mark.ray

PATIENCE = 400.0
READERS = 6
STEP_MS = 20  # so that readers leave time for the starts of what replaces


class Load:
    """Readers that ask for one stream after the other, and hold each against the text it has when
    nothing else happens."""

    def __init__(self, port: int) -> None:
        self._client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=PATIENCE
        )
        self._expected: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = False
        self.answered = 0
        self.wrong: list[str] = []

    async def text(self, number: int) -> str:
        stream = await self._client.completions.create(
            model="tiny",
            prompt=f"reader {number}",
            max_tokens=50 + 10 * number,
            seed=number,
            stream=True,
        )
        text, reason = "", None
        async for chunk in stream:
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason
        assert reason == "length"
        return text

    async def _read(self, number: int) -> None:
        while not self._ending:
            try:
                if await self.text(number) != self._expected[number]:
                    self.wrong.append(f"reader {number}: another text")
            except Exception as error:
                self.wrong.append(f"reader {number}: {type(error).__name__}: {error}")
            self.answered += 1

    async def more(self) -> None:
        """Until every reader may have had an answer more."""
        before = self.answered
        await until(lambda: self.answered >= before + 2 * READERS)

    @asynccontextmanager
    async def running(self) -> Any:
        self._expected = [await self.text(number) for number in range(READERS)]
        self._tasks = [asyncio.create_task(self._read(number)) for number in range(READERS)]
        try:
            yield
        finally:
            self._ending = True
            await asyncio.gather(*self._tasks)
            await self._client.close()


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(holds):
        assert time.monotonic() < deadline, "it does not come to pass"
        await asyncio.sleep(0.1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


class Deployment:
    """An application as `serve deploy` deploys it."""

    def __init__(self, model: Path, port: int) -> None:
        self.port = port
        self._model = model
        self._client: Any = _get_global_client()

    def deploy(self, routers: int, **settings: Any) -> None:
        args = {"model": str(self._model), "device": "null", **settings}
        application = {
            "name": "tensorray",
            "route_prefix": "/",
            "import_path": "tensorray.cluster.app:build_app",
            "args": {**args, "max_num_seqs": 32},
            "deployments": [{"name": "Router", "num_replicas": routers}],
        }
        schema = {
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "applications": [application],
        }
        self._client.deploy_apps(ServeDeploySchema.model_validate(schema))

    def replicas(self, name: str) -> set[str]:
        """Those that run, when the whole deployment is as it should be; else none."""
        status = serve.status().applications.get("tensorray")
        if status is None or status.status != "RUNNING":
            return set()
        details = self._client.get_serve_details()
        found = details["applications"]["tensorray"]["deployments"][name]["replicas"]
        if any(each["state"] != "RUNNING" for each in found):
            return set()
        return {each["replica_id"] for each in found}


async def test_replicas_come_and_go_and_all_is_replaced_under_load(
    serve_port: int, model: Path
) -> None:
    deployment = Deployment(model, serve_port)
    deployment.deploy(1, null_step_ms=STEP_MS)
    try:
        await until(lambda: len(deployment.replicas("Router")) == 1)
        await until(lambda: len(deployment.replicas("Ingress")) == 1)
        load = Load(deployment.port)
        async with load.running():
            await load.more()
            deployment.deploy(2, null_step_ms=STEP_MS)
            await until(lambda: len(deployment.replicas("Router")) == 2)
            await until(lambda: sum(made > 0 for made in engines(deployment.port).values()) == 2)

            old = deployment.replicas("Router") | deployment.replicas("Ingress")
            deployment.deploy(2, null_step_ms=STEP_MS + 1)
            await until(
                lambda: (
                    len(deployment.replicas("Router") - old) == 2
                    and len(deployment.replicas("Ingress") - old) == 1
                )
            )
            await load.more()

            deployment.deploy(1, null_step_ms=STEP_MS + 1)
            await until(lambda: len(deployment.replicas("Router")) == 1)
            await until(lambda: len(engines(deployment.port)) == 1)
            await load.more()
        assert not load.wrong
    finally:
        await asyncio.to_thread(app.stop, own_cluster=False)


def engines(port: int) -> dict[str, float]:
    """Tokens generated, by engine."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("tensorray:generation_tokens_total{"):
            name = line.split('engine="')[1].split('"')[0]
            found[name] = float(line.split()[-1])
    return found
