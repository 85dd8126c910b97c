"""NCCL, with small sums made by a kernel of our own where GPUs reach each other's memory.

Each rank is a process, which maps the others' memory by CUDA's handles.

Whether they do, whether the sums are right, and which is faster, is found out when the ranks meet:
by a few sums of random numbers, made both ways. NCCL makes all sums unless those of the kernel are
right, and those of a size at which it is faster; all ranks decide alike. What a kernel goes on with
behind a sum follows that sum's verdict.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tensorray.actors.communicator import Communicator
from tensorray.actors.nccl_communicator import NcclCommunicator
from tensorray.kernels.cuda.all_reduce import (
    PeerMemory,
    all_reduce,
    all_reduce_norm,
    bytes_needed,
    fits,
    takes,
    takes_rows,
)

logger = logging.getLogger(__name__)

_HANDLE_BYTES = 64
_BOOT_BYTES = 36
# A trial of a group that works takes milliseconds.
_TRIAL_SECONDS = 10.0
#: A decoded token's residual stream, that of more and more of them, and a prefill step's. Each size
#: stands for those down to the one before.
TRIAL_BYTES = (8 << 10, 64 << 10, 512 << 10, 2 << 20, 4 << 20, 16 << 20)
_TRIAL_SUMS = 50
_TRIAL_ROUNDS = 7


class PeerCommunicator:
    """A group of ranks, one GPU each, as `NcclCommunicator` is one. See Communicator."""

    def __init__(self, host: Communicator) -> None:
        self.rank, self.size = host.rank, host.size
        self._host = host
        self._nccl = NcclCommunicator(host)
        self._region = _open_region(host)
        #: Which of TRIAL_BYTES the kernel sums up, NCCL the others.
        self.own_sizes = (
            frozenset() if self._region is None else _trial(host, self._region, self._nccl)
        )

    @property
    def reaches_peers(self) -> bool:
        """Whether the ranks' GPUs have mapped each other's memory."""
        return self._region is not None

    def all_reduce(self, x: Any) -> Any:
        if self._own(x) and takes(x, self.size):
            assert self._region is not None
            return all_reduce(x, self._region.memory)
        return self._nccl.all_reduce(x)

    def all_reduce_norm(
        self, x: Any, delta: Any, weight: Any, eps: float, *, delta_weight: Any | None = None
    ) -> tuple[Any, Any] | None:
        """See `builder.array_ops.NormingRanks`."""
        if not self._own(delta) or not takes_rows(x, delta, weight, self.size):
            return None
        assert self._region is not None
        return all_reduce_norm(
            x, delta, weight, eps, self._region.memory, delta_weight=delta_weight
        )

    def _own(self, x: Any) -> bool:
        """Whether an array is of a size that the kernel sums up."""
        at = bisect_left(TRIAL_BYTES, x.nbytes)
        return at < len(TRIAL_BYTES) and TRIAL_BYTES[at] in self.own_sizes

    def all_gather(self, x: Any) -> Any:
        return self._nccl.all_gather(x)

    def reduce_scatter(self, x: Any) -> Any:
        return self._nccl.reduce_scatter(x)

    def send(self, x: Any, to: int) -> None:
        self._nccl.send(x, to)

    def recv(self, out: Any, source: int) -> Any:
        return self._nccl.recv(out, source)

    def broadcast(self, x: Any, root: int) -> Any:
        return self._nccl.broadcast(x, root)

    def barrier(self) -> None:
        self._nccl.barrier()

    def abort(self, reason: str) -> None:
        """Graphs that captured operations of this group have to be destroyed before."""
        if self._region is not None:
            self._region.stop()
        self._nccl.abort(reason)

    def subgroup(self, ranks: Sequence[int]) -> PeerCommunicator:
        return PeerCommunicator(self._host.subgroup(ranks))


class _Region:
    """This rank's memory for sums, and its mapping of the others'."""

    def __init__(self, own: int, device: int) -> None:
        import cupy

        self._own = own
        self._device = device
        self._opened: list[int] = []
        # GPUs read it where it lies, in the host's memory.
        self._stop = cupy.cuda.alloc_pinned_memory(4)
        self._flag = np.frombuffer(self._stop, np.uint32, 1)
        self._flag[0] = 0
        self.memory: PeerMemory

    def map(self, rank: int, tickets: Sequence[_Ticket]) -> None:
        """Raises CUDARuntimeError if a peer's memory can't be reached."""
        import cupy

        runtime = cupy.cuda.runtime
        addresses = []
        for other, ticket in enumerate(tickets):
            if other == rank:
                addresses.append(self._own)
            else:
                lazily = 1  # cudaIpcMemLazyEnablePeerAccess, the only flag there is
                addresses.append(runtime.ipcOpenMemHandle(ticket.handle, lazily))
                self._opened.append(addresses[-1])
        self.memory = PeerMemory(rank, addresses, self._flag.ctypes.data)

    def stop(self) -> None:
        """Let nobody here wait for a peer any more."""
        self._flag[0] = 1

    def __del__(self) -> None:
        import cupy

        runtime = cupy.cuda.runtime
        with cupy.cuda.Device(self._device):
            for address in self._opened:
                with suppress(runtime.CUDARuntimeError):  # its process may have died
                    runtime.ipcCloseMemHandle(address)
            runtime.free(self._own)


class _Ticket:
    """What a rank tells the others of its memory, as bytes of one length."""

    def __init__(self, packed: np.ndarray) -> None:
        self.handle = packed[:_HANDLE_BYTES].tobytes()
        self.machine = packed[_HANDLE_BYTES:].tobytes()

    @staticmethod
    def pack(address: int) -> np.ndarray:
        import cupy

        handle = cupy.cuda.runtime.ipcGetMemHandle(address)
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()[:_BOOT_BYTES]
        return np.frombuffer(handle + boot.ljust(_BOOT_BYTES), np.uint8)


def _open_region(host: Communicator) -> _Region | None:
    """Memory that all ranks have mapped; None if one could not."""
    import cupy

    runtime = cupy.cuda.runtime
    device = runtime.getDevice()
    size = bytes_needed(host.size)
    own = runtime.malloc(size)
    runtime.memset(own, 0, size)
    runtime.deviceSynchronize()
    region = _Region(own, device)
    why = ""
    limits = cupy.cuda.Device(device).attributes
    if not fits(limits["MultiProcessorCount"], limits["MaxThreadsPerMultiProcessor"]):
        why = "a GPU does not hold all blocks of a sum at once"
    try:
        ticket = _Ticket.pack(own)
    except (runtime.CUDARuntimeError, OSError) as error:
        why, ticket = str(error), np.zeros(_HANDLE_BYTES + _BOOT_BYTES, np.uint8)
    tickets = [_Ticket(each) for each in host.all_gather(ticket)]
    if not why and len({each.machine for each in tickets}) > 1:
        why = "the ranks are on several machines"
    if not why:
        try:
            region.map(host.rank, tickets)
        except (runtime.CUDARuntimeError, OSError) as error:
            why = str(error)
    if not _all(host, not why):
        logger.info("NCCL makes all sums: %s", why or "another rank's GPU does not reach all")
        return None
    return region


def _trial(host: Communicator, region: _Region, nccl: NcclCommunicator) -> frozenset[int]:
    """The sizes at which the kernel's sums come sooner than NCCL's; none if they are not right."""
    import cupy

    won = set()
    for nbytes in TRIAL_BYTES:
        drawn = np.random.default_rng(host.rank).standard_normal(nbytes // 2, np.float32)
        x = cupy.asarray(drawn.astype(np.float16))
        if not takes(x, host.size):
            break
        sums = all_reduce(x, region.memory)
        mine = _seconds(partial(all_reduce, x, region.memory), host, region)
        if mine is None:
            logger.error("GPUs that map each other's memory do not hear each other; NCCL sums")
            return frozenset()
        expected = nccl.all_reduce(x)
        close = np.allclose(cupy.asnumpy(sums), cupy.asnumpy(expected), rtol=1e-2, atol=3e-2)
        if not _all(host, close):
            logger.error("sums over peers' memory are wrong; NCCL makes all sums")
            return frozenset()
        theirs = _seconds(partial(nccl.all_reduce, x), host, region)
        assert theirs is not None
        logger.info("a sum of %d bytes: %.1f us, by NCCL %.1f us", nbytes, mine * 1e6, theirs * 1e6)
        if mine < theirs:
            won.add(nbytes)
    return frozenset(won)


def _seconds(work: Callable[[], Any], host: Communicator, region: _Region) -> float | None:
    """What a call takes in a recorded graph; None if it does not end on one of the ranks.

    The same on all of them: the median of all their rounds. What spoils a few, a host that comes
    late, does not count; a sum that is slow in most is slow.
    """
    import cupy

    stream = cupy.cuda.get_current_stream()
    stream.begin_capture()
    try:
        for _ in range(_TRIAL_SUMS):
            work()
    finally:
        graph = stream.end_capture()
    # The first launch, which takes the graph to the GPU, is before the first event.
    events = [cupy.cuda.Event() for _ in range(1 + _TRIAL_ROUNDS)]
    for event in events:
        graph.launch(stream)
        event.record(stream)
    deadline = time.perf_counter() + _TRIAL_SECONDS
    ended = True
    while not events[-1].done:
        if ended and time.perf_counter() > deadline:
            ended = False
            region.stop()
        time.sleep(1e-4)
    elapsed = [cupy.cuda.get_elapsed_time(began, end) for began, end in pairwise(events)]
    rounds = host.all_gather(np.array(elapsed if ended else [np.nan] * _TRIAL_ROUNDS))
    return None if np.isnan(rounds).any() else float(np.median(rounds)) / 1e3 / _TRIAL_SUMS


def _all(host: Communicator, yes: bool) -> bool:
    """Whether every rank says so."""
    return bool(host.all_gather(np.array([yes], np.int8)).all())
