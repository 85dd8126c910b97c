"""Rotary tables against transformers' frequencies, and reading both spellings of their configs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_models

from tensorray.builder.model import ModelConfigError
from tensorray.builder.models.config import ConfigReader, rope_spec
from tensorray.builder.rope import RopeSpec, inverse_frequencies, table

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "fixtures" / "rope.json").read_text()
)


def spec_of(config: dict[str, Any], **options: Any) -> RopeSpec:
    return rope_spec(ConfigReader(config), config["head_dim"], **options)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_frequencies_are_transformers(case: dict[str, Any]) -> None:
    spec = spec_of(case["config"])
    expected = np.array(case["inverse_frequencies"])
    np.testing.assert_allclose(inverse_frequencies(spec), expected, rtol=1e-6)
    assert spec.attention_factor == pytest.approx(case["attention_factor"], rel=1e-12)


def test_table_holds_cosines_then_sines() -> None:
    spec = RopeSpec(rotary_dim=6, max_positions=50, base=100.0, attention_factor=1.25)
    found = table(spec)
    assert found.shape == (50, 6)
    assert found.dtype == np.float32
    angles = np.arange(50)[:, None] / 100.0 ** (np.arange(0, 6, 2) / 6)
    np.testing.assert_allclose(found[:, :3], 1.25 * np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(found[:, 3:], 1.25 * np.sin(angles), atol=1e-5)


def test_context_length_after_the_stretch() -> None:
    """YaRN configs state the length before it; the others, after it."""
    positions = {case["name"]: spec_of(case["config"]).max_positions for case in CASES}
    assert positions == {
        "llama 2": 4096,
        "llama 3.1": 131072,
        "linear, old key": 16384,
        "qwen 2.5 yarn": 131072,
        "yarn, mscale": 163840,
        "yarn, attention factor": 8192,
    }


def test_both_spellings_mean_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {"head_dim": 64, "max_position_embeddings": 131072}
    old = {**sizes, "rope_theta": 5e5, "rope_scaling": scaling}
    new = {**sizes, "rope_parameters": {**scaling, "rope_theta": 5e5}}
    assert spec_of(old) == spec_of(new)
    assert spec_of(old).base == 5e5
    plain = {**sizes, "rope_theta": 5e5, "rope_scaling": None}
    assert spec_of(plain) == RopeSpec(64, 131072, 5e5)
    assert spec_of(sizes, default_base=77.0).base == 77.0
    both = {**sizes, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert spec_of({**both, "rope_scaling": scaling}) == spec_of(new)


def test_parameters_by_layer_type() -> None:
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = {"head_dim": 16, "max_position_embeddings": 64, "rope_parameters": kinds}
    assert spec_of(config, layer_type="full_attention").factor == 8.0
    assert spec_of(config, layer_type="sliding_attention") == RopeSpec(16, 64, 1e4)
    with pytest.raises(ModelConfigError, match="goes by layer type"):
        spec_of(config)
    with pytest.raises(ModelConfigError, match="would not say which"):
        spec_of({**config, "rope_scaling": {"type": "yarn"}}, layer_type="full_attention")


def test_partial_rotation() -> None:
    config = {"head_dim": 64, "max_position_embeddings": 8, "partial_rotary_factor": 0.25}
    assert spec_of(config).rotary_dim == 16
    with pytest.raises(ModelConfigError, match="gives 3 rotary dims"):
        spec_of({**config, "head_dim": 12})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (
            {"rope_type": "longrope", "factor": 2.0},
            "rope_scaling.rope_type: 'longrope' is not supported; "
            "supported: default, linear, llama3, yarn",
        ),
        ({"type": "dynamic", "factor": 2.0}, "rope_scaling.type: 'dynamic' is not supported"),
        ({"type": "linear"}, "rope_scaling.factor: is missing"),
        ({"type": "yarn", "factor": 0}, "rope_scaling.factor: must be a positive number"),
        ({"type": "yarn", "factor": 2.0, "truncate": False}, "truncate: False is not supported"),
        (
            {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
            "high_freq_factor: must be above low_freq_factor (4.0)",
        ),
        ("yarn", "rope_scaling: must be a mapping, not 'yarn'"),
    ],
)
def test_rope_that_cannot_be_honoured_names_the_key(scaling: Any, message: str) -> None:
    config = {"head_dim": 64, "max_position_embeddings": 4096, "rope_scaling": scaling}
    with pytest.raises(ModelConfigError, match=re.escape(message)):
        spec_of(config)


@pytest.mark.parametrize("name", ["llama3", "qwen2-yarn"])
def test_saved_configs_give_the_spec_they_were_made_with(name: str) -> None:
    config = json.loads((tiny_models.directory(name) / "config.json").read_text())
    spec = rope_spec(ConfigReader(config), 8)
    expected = {"llama3": (5e5, "llama3", 8.0, 32), "qwen2-yarn": (1e3, "yarn", 4.0, 32)}
    assert (spec.base, spec.scaling, spec.factor, spec.original_max_positions) == expected[name]
