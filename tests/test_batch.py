"""`tensorray batch`: files in OpenAI's batch format, answered in order, resumable."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tensorray.cluster import batch
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.usage_error import UsageError
from tests.helpers.null_engine import write_model

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SMALL: dict[str, Any] = {"device": "null", "num_kv_blocks": 256, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def request(name: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    body = body or {"prompt": "Hi", "max_tokens": 3}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: dict[str, Any] | str) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_is_answered_in_order(model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(
        source,
        request("long", prompt="Hi", max_tokens=100, ignore_eos=True),
        request("chat", CHAT, messages=[{"role": "user", "content": "Hi"}], max_tokens=2, n=2),
        "",
        "{not JSON",
        "[]",
        {"url": COMPLETIONS, "body": {}},
        request("chat"),
        request("url", "/v1/images"),
        {**request("method"), "method": "GET"},
        {**request("body"), "body": "Hi"},
        request("stream", prompt="Hi", stream=True),
        request("model", prompt="Hi", model="another"),
        request("range", prompt="Hi", temperature=-1),
        request("last"),
    )
    batch.run(EngineConfig(model=str(model), **SMALL), str(source), str(target))
    found = answers(target)
    assert [
        (each["custom_id"], each["error"]["code"] if each["error"] else None) for each in found
    ] == [
        ("long", None),
        ("chat", None),
        (None, "invalid_json_line"),
        (None, "invalid_json_line"),
        (None, "missing_custom_id"),
        ("chat", "duplicate_custom_id"),
        ("url", "invalid_url"),
        ("method", "invalid_method"),
        ("body", "invalid_body"),
        ("stream", "stream_not_supported"),
        ("model", None),
        ("range", None),
        ("last", None),
    ]
    assert "line 4" in found[2]["error"]["message"]  # as an editor counts
    statuses = {
        each["custom_id"]: each["response"]["status_code"] for each in found if each["response"]
    }
    assert statuses == {"long": 200, "chat": 200, "model": 404, "range": 400, "last": 200}
    assert found[0]["response"]["body"]["usage"]["completion_tokens"] == 100
    chat = found[1]["response"]["body"]
    assert (chat["object"], len(chat["choices"])) == ("chat.completion", 2)
    assert found[11]["response"]["body"]["error"]["param"] == "temperature"
    assert len({each["id"] for each in found}) == len(found)


def test_a_killed_batch_goes_on_where_it_ended(model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, *(request(f"r{i}", prompt=f"Hi {i}", max_tokens=5) for i in range(300)))
    command = [sys.executable, "-m", "tensorray.cluster.cli", "batch", "-i", str(source)]
    command += ["-o", str(target), "--model", str(model), "--device", "null"]
    command += ["--num-kv-blocks", "256", "--max-num-seqs", "4"]
    process = subprocess.Popen([*command, "--null-step-ms", "20"], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not target.exists() or target.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = target.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    assert 5 <= whole.count(b"\n") < 300
    target.write_bytes(whole + b'{"id": "batch_req_1", "cust')  # as if amid a line
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "300 of 300 lines" in finished.stderr
    assert target.read_bytes().startswith(whole)  # nothing was done twice
    found = answers(target)
    assert [each["custom_id"] for each in found] == [f"r{i}" for i in range(300)]
    assert {each["response"]["status_code"] for each in found} == {200}


def test_files_that_do_not_go_together(model: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(model), **SMALL)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, request("a"), request("b"))
    with pytest.raises(UsageError, match="overwrite"):
        batch.run(config, str(source), str(tmp_path / "." / "in.jsonl"))
    write(target, {"custom_id": "a"}, {"custom_id": "c"})
    with pytest.raises(UsageError, match="line 2 answers another input"):
        batch.run(config, str(source), str(target))
    write(target, {"custom_id": "a"}, {"custom_id": "b"}, {"custom_id": "c"})
    with pytest.raises(UsageError, match="line 3 answers another input"):
        batch.run(config, str(source), str(target))
    assert len(answers(target)) == 3  # left as they were
    with target.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another batch is writing"):
            batch.run(config, str(source), str(target))


async def test_an_engine_that_fails_ends_the_batch_with_what_is_done(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        bad = b"third" in (await receive())["body"]
        body = b'{"error": {"message": "its shard is gone."}}' if bad else b"{}"
        await send({"type": "http.response.start", "status": 503 if bad else 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    source = tmp_path / "in.jsonl"
    write(source, *(request(name, prompt=name) for name in ("first", "second", "third", "fourth")))
    lines = list(batch.read(source))
    with (tmp_path / "out.jsonl").open("ab+") as output:
        with pytest.raises(batch.BatchFailed, match="goes on from here"):
            await batch.answer(app, lines, output, 0, window=2)
        assert batch.resume(lines, output, "out.jsonl") == 2
