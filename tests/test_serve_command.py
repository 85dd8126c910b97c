"""`tensorray serve` as a program of its own: behind TLS and a key, until it is told to end."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.null_engine import write_model
from tests.helpers.ports import free_port

pytestmark = pytest.mark.ray

PATIENCE = 400.0
KEY = "secret"


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """A certificate for this machine, and its key."""
    files = (str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += " -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    written = ["-out", files[0], "-keyout", files[1]]
    subprocess.run([*command.split(), *written], check=True, capture_output=True)
    return files


@contextmanager
def served(model: Path, port: int, **flags: object) -> Iterator[subprocess.Popen[str]]:
    """`tensorray serve`, on a Ray of its own, once it is up."""
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
        env=environment,
    )
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if "until Ctrl-C" in line:
                break
        else:
            raise AssertionError(f"it did not come up: {said}")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_tls_a_key_and_an_end_that_lets_streams_end(
    tmp_path: Path, certificate: tuple[str, str]
) -> None:
    model, port = write_model(tmp_path / "tiny"), free_port()
    trusting = ssl.create_default_context(cafile=certificate[0])

    def ask(path: str, body: Any = None, key: str | None = None, scheme: str = "https") -> Any:
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{scheme}://127.0.0.1:{port}{path}", data, headers)
        return urllib.request.urlopen(asked, timeout=PATIENCE, context=trusting)

    def until_refused() -> None:
        while True:
            ask("/health")
            time.sleep(0.1)

    flags = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1], "api_key": KEY}
    with served(model, port, device="null", null_step_ms=200, **flags) as process:
        for key in (None, "other"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask("/v1/models", key=key)
            assert refused.value.code == 401
        with ask("/v1/models", key=KEY) as answer:
            assert json.load(answer)["data"][0]["id"] == "tiny"
        with pytest.raises(OSError):  # noqa: PT011 -- whatever plain HTTP gets of TLS
            ask("/health", scheme="http").read()

        body = {"prompt": "Hello", "max_tokens": 20, "seed": 1, "stream": True}
        with ask("/v1/completions", {**body, "max_tokens": 240}, KEY) as longer:
            next(line for line in longer if line.startswith(b"data:"))
            with ask("/v1/completions", body, KEY) as answer:
                first = next(line for line in answer if line.startswith(b"data:"))
                process.send_signal(signal.SIGTERM)
                events = [first, *(line for line in answer if line.startswith(b"data:"))]
            with pytest.raises(urllib.error.HTTPError) as refused:
                until_refused()
            assert refused.value.code == 503
            assert json.load(refused.value)["error"]["code"] == "shutting_down"
        assert events[-1].strip() == b"data: [DONE]"
        last = json.loads(events[-2].removeprefix(b"data:"))
        assert last["choices"][0]["finish_reason"] == "length"
        assert process.wait(PATIENCE) == 0
