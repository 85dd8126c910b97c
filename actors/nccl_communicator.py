"""Collectives on CuPy arrays by NCCL, through CuPy's own binding.

It stands beside a host communicator of the same ranks, over which it is set up: `ncclCommInitRank`
waits without end for a peer that never comes, so all ranks first meet on the host, and the call
itself runs under a time-out. Operations are queued on the current CUDA stream, and can be captured
in a CUDA graph; `check` tells of what went wrong with them since.

NCCL adds in an order of its own, the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from importlib import import_module
from typing import Any

import numpy as np

from tensorray.actors.communicator import Communicator, CommunicatorError

# nccl.h's NCCL_UNIQUE_ID_BYTES, which CuPy does not hand on.
_UNIQUE_ID_BYTES = 128


class NcclCommunicator:
    """A group of ranks, one GPU each. See Communicator.

    `nccl` and `xp` are `cupy.cuda.nccl` and `cupy` unless told otherwise.
    """

    def __init__(
        self,
        host: Communicator,
        *,
        connect_timeout: float = 60.0,
        nccl: Any = None,
        xp: Any = None,
    ) -> None:
        if nccl is None or xp is None:
            xp, nccl = import_module("cupy"), import_module("cupy.cuda.nccl")
        self.rank = host.rank
        self.size = host.size
        self._host = host
        self._nccl = nccl
        self._xp = xp
        self._timeout = connect_timeout
        self._aborted: str | None = None
        meeting = np.zeros(_UNIQUE_ID_BYTES, np.uint8)
        if host.rank == 0:
            meeting[:] = np.frombuffer(nccl.get_unique_id(), np.uint8)
        unique_id = host.broadcast(meeting, 0).tobytes()
        pool = ThreadPoolExecutor(1, "nccl-init")
        device = xp.cuda.runtime.getDevice()

        def connect() -> Any:
            xp.cuda.runtime.setDevice(device)  # a thread starts on device 0
            return nccl.NcclCommunicator(self.size, unique_id, self.rank)

        try:
            self._comm: Any = pool.submit(connect).result(connect_timeout)
        except FutureTimeoutError:
            raise CommunicatorError(
                f"NCCL has not connected {self.size} ranks within {connect_timeout:g} s"
            ) from None
        finally:
            pool.shutdown(wait=False)
        self._types = {
            np.dtype(name): getattr(nccl, f"NCCL_{name.upper()}")
            for name in ("int8", "uint8", "int32", "int64", "float16", "float32", "float64")
        }

    def all_reduce(self, x: Any) -> Any:
        out = self._xp.empty_like(x)
        count, kind = self._what(x)
        self._comm.allReduce(
            x.data.ptr, out.data.ptr, count, kind, self._nccl.NCCL_SUM, self._stream()
        )
        return out

    def all_gather(self, x: Any) -> Any:
        out = self._xp.empty((self.size, *x.shape), x.dtype)
        self._comm.allGather(x.data.ptr, out.data.ptr, *self._what(x), self._stream())
        return out

    def reduce_scatter(self, x: Any) -> Any:
        if len(x) != self.size:
            raise ValueError(f"reduce_scatter of {x.shape} over {self.size} ranks")
        out = self._xp.empty(x.shape[1:], x.dtype)
        count, kind = self._what(out)
        self._what(x)
        self._comm.reduceScatter(
            x.data.ptr, out.data.ptr, count, kind, self._nccl.NCCL_SUM, self._stream()
        )
        return out

    def send(self, x: Any, to: int) -> None:
        self._comm.send(x.data.ptr, *self._what(x), to, self._stream())

    def recv(self, out: Any, source: int) -> Any:
        self._comm.recv(out.data.ptr, *self._what(out), source, self._stream())
        return out

    def broadcast(self, x: Any, root: int) -> Any:
        self._comm.bcast(x.data.ptr, *self._what(x), root, self._stream())
        return x

    def barrier(self) -> None:
        """Of the host side: what is queued on the GPUs need not be done."""
        self._check_aborted()
        self._host.barrier()

    def check(self) -> None:
        """Raise CommunicatorError if NCCL has met an error since it was asked last."""
        self._check_aborted()
        try:
            self._comm.check_async_error()
        except self._nccl.NcclError as error:
            self.abort(str(error))
            raise CommunicatorError(f"NCCL: {error}") from error

    def abort(self, reason: str) -> None:
        """Graphs that captured operations of this group have to be destroyed before."""
        if self._aborted is None:
            self._aborted = reason
            self._host.abort(reason)
            self._comm.abort()

    def subgroup(self, ranks: Sequence[int]) -> NcclCommunicator:
        return NcclCommunicator(
            self._host.subgroup(ranks),
            connect_timeout=self._timeout,
            nccl=self._nccl,
            xp=self._xp,
        )

    def _what(self, x: Any) -> tuple[int, int]:
        """Count and NCCL's type of a contiguous array's elements."""
        self._check_aborted()
        if not x.flags.c_contiguous:
            raise ValueError("NCCL needs a contiguous array")
        kind = self._types.get(x.dtype)
        if kind is None and x.dtype.name == "bfloat16":
            kind = self._nccl.NCCL_BFLOAT16
        if kind is None:
            raise ValueError(f"NCCL has no {x.dtype}")
        return x.size, kind

    def _check_aborted(self) -> None:
        if self._aborted is not None:
            raise CommunicatorError(f"aborted: {self._aborted}")

    def _stream(self) -> int:
        pointer: Callable[[], Any] = self._xp.cuda.get_current_stream
        return int(pointer().ptr)
