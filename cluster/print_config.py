"""`tensorray serve --dry-run`: the whole configuration, as it would be served, on stdout."""

from __future__ import annotations

from typing import Any

import typer
import yaml

from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import Frontend

#: What is no one's business who reads a terminal or a log.
_SECRETS = ("hf_token",)


def run(config: EngineConfig) -> None:
    """Check what can be without a device, and print every setting as YAML that `--config` reads.

    Raises what loading the model's small files does, for one that can't be served.
    """
    frontend = Frontend.load(config)
    typer.echo(f"# As it would be served; the context is {frontend.max_model_len} tokens.")
    typer.echo(to_yaml(config), nl=False)


def to_yaml(config: EngineConfig) -> str:
    """Every setting, defaults included; keys as their digests, other secrets left out."""
    settings: dict[str, Any] = config.model_dump(mode="json")
    settings["served_model_name"] = config.names()
    for name in _SECRETS:
        if settings[name] is not None:
            del settings[name]
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
