"""`serve --dry-run` prints a configuration that is the one it was given, and starts nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from tensorray.cluster import app, cli
from tensorray.cluster.config import EngineConfig
from tests.helpers.null_engine import write_model


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "run", lambda *_, **__: pytest.fail("it serves"))


def test_what_is_printed_is_what_would_be_served(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    words = [str(model), "--max-num-seqs=7", "--api-key=open sesame", "--hf-token=hidden"]
    ran = CliRunner().invoke(cli.app, ["serve", *words, "--dry-run"])
    assert ran.exit_code == 0, ran.output
    printed = tmp_path / "printed.yaml"
    printed.write_text(ran.stdout)
    assert "256 tokens" in ran.stdout
    assert "sesame" not in ran.stdout
    assert "hidden" not in ran.stdout
    config = EngineConfig.from_yaml(printed)
    given = EngineConfig(model=str(model), max_num_seqs=7, api_key=["open sesame"])
    assert config == given.model_copy(update={"served_model_name": ["tiny"]})
    assert set(yaml.safe_load(ran.stdout)) == set(EngineConfig.model_fields) - {"hf_token"}


def test_what_can_not_be_served_is_said(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny")
    ran = CliRunner().invoke(cli.app, ["serve", str(model), "--max-model-len=500", "--dry-run"])
    assert ran.exit_code == 2
    assert "more than the 256 positions" in ran.output
    ran = CliRunner().invoke(cli.app, ["serve", str(model), "--max-num-seqs=0", "--dry-run"])
    assert ran.exit_code == 2
    assert "--max-num-seqs" in ran.output
