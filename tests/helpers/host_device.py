"""A `Device` that is NumPy on this machine: all of a GPU shard but its kernels, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.communicator import Communicator

T = TypeVar("T")


class HostDevice:
    """Everything queued is done at once. What a real device would not see, this does not either:
    a copy takes what its source holds when it is queued, and what recorded work gave is NaN once
    other work may have taken its memory."""

    xp: Any = np
    name = "NumPy"

    def __init__(self, memory: int = 64 << 20) -> None:
        self._memory = memory
        self.recorded = 0
        self._lent: Any = None  # what recorded work gave last
        self.uploaded: list[int] = []  # bytes of each upload
        self.offered = 0  # bytes that the KV cache might have

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return np.full(nbytes, 0xAB, np.uint8)

    def upload(self, source: NDArray[Any], target: Any) -> None:
        assert target.flags.c_contiguous
        self.uploaded.append(source.nbytes)
        flat = target.reshape(-1).view(np.uint8)
        flat[: source.nbytes] = np.ascontiguousarray(source).reshape(-1).view(np.uint8)

    def download(self, source: Any, target: NDArray[Any]) -> None:
        assert source.flags.c_contiguous
        target.reshape(-1).view(np.uint8)[:] = source.reshape(-1).view(np.uint8)[: target.nbytes]

    def mark(self) -> _Passed:
        return _Passed()

    def recording(self) -> Any:
        self._take_back()
        return nullcontext()

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Replays by running again, into the arrays that the first run returned."""
        self.recorded += 1
        result: Any = work()

        def replay() -> T:
            self._take_back()
            made: Any = work()
            if result is not None:
                result[...] = made
            self._lent = kept = result
            return kept

        return replay

    def _take_back(self) -> None:
        if self._lent is not None:
            self._lent.fill(np.nan)
            self._lent = None

    def free_memory(self) -> int:
        return self._memory

    def total_memory(self) -> int:
        return self._memory

    def communicator(self, host: Communicator) -> Communicator:
        return host

    def release(self) -> None:
        pass


class _Passed:
    def wait(self) -> None:
        pass
