"""What deploy/ holds beside Serve configs: it parses, and names only what there is."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve.schema import ServeDeploySchema
from typer.main import get_command

from tensorray.cluster import cli
from tests.helpers.null_engine import LocalBackend

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
IMAGE = "tensorray:0.1.0"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    found = spec["rayClusterConfig" if document["kind"] == "RayService" else "rayClusterSpec"]
    assert isinstance(found, dict)
    return found


def check_command(text: str) -> None:
    """A `tensorray` command line whose flags exist."""
    program, *arguments = shlex.split(text)
    assert program.endswith("tensorray")
    command: Any = get_command(cli.app).commands[arguments[0]]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    flags = [word for word in arguments[1:] if word.startswith("-")]
    assert flags
    assert set(flags) <= known


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest(path: Path) -> None:
    first, *_ = documents(path)
    assert (first["apiVersion"], path.stem.endswith("job")) == (
        "ray.io/v1",
        first["kind"] == "RayJob",
    )
    cluster = cluster_of(first)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["image"] == IMAGE
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    if first["kind"] == "RayJob":
        check_command(first["spec"]["entrypoint"])


def test_the_service_serves_what_its_manifest_says() -> None:
    service, policy = documents(DEPLOY / "kubernetes" / "rayservice.yaml")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = schema.applications
    module, name = application.import_path.split(":")
    build(getattr(import_module(module), name), application.args)
    pod = cluster_of(service)["headGroupSpec"]["template"]["spec"]
    mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    assert str(Path(application.args["api_key_file"]).parent) in mounts
    open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert [port["port"] for rule in open_to_all for port in rule["ports"]] == [
        schema.http_options.port
    ]


def test_the_container_holds_the_project_and_runs_as_nobody_special() -> None:
    text = (DEPLOY / "container" / "Dockerfile").read_text()
    stages = re.split(r"^FROM .*$", text, flags=re.MULTILINE)[1:]
    assert len(stages) == 2
    assert re.search(r"^USER (?!0|root)", stages[-1], re.MULTILINE)
    assert f"-t {IMAGE} " in text
    copied = set(re.findall(r"^COPY (?!--from)(.*) \S+$", stages[0], re.MULTILINE))
    sources = {name for line in copied for name in line.split()}
    assert sources >= {"pyproject.toml", "setup.py", "README.md", "builder", "kernels", "deploy"}
    assert all((ROOT / name).exists() for name in sources)
    kept = (DEPLOY / "container" / "Dockerfile.dockerignore").read_text().split()
    assert {name[1:] for name in kept if name.startswith("!")} == sources
    tables = (ROOT / "pyproject.toml").read_text()
    (extras,) = re.findall(r"'\.\[(.*)\]'", stages[0])
    assert all(f"\n{extra} = [" in tables for extra in extras.split(","))


def test_the_unit_starts_a_command_that_exists() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "systemd" / "tensorray.service")
    check_command(unit["Service"]["ExecStart"])
    assert "--host 127.0.0.1" in unit["Service"]["ExecStart"]
    assert unit["Service"]["User"] == "tensorray"


def expressions() -> list[tuple[str, str]]:
    rules = yaml.safe_load((DEPLOY / "monitoring" / "rules.yml").read_text())
    found = [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((DEPLOY / "monitoring" / "grafana-dashboard.json").read_text())
    for panel in board["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel["targets"]]
    return [*found, ("model", board["templating"]["list"][1]["query"])]


async def test_rules_and_dashboard_ask_for_metrics_that_exist() -> None:
    async with LocalBackend() as backend:
        backend._metrics.failed("its shard is gone")
        scrape = (await backend.metrics()).decode()
    families = list(text_string_to_metric_families(scrape))
    exported = {sample.name for family in families for sample in family.samples}
    labels = {name for family in families for sample in family.samples for name in sample.labels}
    asked = set()
    for where, text in expressions():
        names = set(re.findall(r"tensorray:\w+", text))
        assert names <= exported, where
        used = set(re.findall(r"[{,]\s*(\w+)\s*=", text)) - {"job"}
        for group in re.findall(r"by \(([\w, ]+)\)", text):
            used |= set(re.split(r", *", group))
        assert used <= labels, where
        assert text.count("(") == text.count(")"), where
        asked |= names
    bases = {re.sub("_(bucket|sum|count|created)$", "", name) for name in exported}
    shown = {re.sub("_bucket$", "", name) for name in asked}
    assert bases - shown == {"tensorray:last_shard_failure_seconds"}  # told in an alert's text


def test_the_dashboard_has_a_place_for_each_panel() -> None:
    board = json.loads((DEPLOY / "monitoring" / "grafana-dashboard.json").read_text())
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in board["panels"]})
    config = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())
    assert all((DEPLOY / "monitoring" / name).exists() for name in config["rule_files"])
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    for _, text in expressions():
        assert set(re.findall(r'job="(\w+)"', text)) <= jobs


@pytest.mark.parametrize("name", ["build_job.sh", "batch_job.sh"])
def test_job_scripts_submit_what_they_are_given(name: str, tmp_path: Path) -> None:
    (tmp_path / "ray").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "ray").chmod(0o755)
    ran = subprocess.run(
        [str(DEPLOY / "examples" / name), "--model", "a b"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = ran.stdout.splitlines()
    assert words[:2] == ["job", "submit"]
    end = words.index("--")
    assert words[end:] == ["--", "tensorray", name.split("_")[0], "--model", "a b"]


def test_flags_of_the_guide_exist() -> None:
    commands: Any = get_command(cli.app).commands  # type: ignore[attr-defined]
    known = {
        name
        for command in commands.values()
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    text = (ROOT / "deploy" / "GUIDE.md").read_text()
    section = text[text.index("## Coming from vLLM") :]
    rows = [row.strip("|").split("|") for row in section.splitlines() if row.startswith("|")]
    prose = section[: section.index("| vLLM |")]
    ours = " ".join([prose, *(row[-1] for row in rows)])
    used = set(re.findall(r"--[a-z][a-z-]*\b", ours))
    assert len(used) > 40
    assert used <= known
