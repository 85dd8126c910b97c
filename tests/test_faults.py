"""A clock that jumps, a disk that is full, an ingress that dies under load."""

from __future__ import annotations

import ast
import asyncio
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.null_engine import serving, write_model

ROOT = Path(__file__).parents[1]
ROOMS = ("actors", "builder", "cluster", "deploy", "kernels")

# --- clock -------------------------------------------------------------------------------------

CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}
# A file's time of change is by the same clock.
ALLOWED = {("builder/store.py", "_sweep")}


def measured(path: Path) -> Iterator[str]:
    """Functions in which the time of day is added to, subtracted from or compared with: whoever
    wants to know how long something takes has to ask a clock that nobody sets."""
    for function in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
                operands = [node.left, node.right]
            elif isinstance(node, ast.Compare):
                operands = [node.left, *node.comparators]
            else:
                continue
            for operand in operands:
                if isinstance(operand, ast.Call) and ast.unparse(operand.func) in CLOCKS:
                    yield function.name


def test_no_duration_is_taken_from_the_time_of_day(tmp_path: Path) -> None:
    found = {
        (str(path.relative_to(ROOT)), name)
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for name in measured(path)
    }
    assert found == ALLOWED
    bad = tmp_path / "bad.py"
    bad.write_text("import time\ndef f(a):\n    return time.time() - a, a < time.time()\n")
    assert list(measured(bad)) == ["f", "f"]


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    limits = {
        "request_timeout_seconds": 600.0,
        "read_timeout_seconds": 600.0,
        "api_key": ["key"],
        "api_key_requests_per_minute": 2,
    }
    model = write_model(tmp_path / "tiny")
    true = time.time
    async with serving(model, limits=limits, step_ms=10) as (client, backend):
        headers = {"Authorization": "Bearer key"}
        body = {"prompt": "Hello", "max_tokens": 100, "seed": 1, "ignore_eos": True}
        whole = await client.post("/v1/completions", json=body, headers=headers)
        stream = {**body, "stream": True}
        asked = asyncio.create_task(client.post("/v1/completions", json=stream, headers=headers))
        while backend.engine.scheduler.stats().running == 0:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(time, "time", lambda: true() + jump)
        assert backend.engine.waits < 600
        backend.engine.check(step_timeout=600.0)
        answer = await asked
        monkeypatch.undo()
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
        assert text == whole.json()["choices"][0]["text"]
        # An hour that the clock made up gives a key no more requests.
        assert (await client.post("/v1/completions", json=body, headers=headers)).status_code == 429


# --- disk --------------------------------------------------------------------------------------


def test_a_batch_on_a_full_disk_says_so_and_goes_on_later(tmp_path: Path) -> None:
    """A limit on a file's size stands for the disk: the same write fails."""
    model = write_model(tmp_path / "tiny")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {
            "custom_id": f"line-{number}",
            "url": "/v1/completions",
            "body": {"prompt": "Hi", "max_tokens": 3, "seed": number},
        }
        for number in range(12)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "tensorray.cluster.cli", "batch", "-i", str(source)]
    command += ["-o", str(target), f"--model={model}", "--device=null", "--num-kv-blocks=256"]

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    failed = subprocess.run(command, capture_output=True, text=True, preexec_fn=small)
    assert failed.returncode == 1
    assert "can't be written" in failed.stderr
    assert "The same command goes on from here." in failed.stderr
    assert "Traceback" not in failed.stderr
    assert 0 < len(target.read_bytes()) <= 2000
    begun = target.read_text().splitlines()[0]
    subprocess.run(command, capture_output=True, check=True)
    answered = [json.loads(line) for line in target.read_text().splitlines()]
    assert [each["custom_id"] for each in answered] == [line["custom_id"] for line in lines]
    assert target.read_text().splitlines()[0] == begun


# --- an ingress --------------------------------------------------------------------------------


@pytest.mark.ray
def test_an_ingress_that_dies_takes_its_own_streams_alone(serve_port: int) -> None:
    from tests.soak import faults

    (row,) = faults.run(serve_port, 8, ["ingress"], 0)
    assert row.wrong == 0
    # Those it had, and what was sent to it until Serve noticed.
    assert row.errors <= 16 <= row.answers
    assert row.told <= faults.CUT_OFF
