"""Weights read through pinned buffers are the weights read straight into host memory."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.host_device import HostDevice
from helpers.tiny_models import NAMES, directory

from tensorray.actors import device_weights
from tensorray.actors.device_weights import DevicePlacement
from tensorray.builder.checkpoint import open_checkpoint
from tensorray.builder.load import load_weights
from tensorray.builder.model import ShardWeights
from tensorray.builder.registry import resolve


def load(name: str, place: DevicePlacement | None, dtype: Any, load_format: Any) -> ShardWeights:
    checkpoint = open_checkpoint(str(directory(name)), load_format=load_format)
    try:
        model = resolve(checkpoint.config, None)(checkpoint.config)
        return load_weights(model, checkpoint, dtype=dtype, place=place)
    finally:
        checkpoint.close()


def arrays(weights: ShardWeights) -> dict[str, np.ndarray]:
    groups = {"embed": weights.embed, "head": weights.head}
    groups |= {str(layer): group for layer, group in weights.layers.items()}
    return {f"{key}.{name}": a for key, g in groups.items() for name, a in g.arrays.items()}


def assert_equal(ours: ShardWeights, theirs: ShardWeights) -> None:
    found, expected = arrays(ours), arrays(theirs)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(
            array.astype(np.float32), expected[name].astype(np.float32), err_msg=name
        )


@pytest.mark.parametrize("name", NAMES)
def test_every_family(name: str) -> None:
    device = HostDevice()
    staged = load(name, DevicePlacement(device), np.float32, "auto")
    assert_equal(staged, load(name, None, np.float32, "auto"))
    assert sum(device.uploaded) == sum(
        {id(array): array.nbytes for array in arrays(staged).values()}.values()
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_dtypes_round_once(dtype: Any) -> None:
    staged = load("gemma2", DevicePlacement(HostDevice()), dtype, "auto")
    assert_equal(staged, load("gemma2", None, dtype, "auto"))


def test_few_and_small_buffers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_weights, "_BUFFERS", 1)
    monkeypatch.setattr(device_weights, "_BUFFER_BYTES", 5000)  # larger pieces get their own
    staged = load("gpt2", DevicePlacement(HostDevice()), np.float32, "auto")
    assert_equal(staged, load("gpt2", None, np.float32, "auto"))


def test_a_failing_read_gives_its_buffer_back() -> None:
    place = DevicePlacement(HostDevice())

    def failing(out: Any) -> None:
        raise OSError("the disk is gone")

    for _ in range(30):  # more often than there are buffers
        with pytest.raises(OSError, match="the disk is gone"):
            place.fill(np.zeros(4, np.float32), failing, anywhere=False)


def test_random_weights_are_made_where_they_stay() -> None:
    device = HostDevice()
    made = load("qwen3", DevicePlacement(device), np.float32, "dummy")
    assert device.uploaded == []
    assert_equal(made, load("qwen3", None, np.float32, "dummy"))
