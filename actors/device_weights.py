"""Weights on a device: read by threads into a ring of pinned buffers, copied while others read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tensorray.actors.device import Device, Mark

_BUFFERS = 12
# What the loader reads at a time, with room for a last row.
_BUFFER_BYTES = 17 << 20


class DevicePlacement:
    """A loader's `Placement` on a device."""

    def __init__(self, device: Device) -> None:
        self.xp = device.xp
        self._device = device
        self._free: queue.SimpleQueue[tuple[NDArray[np.uint8], Mark | None]] = queue.SimpleQueue()
        self._to_make = _BUFFERS
        self._making = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        with self._device.current():
            return self.xp.empty(shape, dtype)

    def fill(self, array: Any, read: Callable[[Any], None], *, anywhere: bool) -> None:
        if anywhere:
            with self._device.current():
                read(array)
            return
        if array.nbytes > _BUFFER_BYTES:  # a single row of a very wide tensor
            buffer = self._device.pinned(array.nbytes)
            self._through(buffer, array, read).wait()
            return
        buffer, mark = self._buffer()
        if mark is not None:
            mark.wait()
        mark = None
        try:
            mark = self._through(buffer, array, read)
        finally:
            self._free.put((buffer, mark))

    def finish(self) -> None:
        with self._device.current():
            self._device.mark().wait()

    def _through(self, buffer: NDArray[np.uint8], array: Any, read: Callable[[Any], None]) -> Mark:
        """Read into host memory, and have it copied."""
        host = buffer[: array.nbytes].view(array.dtype).reshape(array.shape)
        read(host)
        with self._device.current():
            if array.flags.c_contiguous:
                self._device.upload(host, array)
            else:  # columns of a tensor that is stored transposed
                dense = self.xp.empty(array.shape, array.dtype)
                self._device.upload(host, dense)
                array[...] = dense
            return self._device.mark()

    def _buffer(self) -> tuple[NDArray[np.uint8], Mark | None]:
        """A buffer, and when the copy from it that was last queued will be done."""
        with self._making:
            if self._to_make:
                self._to_make -= 1
                return self._device.pinned(_BUFFER_BYTES), None
        return self._free.get()
