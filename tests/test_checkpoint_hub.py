"""Models of the Hub: fetched from a Hub on this machine, and read from its cache offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from helpers import tiny_models
from helpers.gguf_files import write_gguf

from tensorray.builder.checkpoint import CheckpointError, open_checkpoint, open_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Hub cache that holds one model, as huggingface_hub lays it out."""
    repo = tmp_path / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in tiny_models.directory("llama2").iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_from_the_cache_alone(cache: Path, revision: str | None) -> None:
    checkpoint = open_checkpoint("org/tiny", revision=revision, cache_dir=str(cache), offline=True)
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.path == cache / "models--org--tiny" / "snapshots" / COMMIT
    assert "lm_head.weight" in set(checkpoint.names())
    checkpoint.close()


def test_not_in_the_cache(cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'org/other'.*offline is set: fetch it once"):
        open_checkpoint("org/other", cache_dir=str(cache), offline=True)
    with pytest.raises(CheckpointError, match=r"'org/tiny'.*revision v2.*offline is set"):
        open_checkpoint("org/tiny", revision="v2", cache_dir=str(cache), offline=True)


def test_only_the_small_files_in_the_cache(cache: Path) -> None:
    next(cache.rglob("model.safetensors")).unlink()
    assert open_files("org/tiny", cache_dir=str(cache), offline=True).config["vocab_size"] == 272
    with pytest.raises(CheckpointError, match="only parts of it are in the Hub cache"):
        open_checkpoint("org/tiny", cache_dir=str(cache), offline=True)


def test_not_a_hub_id(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a local file or directory nor a valid Hub"):
        open_checkpoint("org/ti ny!", cache_dir=str(cache), offline=True)


# --- a Hub on this machine ------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The few endpoints downloads use. `repositories` maps an id to its files."""

    address: str
    repositories: dict[str, dict[str, bytes]]
    requested: list[str]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = unquote(self.path.partition("?")[0]).strip("/").removeprefix("api/models/")
        org, name, kind, revision, *rest = [*path.split("/"), "", "", ""]
        repo, file = f"{org}/{name}", "/".join(part for part in rest if part)
        files = self.repositories.get(repo)
        if files is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if repo == "org/gated" and self.headers.get("Authorization") != "Bearer secret":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        if revision not in ("", "main", COMMIT):
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if kind == "tree":
            listing = [
                {"type": "file", "path": path, "size": len(data), "oid": etag(data)}
                for path, data in files.items()
            ]
            return self.reply(200, json.dumps(listing).encode(), {}, body)
        if kind == "resolve":
            if file not in files:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            if body:
                self.requested.append(file)
            headers = {"ETag": f'"{etag(files[file])}"', "X-Repo-Commit": COMMIT}
            return self.reply(200, files[file], headers, body)
        siblings = [{"rfilename": path} for path in files]
        info = {"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings}
        return self.reply(200, json.dumps(info).encode(), {}, body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same model under an index; its one shard has a name of its own."""
    data = dict(files)
    data["shard-a.safetensors"] = data.pop("model.safetensors")
    length = int.from_bytes(data["shard-a.safetensors"][:8], "little")
    names = json.loads(data["shard-a.safetensors"][8 : 8 + length])
    weight_map = {name: "shard-a.safetensors" for name in names if name != "__metadata__"}
    data["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    return data


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    directory = tiny_models.directory("llama2")
    tiny = {file.name: file.read_bytes() for file in directory.iterdir() if file.suffix != ".npz"}
    unwanted = {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"twice",
        "original/params.json": b"{}",
        "onnx/model.onnx": b"onnx",
        "README.md": b"words",
        "model.fp16.safetensors": b"variant",
    }
    pickled = {name: data for name, data in tiny.items() if name != "model.safetensors"}
    quantized = write_gguf(tmp_path / "tiny.gguf", directory).read_bytes()

    class Handler(Hub):
        repositories = {  # noqa: RUF012
            "org/tiny": {**tiny, **unwanted},
            "org/gated": tiny,
            "org/sharded": {**sharded(tiny), **unwanted},
            "org/pickled": {**pickled, "pytorch_model.bin": b"pickle"},
            "org/gguf": {"README.md": b"", "tiny-Q8_0.gguf": quantized, "tiny-F16.gguf": b"x"},
            "org/data": {"README.md": b""},
        }
        requested: list[str] = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Handler
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
from tensorray.builder.checkpoint import CheckpointError, open_checkpoint, open_files

for call in json.load(sys.stdin):
    light = call.pop("light", False)
    try:
        opened = (open_files if light else open_checkpoint)(**call)
        print(json.dumps(str(opened.path)))
    except CheckpointError as error:
        print(json.dumps(f"CheckpointError: {error}"))
"""


def run(hub: type[Hub], cache: Path, *calls: dict[str, Any]) -> tuple[list[str], str]:
    """What each call gave, and the standard error output of them all. The Hub library takes its
    address at import, so the calls run in a process of their own."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    calls_in = json.dumps([{"cache_dir": str(cache), **call} for call in calls])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=calls_in,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_downloads_what_is_needed_and_no_more(hub: type[Hub], tmp_path: Path) -> None:
    (light,), _ = run(hub, tmp_path / "a", {"model": "org/tiny", "light": True})
    assert sorted(os.listdir(light)) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    cache = tmp_path / "b"
    paths, errors = run(hub, cache, {"model": "org/tiny"}, {"model": "org/sharded"})
    assert "model.safetensors" in os.listdir(paths[0])
    assert "shard-a.safetensors" in os.listdir(paths[1])
    unwanted = {"pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors"}
    unwanted |= {"README.md", "original/params.json", "onnx/model.onnx"}
    assert not unwanted & set(hub.requested)
    assert "%|" not in errors  # no bars
    hub.requested.clear()
    offline = {"model": "org/tiny", "offline": True}
    hub.repositories.clear()
    again, _ = run(hub, cache, offline)
    assert again == paths[:1]
    assert not hub.requested


def test_progress_is_shown_when_asked_for(hub: type[Hub], tmp_path: Path) -> None:
    _, errors = run(hub, tmp_path / "cache", {"model": "org/tiny", "progress": True})
    assert "%|" in errors


def test_one_file_of_a_repository_of_gguf_files(hub: type[Hub], tmp_path: Path) -> None:
    repository: dict[str, Any] = {"model": "org/gguf"}
    calls: list[dict[str, Any]] = [
        {"model": "org/gguf/tiny-Q8_0.gguf"},
        repository,
        {**repository, "light": True},
    ]
    (path, *refusals), _ = run(hub, tmp_path / "cache", *calls)
    assert Path(path).name == "tiny-Q8_0.gguf"
    for refusal in refusals:
        assert "name one of them as the model: org/gguf/tiny-Q8_0.gguf, org/gguf/" in refusal
    assert hub.requested == ["tiny-Q8_0.gguf"]


ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"model": "org/absent"}, ["no such local path", "no such model on the Hub", "token"]),
    ({"model": "org/gated"}, ["gated", "accept its terms", "--hf-token"]),
    ({"model": "org/tiny", "revision": "v9"}, ["revision v9", "no such revision"]),
    ({"model": "org/pickled"}, ["pickles", "never loaded", "convert them to safetensors"]),
    ({"model": "org/data"}, ["has no config.json"]),
    ({"model": "org/gguf/absent.gguf"}, ["no such file"]),
]


def test_errors_say_what_to_do(hub: type[Hub], tmp_path: Path) -> None:
    answers, _ = run(hub, tmp_path / "cache", *(call for call, _ in ERRORS))
    for (call, words), answer in zip(ERRORS, answers, strict=True):
        assert answer.startswith("CheckpointError"), call
        assert call["model"] in answer
        for word in words:
            assert word in answer, call
    assert "pytorch_model.bin" not in hub.requested
    (path,), _ = run(hub, tmp_path / "cache", {"model": "org/gated", "token": "secret"})
    assert Path(path, "model.safetensors").is_file()


def test_a_hub_that_is_not_there(hub: type[Hub], tmp_path: Path) -> None:
    hub.address = "http://127.0.0.1:9"
    (answer,), _ = run(hub, tmp_path / "cache", {"model": "org/tiny"})
    assert "the Hub can't be reached" in answer
    assert "check the network" in answer
