"""Under load, deployments change: replicas are added and taken away, everything is replaced, the
service is stopped. No request fails, and every stream's text is what it is undisturbed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.helpers.null_engine import write_model
from tests.helpers.ports import free_port

pytestmark = pytest.mark.ray

PATIENCE = 400.0
READERS = 12


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
            max_tokens=100 + 10 * number,
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

    def __init__(self, model: Path) -> None:
        self.port = free_port()
        self._model = model
        self._client: Any = None

    def deploy(self, routers: int, **settings: Any) -> None:
        args = {"model": str(self._model), "device": "null", **settings}
        application = {
            "name": "tensorray",
            "route_prefix": "/",
            "import_path": "tensorray.cluster.app:build_app",
            "args": {**args, "max_num_seqs": 32},
            "deployments": [{"name": "Router", "num_replicas": routers}],
        }
        if self._client is None:
            serve.start(http_options={"host": "127.0.0.1", "port": self.port})
            self._client = _get_global_client()
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
    ray_cluster: None, model: Path
) -> None:
    deployment = Deployment(model)
    deployment.deploy(1, null_step_ms=5)
    try:
        await until(lambda: len(deployment.replicas("Router")) == 1)
        await until(lambda: len(deployment.replicas("Ingress")) == 1)
        load = Load(deployment.port)
        async with load.running():
            await load.more()
            deployment.deploy(3, null_step_ms=5)
            await until(lambda: len(deployment.replicas("Router")) == 3)
            await until(lambda: sum(made > 0 for made in engines(deployment.port).values()) == 3)

            old = deployment.replicas("Router") | deployment.replicas("Ingress")
            deployment.deploy(3, null_step_ms=6)
            await until(
                lambda: (
                    len(deployment.replicas("Router") - old) == 3
                    and len(deployment.replicas("Ingress") - old) == 1
                )
            )
            await load.more()

            deployment.deploy(1, null_step_ms=6)
            await until(lambda: len(deployment.replicas("Router")) == 1)
            await until(lambda: len(engines(deployment.port)) == 1)
            await load.more()
        assert not load.wrong
    finally:
        await asyncio.to_thread(serve.shutdown)


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


@contextmanager
def served(model: Path, port: int, **flags: object) -> Iterator[subprocess.Popen[str]]:
    """`tensorray serve`, on a Ray of its own."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    environment = {**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorray.cluster.cli",
            "serve",
            str(model),
            f"--port={port}",
            *words,
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "RAY_raylet_start_wait_time_s": "120"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_sigterm_lets_streams_end(model: Path) -> None:
    port = free_port()
    with served(model, port, device="null", null_step_ms=20) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "until Ctrl-C" in line:
                break
        else:
            raise AssertionError("it did not come up")
        body = {"prompt": "Hello", "max_tokens": 200, "seed": 1, "stream": True}
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            first = next(line for line in answer if line.startswith(b"data:"))
            process.send_signal(signal.SIGTERM)
            events = [first, *(line for line in answer if line.startswith(b"data:"))]
        assert events[-1].strip() == b"data: [DONE]"
        last = json.loads(events[-2].removeprefix(b"data:"))
        assert last["choices"][0]["finish_reason"] == "length"
        assert process.wait(PATIENCE) == 0
