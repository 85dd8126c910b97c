"""Which GPUs are used, by what CuPy says of them; needs none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tensorray.actors.device import CudaDevice, DeviceError, find_device, has_devices

T4 = {"name": b"Tesla T4", "major": 7, "minor": 5}
A100 = {"name": b"NVIDIA A100", "major": 8, "minor": 0}
RTX = {"name": b"NVIDIA RTX PRO 6000", "major": 12, "minor": 0}

Install = Callable[..., None]


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A CuPy that sees some GPUs, by their properties; nothing runs on any."""

    def installed(*gpus: dict[str, Any]) -> None:
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: len(gpus),
            getDeviceProperties=lambda index: gpus[index],
        )

        def device(index: int) -> Any:
            assert gpus[index]["major"] >= 8, "an old GPU's memory is left alone"
            return contextlib.nullcontext()

        cuda = SimpleNamespace(
            runtime=runtime,
            Device=device,
            Stream=lambda **_: None,
            MemoryPool=lambda: None,
        )
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))

    return installed


@pytest.mark.parametrize("gpu", [A100, RTX])
def test_a_gpu_is_found(
    gpu: dict[str, Any], install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(gpu)
    assert has_devices()
    found = find_device()
    assert found is not None
    assert found.name == gpu["name"].decode()
    assert not caplog.records


def test_a_gpu_that_is_too_old_is_refused(install: Install) -> None:
    install(T4)
    with pytest.raises(DeviceError, match=r"^GPU 0 .*: Tesla T4 .* 7\.5.* 8\.0.*--device cpu$"):
        CudaDevice()


def test_a_gpu_that_is_too_old_is_not_found(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(T4)
    assert find_device() is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Tesla T4 has compute capability 7.5, and 8.0" in record.message
    assert not has_devices()


def test_old_and_new_gpus_of_a_machine(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install(T4, A100)
    assert has_devices()
    assert not caplog.records
    assert find_device(0) is None
    assert "Tesla T4" in caplog.text
    found = find_device(1)
    assert found is not None
    assert found.name == "NVIDIA A100"


def test_no_gpu(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install()
    assert not has_devices()
    assert find_device() is None
    assert not caplog.records
