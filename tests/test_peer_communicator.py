"""Which sums the kernel makes and which NCCL: the trial at the start, on a stand-in for the GPU
that takes the time it is told."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tensorray.actors import peer_communicator
from tensorray.actors.peer_communicator import PeerCommunicator

PATIENCE = 120.0  # seconds; what is waited for takes none
RANKS = 2
SIZES = (64, 256, 512, 1024, 2048, 4096)  # bytes

#: Milliseconds of a round, by who sums ("own", "nccl"), the array's bytes, the round and the rank.
Pace = Callable[[str, int, int, int], float]


class Gpu:
    """What the trial uses of CuPy, for a rank's thread each: streams that run what they are given
    at once, and events a round apart."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.rank = threading.local()
        self.cuda = SimpleNamespace(
            get_current_stream=lambda: self, Event=self.Event, get_elapsed_time=self._elapsed
        )
        self.asarray, self.asnumpy = np.asarray, np.asarray

    class Event:
        done = True

        def record(self, gpu: Gpu) -> None:
            self.launches, self.what = gpu.rank.launches, gpu.rank.what

    def sum(self, who: str, x: Any) -> Any:
        self.rank.what = who, x.nbytes
        return x

    def begin_capture(self) -> None:
        self.rank.launches = 0

    def end_capture(self) -> Gpu:
        return self

    def launch(self, gpu: Gpu) -> None:
        self.rank.launches += 1

    def _elapsed(self, began: Event, ended: Event) -> float:
        assert ended.launches == began.launches + 1
        return self._pace(*ended.what, began.launches - 1, self.rank.number)


class Host:
    """A group of threads."""

    size = RANKS

    def __init__(self, rank: int, barrier: threading.Barrier, said: dict[int, Any]) -> None:
        self.rank, self._barrier, self._said = rank, barrier, said

    def all_gather(self, x: Any) -> Any:
        self._said[self.rank] = x
        self._barrier.wait(PATIENCE)
        everything = np.stack([self._said[rank] for rank in range(RANKS)])
        self._barrier.wait(PATIENCE)
        return everything


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[PeerCommunicator]]:
    """The groups that ranks on GPUs of a pace find."""

    def groups(pace: Pace, *, wrong: bool = False) -> list[PeerCommunicator]:
        gpu = Gpu(pace)
        monkeypatch.setitem(sys.modules, "cupy", gpu)
        monkeypatch.setattr(peer_communicator, "TRIAL_BYTES", SIZES)
        nccl = SimpleNamespace(all_reduce=lambda x: gpu.sum("nccl", x))
        monkeypatch.setattr(peer_communicator, "NcclCommunicator", lambda host: nccl)
        region = SimpleNamespace(memory=None, stop=lambda: None)
        monkeypatch.setattr(peer_communicator, "_open_region", lambda host: region)
        monkeypatch.setattr(peer_communicator, "takes", lambda x, ranks: True)
        monkeypatch.setattr(
            peer_communicator, "all_reduce", lambda x, memory: gpu.sum("own", x) + wrong
        )
        barrier, said = threading.Barrier(RANKS), dict[int, Any]()

        def group(rank: int) -> PeerCommunicator:
            gpu.rank.number = rank
            try:
                return PeerCommunicator(Host(rank, barrier, said))  # type: ignore[arg-type]
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(RANKS) as ranks:
            return list(ranks.map(group, range(RANKS)))

    return groups


def summed_by_kernel(group: PeerCommunicator, nbytes: int) -> bool:
    """Whether the group's kernel makes a sum of so many bytes."""
    x = np.zeros(nbytes, np.uint8)
    sys.modules["cupy"].rank.number = group.rank  # type: ignore[attr-defined]
    group.all_reduce(x)
    return bool(sys.modules["cupy"].rank.what == ("own", nbytes))  # type: ignore[attr-defined]


def test_each_size_is_summed_by_who_is_faster(choose: Any) -> None:
    slow = {SIZES[2], SIZES[-1]}
    for group in choose(
        lambda who, nbytes, *_: 2.0 if who == "nccl" else 1.0 + 2 * (nbytes in slow)
    ):
        assert group.own_sizes == set(SIZES) - slow
        # A size stands for those down to the one before.
        assert summed_by_kernel(group, 16)
        assert summed_by_kernel(group, SIZES[1])
        assert not summed_by_kernel(group, SIZES[1] + 16)
        assert not summed_by_kernel(group, SIZES[2])
        assert summed_by_kernel(group, SIZES[2] + 16)
        assert not summed_by_kernel(group, SIZES[-1])
        assert not summed_by_kernel(group, SIZES[-1] + 16)


def test_a_few_rounds_that_a_late_host_spoilt_decide_nothing(choose: Any) -> None:
    def pace(who: str, nbytes: int, number: int, rank: int) -> float:
        late = number in (0, 3, 5) if rank == 0 else number == 6
        return 2.0 if who == "nccl" else 1.0 + 100 * late

    assert all(group.own_sizes == set(SIZES) for group in choose(pace))


def test_ranks_that_measure_otherwise_decide_alike(choose: Any) -> None:
    """One sees its own sums ahead at every size, the other behind at some."""

    def pace(who: str, nbytes: int, number: int, rank: int) -> float:
        return 2.0 if who == "nccl" else 1.0 if rank == 0 else float(1 + SIZES.index(nbytes))

    one, other = choose(pace)
    assert one.own_sizes == other.own_sizes
    assert SIZES[0] in one.own_sizes
    assert SIZES[-1] not in one.own_sizes


def test_wrong_sums_leave_all_to_nccl(choose: Any) -> None:
    for group in choose(lambda who, *_: 2.0 if who == "nccl" else 1.0, wrong=True):
        assert group.own_sizes == set()
        assert not summed_by_kernel(group, 16)
