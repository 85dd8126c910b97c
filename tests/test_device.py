"""Which GPUs are used, by what CuPy says of them; needs none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tensorray.actors.config import ShardConfig
from tensorray.actors.device import CudaDevice, DeviceError, capture, find_device, has_devices
from tensorray.actors.shard_host import load_executor

T4 = {"name": b"Tesla T4", "major": 7, "minor": 5}
A100 = {"name": b"NVIDIA A100", "major": 8, "minor": 0}
RTX = {"name": b"NVIDIA RTX PRO 6000", "major": 12, "minor": 0}

Install = Callable[..., None]


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""

    status = 2  # errorMemoryAllocation


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class Pool:
    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self.allocate = allocate

    def total_bytes(self) -> int:
        return 0


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A CuPy that sees some GPUs, by their properties; nothing runs on any."""

    def installed(*gpus: dict[str, Any]) -> None:
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: len(gpus),
            getDeviceProperties=lambda index: gpus[index],
            errorMemoryAllocation=2,
        )

        def device(index: int) -> Any:
            assert gpus[index]["major"] >= 8, "an old GPU's memory is left alone"
            return contextlib.nullcontext()

        cuda = SimpleNamespace(
            runtime=runtime,
            Device=device,
            Stream=lambda **_: None,
            MemoryPool=Pool,
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
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


def test_a_shard_among_others_does_not_take_a_cpu_for_an_old_gpu(install: Install) -> None:
    install(T4, A100)
    config = ShardConfig("", device="auto", tensor_parallel_size=2)
    with pytest.raises(DeviceError, match="Tesla T4"):
        load_executor(config, 0)


@pytest.mark.parametrize("kept", [0, 70, 100])
def test_graphs_memory_stays_when_there_is_no_more(install: Install, kept: int) -> None:
    """Of a full GPU: what the default pool keeps for nobody is taken."""
    install(A100)
    device = CudaDevice()
    free = [0]

    def take(nbytes: int) -> int:
        if nbytes > free[0]:
            raise CUDARuntimeError
        return nbytes

    def give_back() -> None:
        free[0] = kept

    device._cuda.memory.Memory = take
    device._cuda.memory.MemoryPointer = lambda memory, offset: memory
    device.xp.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=give_back)
    if kept >= 80:
        assert device._recorded.allocate(80) == 80
    else:  # an error that the pool which asks does not answer by giving its own back
        with pytest.raises(MemoryError):
            device._recorded.allocate(80)


def test_no_gpu(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install()
    assert not has_devices()
    assert find_device() is None
    assert not caplog.records


class Stream:
    """A stream whose capture an error has ended."""

    def begin_capture(self) -> None:
        pass

    def end_capture(self) -> str:
        raise CUDARuntimeError("the capture is gone")


def test_a_capture_that_fails_tells_what_failed() -> None:
    cuda = SimpleNamespace(runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError))

    def work() -> None:
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        capture(cuda, Stream(), work)
    with pytest.raises(CUDARuntimeError, match="gone"):
        capture(cuda, Stream(), lambda: None)
