"""The device a shard runs on, behind as much of CuPy as a shard needs.

`Device` is that interface; `CudaDevice` is it on an NVIDIA GPU. CuPy is imported when a GPU is
asked for, so that a machine without one need not have it.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.communicator import Communicator
from tensorray.kernels.cuda.compiler import CompileError, LaunchError
from tensorray.kernels.cuda.cublas import CublasError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# There when NVIDIA's driver is loaded.
_DRIVER = Path("/proc/driver/nvidia/version")
_HINT = (
    "pip install '.[gpu]' in Tensorray's source brings CuPy and CUDA's libraries; or run with "
    "--device cpu"
)
_LESS = (
    "--tensor-parallel-size splits a model over GPUs, a quantized checkpoint is smaller, "
    "--max-num-batched-tokens and --max-num-seqs lower what a step needs, and "
    "--gpu-memory-utilization what the KV cache takes"
)
#: The compute capability that the kernels' instructions need: cp.async, products of bfloat16.
LEAST_CAPABILITY = (8, 0)


class DeviceError(RuntimeError):
    """The device can't be used, or failed in mid-flight; says what to do."""


class TooOldError(DeviceError):
    """The kernels can't run on the GPU, which works."""


class Mark(Protocol):
    """A point in the device's work."""

    def wait(self) -> None:
        """Return when the device has come to it. Raises DeviceError if its work failed."""
        ...


class Device(Protocol):
    """One device: work is queued on its one stream, in order, by calls that do not wait for it."""

    xp: Any  # the array module
    name: str

    def current(self) -> AbstractContextManager[None]:
        """Make the device, and its stream, what array calls of this thread use."""
        ...

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that copies may read or write while the host goes on."""
        ...

    def upload(self, source: NDArray[Any], target: Any) -> None:
        """Queue a copy of pinned memory into a dense device array of its size."""
        ...

    def download(self, source: Any, target: NDArray[Any]) -> None:
        """Queue a copy of a dense device array into pinned memory of its size."""
        ...

    def mark(self) -> Mark:
        """Mark the end of what is queued so far."""
        ...

    def recording(self) -> AbstractContextManager[None]:
        """Arrays made inside come from memory that recorded work keeps."""
        ...

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Work as one call that queues all of it again, on the same arrays.

        `work` runs now, without effect if the device can capture it, and inside `recording`. The
        array it returns, if any, is what each later call returns, filled anew. Its memory is lent:
        what reads it is to be queued before the next call of any recorded work of the device, and
        before anything else is made inside `recording`.
        """
        ...

    def free_memory(self) -> int:
        """Bytes that may still be allocated."""
        ...

    def total_memory(self) -> int: ...

    def communicator(self, host: Communicator) -> Communicator:
        """The same ranks, whose operations on this device's arrays are queued like other work."""
        ...

    def release(self) -> None:
        """Give memory that no array holds back to the driver. Recorded work must be gone."""


class CudaDevice:
    """An NVIDIA GPU through CuPy. Raises DeviceError if there is none that can be used."""

    #: Whether small sums over GPUs may be made by a kernel of our own.
    own_sums = True

    def __init__(self, index: int = 0) -> None:
        try:
            import cupy
        except ImportError as error:
            raise DeviceError(f"CuPy can't be imported ({error}): {_HINT}") from error
        self.xp = cupy
        self._cuda = cupy.cuda
        try:
            properties = cupy.cuda.runtime.getDeviceProperties(index)
            if old := _too_old(properties):
                raise TooOldError(f"GPU {index} can't be used: {old}; or run with --device cpu")
            self._device = cupy.cuda.Device(index)
            with self._device:
                self._stream = cupy.cuda.Stream(non_blocking=True)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(f"GPU {index} can't be used ({error}): {_HINT}") from error
        self.name = properties["name"].decode()
        # Graphs hold addresses, so what they touch must never go back to the driver.
        self._recorded = cupy.cuda.MemoryPool(self._allocate)
        self._entered = threading.local()

    @contextmanager
    def current(self) -> Iterator[None]:
        if getattr(self._entered, "yes", False):
            yield
            return
        with self._device, self._stream:
            self._entered.yes = True
            try:
                yield
            except self._cuda.memory.OutOfMemoryError as error:
                raise DeviceError(f"{self.name} has no memory left ({error}): {_LESS}") from error
            except (
                self._cuda.runtime.CUDARuntimeError,
                self._cuda.driver.CUDADriverError,
                CompileError,
                CublasError,
                LaunchError,
            ) as error:
                raise DeviceError(f"{self.name} failed: {error}") from error
            finally:
                self._entered.yes = False

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        memory = self._cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes)

    def upload(self, source: NDArray[Any], target: Any) -> None:
        target.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._stream)

    def download(self, source: Any, target: NDArray[Any]) -> None:
        source.data.copy_to_host_async(target.ctypes.data, target.nbytes, self._stream)

    def mark(self) -> Mark:
        event = self._cuda.Event(disable_timing=True)
        event.record(self._stream)
        return _CudaMark(self, event)

    def recording(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self._cuda.using_allocator(self._recorded.malloc)
        return context

    def _allocate(self, nbytes: int) -> Any:
        """Memory from the driver, for the pool of recorded work. Where there is none left, the
        other pool gives back what it keeps for nobody: from an error of CUDA's the pool that asks
        would do so itself, under its graphs."""
        runtime, memory = self._cuda.runtime, self._cuda.memory
        for give_back in (self.xp.get_default_memory_pool().free_all_blocks, None):
            try:
                return memory.MemoryPointer(memory.Memory(nbytes), 0)
            except runtime.CUDARuntimeError as error:
                if error.status != runtime.errorMemoryAllocation:
                    raise
            if give_back is not None:
                give_back()
        raise memory.OutOfMemoryError(nbytes, self._recorded.total_bytes())

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        with self.recording():
            # Once for real: kernels compile, handles are made, and the pool fills, none of which
            # a capture allows.
            work()
            with _uncollected():
                graph, result = capture(self._cuda, self._stream, lambda: self._lent(work()))
        graph.upload(self._stream)
        stream = self._stream

        def replay() -> T:
            graph.launch(stream)
            return result

        return replay

    def _lent(self, array: T) -> T:
        """The array without a hold on its memory, so that graphs, of which one runs at a time,
        need not each have its own for results as large as logits."""
        if array is None:
            return array
        found: Any = array
        block = found.data.mem
        memory = self._cuda.UnownedMemory(block.ptr, block.size, None, block.device_id)
        place = self._cuda.MemoryPointer(memory, found.data.ptr - block.ptr)
        lent: T = self.xp.ndarray(found.shape, found.dtype, place, found.strides)
        return lent

    def free_memory(self) -> int:
        # What the pool keeps for nobody counts as free.
        self.xp.get_default_memory_pool().free_all_blocks()
        return int(self._device.mem_info[0])

    def total_memory(self) -> int:
        return int(self._device.mem_info[1])

    def communicator(self, host: Communicator) -> Communicator:
        from tensorray.actors.nccl_communicator import NcclCommunicator
        from tensorray.actors.peer_communicator import PeerCommunicator

        return PeerCommunicator(host) if self.own_sums else NcclCommunicator(host)

    def release(self) -> None:
        self._recorded.free_all_blocks()
        self.xp.get_default_memory_pool().free_all_blocks()


def capture(cuda: Any, stream: Any, work: Callable[[], T]) -> tuple[Any, T]:
    """A graph of what work queues on a stream, which is to be current, and what it returns; `cuda`
    is CuPy's module. Raises what work does."""
    stream.begin_capture()
    try:
        result = work()
    except BaseException:
        with suppress(cuda.runtime.CUDARuntimeError):  # of what work began
            stream.end_capture()
        raise
    return stream.end_capture(), result


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector from freeing device memory in mid-capture, which CUDA forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _CudaMark:
    def __init__(self, device: CudaDevice, event: Any) -> None:
        self._device = device
        self._event = event

    def wait(self) -> None:
        with self._device.current():
            self._event.synchronize()


def least_seconds(device: Device, work: Callable[[], Any], times: int = 3) -> float:
    """Seconds that work takes, from its call until the device has done it: the least of some."""
    least = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        work()
        device.mark().wait()
        least = min(least, time.perf_counter() - began)
    return least


def find_device(index: int = 0) -> CudaDevice | None:
    """The machine's GPU; None where there is none, or none that can be used, which is logged."""
    if not has_devices():
        return None
    try:
        return CudaDevice(index)
    except TooOldError as error:  # another GPU of the machine is not
        logger.warning("%s", error)
        return None


def has_devices() -> bool:
    """Whether there are GPUs that can be used; takes none of their memory."""
    try:
        import cupy

        runtime = cupy.cuda.runtime
        found = [runtime.getDeviceProperties(each) for each in range(runtime.getDeviceCount())]
    except Exception as error:  # no CuPy, no driver, no GPU: what is raised differs
        if _DRIVER.exists():
            logger.warning(
                "this machine's GPU is not used, as CuPy can't be (%s): %s", error, _HINT
            )
        return False
    old = [_too_old(properties) for properties in found]
    if found and all(old):
        logger.warning("this machine's GPU is not used: %s", old[0])
    return not all(old)


def _too_old(properties: dict[str, Any]) -> str | None:
    """Why the kernels can't run on a GPU that has these properties; None if they can."""
    capability = properties["major"], properties["minor"]
    if capability >= LEAST_CAPABILITY:
        return None
    name, (major, minor) = properties["name"].decode(), LEAST_CAPABILITY
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and {major}.{minor} "
        "(Ampere) or later is needed"
    )
