"""The README's and the guide's commands: those marked as run here are, from the checkout, as they
are written; of the others, files, flags, extras, addresses and import paths exist.

What differs from a reader's machine is outside the commands: `Qwen/Qwen3-0.6B` is in the Hub's
cache, but tiny; ports are free ones; `ray start` keeps to itself, and `make` finds a virtual
environment.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from helpers.null_engine import serving, write_model
from helpers.ports import agent_ports, free_port
from helpers.tiny_models import directory
from typer.main import get_command

from tensorray.cluster import cli

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "deploy" / "GUIDE.md")
MARK = "<!-- run by tests/test_readme.py -->\n"
MODEL = "Qwen/Qwen3-0.6B"
PATIENCE = 480.0  # seconds; what is waited for takes a few


@dataclass(frozen=True)
class Block:
    """Fenced code. `run` is whether the page says that it is run here."""

    language: str
    text: str
    run: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fences = re.compile(f"({re.escape(MARK)})?```(\\w+)\n(.*?)```", re.DOTALL)
    found = [Block(kind, code, bool(mark)) for mark, kind, code in fences.findall(text)]
    assert text.count("```") == 2 * len(found)
    assert text.count(MARK.strip()) == sum(block.run for block in found)
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def marked(part: str) -> Block:
    """The block to run that has this text."""
    (found,) = [block for block in BLOCKS if part in block.text and block.run]
    return found


# --- what is not run --------------------------------------------------------------------------


def commands() -> list[str]:
    """Single commands, without comments and continuations."""
    found = []
    for block in BLOCKS:
        if block.language == "bash":
            text = block.text.replace("\\\n", " ")
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                found += [part.strip() for part in shlex.join(words).split("'&&'")]
    return [command for command in found if command]


def known_flags(words: list[str]) -> set[str]:
    """Of the command, or the command of a command, that the words begin with."""
    command: Any = get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words[0]]
        words = words[1:]
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


def makefile_targets() -> set[str]:
    (line,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(line.split())


@pytest.mark.parametrize("command", commands())
async def test_a_command_names_what_there_is(command: str, tmp_path: Path) -> None:
    program, *words = shlex.split(command)
    flags = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
    match program:
        case "make":
            assert {word for word in words if "=" not in word} <= makefile_targets()
        case "pip":
            extras = (ROOT / "pyproject.toml").read_text()
            wanted = re.findall(r"\w+", "".join(re.findall(r"\[(.*?)\]", words[-1])))
            assert all(f"\n{extra} = [" in extras for extra in wanted)
        case "tensorray":
            assert flags <= known_flags(words)
        case "curl":
            (url,) = [word for word in words if word.startswith("http")]
            path = re.sub(r"https?://[^/]+", "", url)
            known = await served_paths(tmp_path)
            assert any(re.fullmatch(pattern, path) for pattern in known)
            assert flags <= {"-H", "-d", "-N", "-X"}
        case "serve":
            assert words[0] == "deploy"
            assert (ROOT / words[1]).is_file()  # test_serve_configs.py reads them
        case "ray":
            assert words in (["start", "--head"], ["get-auth-token", "--generate"])
        case "export":
            assert words == ["RAY_AUTH_MODE=token"]
        case script:
            assert script.startswith("deploy/examples/")
            assert os.access(ROOT / script, os.X_OK)
            inner = (ROOT / script).read_text().rsplit("-- tensorray ", 1)[1].split()[0]
            assert flags <= known_flags([inner])


async def served_paths(tmp_path: Path) -> list[str]:
    async with serving(write_model(tmp_path / "model")) as (http, _):
        schema = (await http.get("/openapi.json")).json()
    return [re.sub(r"\{\w+\}", "[^ ]+", path) for path in schema["paths"]]


def test_python_imports_what_there_is() -> None:
    for block in BLOCKS:
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom):
                    module = import_module(node.module or "")
                    for each in node.names:
                        found = hasattr(module, each.name)
                        assert found or find_spec(f"{node.module}.{each.name}")


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "json", "yaml", "text"}


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\[[^\]]+\]\(([^)h][^)]*)\)", page.read_text())
    assert targets
    for target in targets:
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"there is no {target}"
        assert not heading or heading in anchors(there), f"there is no {target}"


# --- what is run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """A reader's machine: the checkout to work in, and the environment of a shell."""

    place: Path
    environment: dict[str, str]
    http: int  # what README calls port 8000

    def run(self, block: Block, prelude: str = "") -> str:
        """A block's output; it must succeed."""
        text = block.text.replace(":8000", f":{self.http}")
        if block.language == "python":
            command = [sys.executable, "-c", text]
        else:
            command = ["bash", "-ec", f"{prelude}\n{text}"]
        done = subprocess.run(
            command,
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def with_(self, **more: str) -> Machine:
        return replace(self, environment={**self.environment, **more})


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    place = Path(tempfile.mkdtemp(prefix="readme-", dir="/tmp"))  # paths of sockets must be short
    port = free_port()
    for path in ROOT.iterdir():
        if path.name not in ("deploy", "build") and not path.name.startswith("."):
            (place / path.name).symlink_to(path)
    shutil.copytree(ROOT / "deploy", place / "deploy", symlinks=True)
    for path in (place / "deploy").glob("*.yaml"):
        path.write_text(path.read_text().replace("port: 8000", f"port: {port}"))
    publish(place / "hub")
    venv = place / "venv"
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / ".installed-demo").touch()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TENSORRAY_STORE": str(place / "store"),
        "OMP_NUM_THREADS": "1",
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
        "RAY_TMPDIR": str(place),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "MAKEFLAGS": f"VENV={venv} ONCE=1 PORT={port}",
    }
    environment.pop("RAY_ADDRESS", None)
    yield Machine(place, environment, port)
    shutil.rmtree(place, ignore_errors=True)


def publish(home: Path) -> None:
    """Put a tiny model into the Hub's cache under README's name for a larger one."""
    folder = home / "hub" / f"models--{MODEL.replace('/', '--')}"
    revision = "0" * 40
    snapshot = folder / "snapshots" / revision
    shutil.copytree(directory("qwen3"), snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)


@pytest.fixture(scope="module")
def cluster(machine: Machine) -> Iterator[Machine]:
    """README's cluster and the service on it: `ray start` and `serve deploy` as it says.

    `ray start` stays in the foreground, so that it ends with this test and no other.
    """
    gcs, dashboard = free_port(), free_port()
    agents = agent_ports()
    flags = (
        f"--port={gcs} --dashboard-port={dashboard} "
        f"--dashboard-agent-listen-port={agents['dashboard_agent_listen_port']} "
        f"--dashboard-agent-grpc-port={agents['metrics_agent_port']} "
        f"--metrics-export-port={agents['metrics_export_port']} "
        f"--runtime-env-agent-port={agents['runtime_env_agent_port']} "
        "--num-cpus=4 --disable-usage-stats --block"
    )
    url = f"http://127.0.0.1:{dashboard}"
    log = machine.place / "ray.log"
    prelude = f"""
        ray() {{
            case "$1" in start) ;; *) command ray "$@"; return;; esac
            command ray "$@" {flags} >{log} 2>&1 & echo $! >{machine.place}/ray.pid
            for i in $(seq {int(PATIENCE)}); do
                command curl -s {url}/api/version >/dev/null && return
                kill -0 $! || break
                sleep 1
            done
            cat {log}; return 1
        }}
        curl() {{  # the service starts
            for i in $(seq {int(PATIENCE)}); do command curl -sf "$@" && return; sleep 1; done
            return 1
        }}
    """
    # Ray keeps its token in the home directory.
    there = machine.with_(RAY_DASHBOARD_ADDRESS=url, HOME=str(machine.place))
    try:
        said = there.run(marked("ray start --head"), prelude)
        assert '"qwen3-0.6b"' in said, said
        yield there.with_(RAY_ADDRESS=f"127.0.0.1:{gcs}", DASHBOARD=url, RAY_AUTH_MODE="token")
    finally:
        stop(int((machine.place / "ray.pid").read_text()))


def stop(pid: int) -> None:
    with suppress(ProcessLookupError):  # it failed to start, which was told
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.model
def test_demo(machine: Machine) -> None:
    said = machine.run(marked("make demo"))
    assert f"Healthy on http://127.0.0.1:{machine.http}" in said
    assert re.search(r"\d+ tokens, [0-9.]+ tok/s; first token after \d+ ms", said)


@pytest.mark.model
def test_offline(machine: Machine) -> None:
    """Without Ray: the library, and a file of prompts."""
    from tensorray.cluster.demo import model_path

    (machine.place / "model.gguf").unlink(missing_ok=True)
    (machine.place / "model.gguf").symlink_to(model_path())
    assert machine.run(marked("with LLM(")).strip()
    (machine.place / "prompts.jsonl").write_text('{"prompt": "Once upon a time"}\n')
    (answer,) = machine.run(marked("tensorray generate")).splitlines()
    assert json.loads(answer)["text"].strip()


def answers(path: Path) -> list[str]:
    """The lines' names, all of them answered."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["response"]["status_code"] == 200 for line in lines), lines
    return [line["custom_id"] for line in lines]


def test_batch(machine: Machine) -> None:
    machine.run(marked("-o answers.jsonl"))
    assert answers(machine.place / "answers.jsonl") == ["sky", "story"]


@pytest.mark.ray
def test_service(cluster: Machine) -> None:
    """`serve deploy`, then curl and another Ray program."""
    (chat,) = [block for block in BLOCKS if "/v1/chat/completions -H" in block.text]
    asked = chat.text[chat.text.index("curl ") :]
    said = cluster.run(replace(chat, text=asked))
    assert said.count("data: ") > 2
    assert said.strip().endswith("data: [DONE]")
    assert len(cluster.run(marked("get_app_handle"))) > 1


@pytest.mark.ray
def test_jobs(cluster: Machine) -> None:
    """`ray job submit`, of a build and of a file of requests."""
    jobs = cluster.with_(RAY_ADDRESS=cluster.environment["DASHBOARD"], NUM_GPUS="0")
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'tensorray[rtx]'")
    shutil.rmtree(cluster.place / "store", ignore_errors=True)  # what a first try built
    built = jobs.run(marked("build_job.sh"))
    assert "succeeded" in built
    assert re.search(r", for sm_89: \d", built), built
    assert re.search(r"sm_89, tensorrt_rtx +│ +(\d+) │ +0 │ +\1 │ +0 │", built), built
    assert list((cluster.place / "store").rglob("*.json"))
    data = cluster.place / "data"
    data.mkdir(exist_ok=True)
    shutil.copy(ROOT / "deploy" / "examples" / "batch.jsonl", data / "in.jsonl")
    block = marked("batch_job.sh")
    assert "succeeded" in jobs.run(replace(block, text=block.text.replace("/data", str(data))))
    assert answers(data / "out.jsonl") == ["sky", "story"]


def test_what_is_marked_is_run() -> None:
    """After the others: a mark on a block that no test above runs would be a lie."""
    source = Path(__file__).read_text()
    for block in BLOCKS:
        if block.run:
            parts = re.findall(r'marked\("(.+?)"\)', source)
            assert any(part in block.text for part in parts), block.text
