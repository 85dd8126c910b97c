"""The NCCL communicator against a stand-in that does on NumPy memory what NCCL does on a GPU's.

It records no streams and overlaps nothing; what it can show is that each operation is called with
the right pointers, counts and types, and that set-up and abort go as they should.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from tensorray.actors.communicator import CommunicatorError
from tensorray.actors.host_communicator import MeetingPoint
from tensorray.actors.nccl_communicator import NcclCommunicator

PATIENCE = 120.0  # seconds; what is waited for takes none
_TYPES = {1: np.int8, 2: np.int32, 3: np.float32}


class FakeArray(np.ndarray):
    """An array with CuPy's pointer."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self)

    @property
    def flags(self) -> Any:
        return SimpleNamespace(c_contiguous=super().flags.c_contiguous)


def array(values: Any, dtype: Any = np.float32) -> Any:
    return np.array(values, dtype).view(FakeArray)


class FakeNcclError(Exception):
    pass


class FakeComm:
    """`cupy.cuda.nccl.NcclCommunicator`, whose ranks are threads."""

    patience = PATIENCE
    groups: ClassVar[dict[Any, Any]] = {}
    lock = threading.Lock()

    def __init__(self, size: int, unique_id: bytes, rank: int) -> None:
        with self.lock:
            group = self.groups.setdefault(
                unique_id, SimpleNamespace(barrier=threading.Barrier(size), inbox={})
            )
        self._group, self._size, self._rank = group, size, rank
        self.error: str | None = None
        group.barrier.wait(self.patience)  # as ncclCommInitRank does

    def _everyones(self, key: str, x: Any) -> list[Any]:
        self._group.inbox[key, self._rank] = x.copy()
        self._group.barrier.wait(self.patience)
        found = [self._group.inbox[key, rank] for rank in range(self._size)]
        self._group.barrier.wait(self.patience)
        return found

    def allReduce(self, x: Any, out: Any, count: int, kind: int, op: int, stream: int) -> None:
        self._check(x, count, kind)
        assert op == 0
        out[...] = sum(self._everyones("sum", x))

    def allGather(self, x: Any, out: Any, count: int, kind: int, stream: int) -> None:
        self._check(x, count, kind)
        out[...] = np.stack(self._everyones("gather", x))

    def reduceScatter(self, x: Any, out: Any, count: int, kind: int, op: int, stream: int) -> None:
        self._check(out, count, kind)
        out[...] = sum(self._everyones("scatter", x))[self._rank]

    def bcast(self, x: Any, count: int, kind: int, root: int, stream: int) -> None:
        self._check(x, count, kind)
        x[...] = self._everyones("bcast", x)[root]

    def send(self, x: Any, count: int, kind: int, peer: int, stream: int) -> None:
        self._check(x, count, kind)
        self._group.inbox["p2p", self._rank, peer] = x.copy()
        self._group.barrier.wait(self.patience)

    def recv(self, out: Any, count: int, kind: int, peer: int, stream: int) -> None:
        self._check(out, count, kind)
        self._group.barrier.wait(self.patience)
        out[...] = self._group.inbox["p2p", peer, self._rank]

    def check_async_error(self) -> None:
        if self.error:
            raise FakeNcclError(self.error)

    def abort(self) -> None:
        self.aborted = True

    def _check(self, x: Any, count: int, kind: int) -> None:
        assert x.size == count
        assert x.dtype == _TYPES[kind]


def fakes() -> dict[str, Any]:
    count = iter(range(100))
    names = dict.fromkeys(("UINT8", "INT64", "FLOAT16", "FLOAT64"), 9)
    nccl = SimpleNamespace(
        NcclCommunicator=FakeComm,
        NcclError=FakeNcclError,
        NCCL_SUM=0,
        NCCL_INT8=1,
        NCCL_INT32=2,
        NCCL_FLOAT32=3,
        get_unique_id=lambda: bytes([next(count), *np.random.default_rng().bytes(127)]),
        **{f"NCCL_{name}": value for name, value in names.items()},
    )
    runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=lambda device: None)
    stream = SimpleNamespace(ptr=0)
    xp = SimpleNamespace(
        cuda=SimpleNamespace(runtime=runtime, get_current_stream=lambda: stream),
        empty=lambda shape, dtype: np.empty(shape, dtype).view(FakeArray),
        empty_like=np.empty_like,
    )
    return {"nccl": nccl, "xp": xp}


def on_ranks(size: int, work: Any) -> list[Any]:
    points = [MeetingPoint() for _ in range(size)]
    members = [point.endpoint for point in points]
    modules = fakes()

    def run(rank: int) -> Any:
        host = points[rank].join(rank, members, connect_timeout=PATIENCE)
        try:
            return work(NcclCommunicator(host, connect_timeout=PATIENCE, **modules))
        finally:
            host.close()

    with ThreadPoolExecutor(size) as pool:
        found = [each.result(PATIENCE) for each in [pool.submit(run, rank) for rank in range(size)]]
    for point in points:
        point.close()
    return found


def test_every_operation() -> None:
    def work(comm: NcclCommunicator) -> Any:
        rank = comm.rank
        comm.barrier()
        total = comm.all_reduce(array([rank, 1]))
        gathered = comm.all_gather(array([[rank]], np.int32))
        part = comm.reduce_scatter(array([[1, rank], [2, rank], [3, rank]]))
        told = comm.broadcast(array([rank]), 2)
        comm.check()
        return total.tolist(), gathered.tolist(), part.tolist(), told.tolist()

    found = on_ranks(3, work)
    for rank, (total, gathered, part, told) in enumerate(found):
        assert total == [3, 3]
        assert gathered == [[[0]], [[1]], [[2]]]
        assert part == [3 * (rank + 1), 3]
        assert told == [2]


def test_subgroups_and_pairs() -> None:
    def work(comm: NcclCommunicator) -> Any:
        row = comm.subgroup([0, 1] if comm.rank < 2 else [2, 3])
        column = comm.subgroup([comm.rank % 2, comm.rank % 2 + 2])
        total = row.all_reduce(array([comm.rank]))
        if column.rank == 0:
            column.send(total, 1)
            return total.tolist()
        return column.recv(array([0]), 0).tolist()

    assert on_ranks(4, work) == [[1], [1], [1], [1]]


def test_what_nccl_can_not_take_is_refused() -> None:
    def work(comm: NcclCommunicator) -> None:
        with pytest.raises(ValueError, match="contiguous"):
            comm.all_reduce(array(np.ones((4, 4))).T[1:])
        with pytest.raises(ValueError, match="complex64"):
            comm.all_reduce(array([1j], np.complex64))
        with pytest.raises(ValueError, match="over 1 ranks"):
            comm.reduce_scatter(array([1, 2]))

    on_ranks(1, work)


def test_an_error_of_nccls_ends_the_group() -> None:
    def work(comm: NcclCommunicator) -> None:
        comm.check()
        comm._comm.error = "unhandled system error"
        with pytest.raises(CommunicatorError, match="unhandled system error"):
            comm.check()
        assert comm._comm.aborted
        with pytest.raises(CommunicatorError, match="aborted: unhandled system error"):
            comm.all_reduce(array([1]))

    on_ranks(1, work)


def test_a_peer_that_does_not_come_to_nccl_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeComm, "patience", 1.0)

    def work(rank: int) -> None:
        host = points[rank].join(rank, members)
        modules = fakes()
        if rank == 1:  # comes to the meeting, and no further
            host.broadcast(np.zeros(128, np.uint8), 0)
            return
        with pytest.raises(CommunicatorError, match=r"not connected 2 ranks within 0.1 s"):
            NcclCommunicator(host, connect_timeout=0.1, **modules)

    points = [MeetingPoint() for _ in range(2)]
    members = [point.endpoint for point in points]
    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(work, rank) for rank in range(2)]:
            each.result(PATIENCE)
