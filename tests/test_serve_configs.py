"""The Serve configs in deploy/ work as written: they parse, import, and build an application."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
from ray.serve.schema import ServeDeploySchema

from tensorray.cluster import app, demo
from tensorray.cluster.config import EngineConfig

DEPLOY = Path(__file__).parents[1] / "deploy"
CONFIGS = sorted(DEPLOY.glob("*.yaml"))


def config_of(application: Any) -> EngineConfig:
    config, *_ = application._bound_deployment.init_args
    assert isinstance(config, EngineConfig)
    return config


def test_there_are_some() -> None:
    assert {path.name for path in CONFIGS} >= {"demo.yaml", "model.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "model_path", lambda: tmp_path / "demo.gguf")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.http_options.host == "127.0.0.1"
    for application in schema.applications:
        module, name = application.import_path.split(":")
        built = build(getattr(import_module(module), name), application.args)
        config = config_of(built)
        for field, value in application.args.items():
            assert getattr(config, field) == value
    assert len({application.name for application in schema.applications}) == len(
        schema.applications
    )


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="max_modle_len"):
        build(app.build_app, {"model": "m", "max_modle_len": 5})


def test_arguments_may_be_text() -> None:
    config = config_of(build(app.build_app, {"model": "org/m", "max_num_seqs": "7"}))
    assert config.max_num_seqs == 7
    assert config.served_model_name == ["org/m"]


def test_local_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    for name in ("weights.gguf", "dir/mine.py", "dir/t.jinja"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    config = app.settled(
        EngineConfig(
            model="weights.gguf",
            tokenizer="org/tokenizer",
            model_class="dir/mine.py:Mine",
            chat_template="dir/t.jinja",
        )
    )
    assert config.model == str(tmp_path / "weights.gguf")
    assert config.served_model_name == ["weights"]
    assert config.tokenizer == "org/tokenizer"
    assert config.model_class == f"{tmp_path}/dir/mine.py:Mine"
    assert config.chat_template == str(tmp_path / "dir/t.jinja")
    inline = "{{ messages }}" * 500
    assert app.settled(EngineConfig(model="m", chat_template=inline)).chat_template == inline
    for store in ("s3://bucket/plans", "memory://plans", None):
        assert app.settled(EngineConfig(model="m", plan_store=store)).plan_store == store
    store = app.settled(EngineConfig(model="m", plan_store="not-there-yet")).plan_store
    assert store == str(Path.cwd() / "not-there-yet")


def test_replicas_that_prefill_are_a_deployment_of_their_own() -> None:
    def deployments(**args: object) -> dict[str, int]:
        built: Any = build(app.build_app, {"model": "m", "data_parallel_size": 2, **args})
        _, *routers = built._bound_deployment.init_args
        return {
            each._bound_deployment.name: each._bound_deployment.num_replicas for each in routers
        }

    assert deployments() == {"Router": 2}
    assert deployments(prefill_replicas=3) == {"Router": 2, "Prefill": 3}
