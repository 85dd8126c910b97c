"""Device memory that is in use: a process's own, or all."""

from __future__ import annotations

import os
from collections.abc import Callable


def used_by_process() -> Callable[[], int] | None:
    """What says how many bytes of device memory this process holds; None if nothing does."""
    try:
        import pynvml  # type: ignore[import-untyped]  # nvidia-ml-py
    except ImportError:
        return None
    own = os.getpid()

    def used() -> int:
        total = 0
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
                if process.pid == own:
                    total += process.usedGpuMemory or 0
        return total

    try:
        pynvml.nvmlInit()
        return used if used() else None  # in a container, processes may go by other numbers
    except pynvml.NVMLError:
        return None


def used_of_device() -> int:
    """Bytes that are taken of the current device, by whomever; 0 without CuPy."""
    try:
        import cupy
    except ImportError:
        return 0
    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)
