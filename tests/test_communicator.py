"""Collectives over TCP: results, agreement to the bit, and what a lost peer does to the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from tensorray.actors.communicator import Alone, Communicator, CommunicatorError
from tensorray.actors.host_communicator import HostCommunicator, MeetingPoint
from tensorray.actors.wire import Endpoint

PATIENCE = 120.0  # seconds; what is waited for takes none


@contextmanager
def group(size: int, **options: Any) -> Iterator[list[HostCommunicator]]:
    points = [MeetingPoint() for _ in range(size)]
    members = [point.endpoint for point in points]
    with ThreadPoolExecutor(size) as pool:
        options = {"connect_timeout": PATIENCE, **options}
        joins = [pool.submit(p.join, i, members, **options) for i, p in enumerate(points)]
        ranks = [join.result(PATIENCE) for join in joins]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.close()
        for point in points:
            point.close()


def on_all(ranks: list[HostCommunicator], work: Callable[[HostCommunicator], Any]) -> list[Any]:
    """What each rank's thread returns."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [each.result(PATIENCE) for each in [pool.submit(work, rank) for rank in ranks]]


def values(rank: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(rank).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (333, 640)], ids=str)
def test_sums_are_right_and_equal_to_the_bit(size: int, shape: tuple[int, ...]) -> None:
    with group(size) as ranks:
        found = on_all(ranks, lambda comm: comm.all_reduce(values(comm.rank, *shape)))
    expected = sum(values(rank, *shape).astype(np.float64) for rank in range(size))
    for result in found:
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
        assert result.tobytes() == found[0].tobytes()


def test_a_sum_has_the_same_bits_in_a_small_and_a_large_message() -> None:
    """Else tokens would depend on what shares a batch."""
    with group(3) as ranks:
        large = on_all(ranks, lambda comm: comm.all_reduce(values(comm.rank, 300, 100)))[0]
        small = on_all(ranks, lambda comm: comm.all_reduce(values(comm.rank, 300, 100)[:4]))[0]
    assert small.tobytes() == large[:4].tobytes()


@pytest.mark.parametrize("rows", [2, 40_000], ids=["small", "large"])
def test_gather_scatter_broadcast(rows: int) -> None:
    def work(comm: HostCommunicator) -> Any:
        gathered = comm.all_gather(values(comm.rank, rows, 3))
        scattered = comm.reduce_scatter(values(comm.rank, 3, rows, 3))
        told = comm.broadcast(values(comm.rank, rows), 1)
        comm.barrier()
        return gathered, scattered, told

    with group(3) as ranks:
        found = on_all(ranks, work)
    stacked = np.stack([values(rank, 3, rows, 3) for rank in range(3)])
    for rank, (gathered, scattered, told) in enumerate(found):
        assert (gathered == np.stack([values(r, rows, 3) for r in range(3)])).all()
        np.testing.assert_allclose(scattered, stacked[:, rank].sum(0), rtol=1e-4, atol=1e-5)
        assert (told == values(1, rows)).all()


def test_values_that_are_not_contiguous() -> None:
    with group(2) as ranks:
        found = on_all(ranks, lambda comm: comm.all_reduce(values(0, 40, 30).T))
    np.testing.assert_array_equal(found[0], 2 * values(0, 40, 30).T)


@pytest.mark.parametrize("count", [10, 1_000_000])
def test_send_and_receive_keep_their_order(count: int) -> None:
    def work(comm: HostCommunicator) -> Any:
        if comm.rank == 0:
            for i in range(3):
                comm.send(np.full(count, i, np.int32), 1)
            return comm.recv(np.empty(2, np.int64), 1)
        found = [comm.recv(np.empty(count, np.int32), 0) for _ in range(3)]
        comm.send(np.array([7, 8]), 0)
        return [int(each[-1]) for each in found]

    with group(2) as ranks:
        back, forth = on_all(ranks, work)
    assert forth == [0, 1, 2]
    assert back.tolist() == [7, 8]


def test_subgroups_count_their_own_ranks() -> None:
    """Two rows and two columns of four ranks, as tensor and pipeline parallelism have them."""

    def work(comm: HostCommunicator) -> Any:
        row = comm.subgroup([0, 1] if comm.rank < 2 else [2, 3])
        column = comm.subgroup([comm.rank % 2, comm.rank % 2 + 2])
        assert (row.rank, column.rank) == (comm.rank % 2, comm.rank // 2)
        total = row.all_reduce(np.array([comm.rank]))
        if column.rank == 0:
            column.send(total, 1)
            return total.tolist()
        return column.recv(np.empty(1, np.int64), 0).tolist()

    with group(4) as ranks:
        assert on_all(ranks, work) == [[1], [1], [1], [1]]


def test_a_peer_that_ends_wakes_those_who_wait() -> None:
    def work(comm: HostCommunicator) -> str:
        if comm.rank == 2:
            time.sleep(0.1)
            comm.abort("out of memory")
            return ""
        with pytest.raises(CommunicatorError) as caught:
            comm.all_reduce(np.zeros(4))
        with pytest.raises(CommunicatorError):  # for good
            comm.barrier()
        return f"{caught.value.peer}: {caught.value}"

    with group(3, timeout=2 * PATIENCE) as ranks:  # which is not what wakes them
        told = on_all(ranks, work)
    # Whom a rank hears of first is the one that ended, or one that ended for its sake.
    assert any("2: rank 2 at 127.0.0.1" in each and "gone" in each for each in told)


def test_abort_wakes_the_ranks_own_thread_with_its_reason() -> None:
    with group(2, timeout=PATIENCE) as ranks:
        threading.Timer(0.1, ranks[0].abort, ["the router left"]).start()
        with pytest.raises(CommunicatorError, match="aborted: the router left"):
            ranks[0].recv(np.empty(4), 1)


@pytest.mark.parametrize("count", [4, 1_000_000])
def test_a_peer_that_is_silent_is_named_after_the_time_out(count: int) -> None:
    with group(2, timeout=0.2) as ranks:
        began = time.monotonic()
        with pytest.raises(CommunicatorError, match=r"rank 1 at .* not answered for 0.2 s") as e:
            ranks[0].all_reduce(np.zeros(count))
        assert e.value.peer == 1
        assert time.monotonic() - began >= 0.2
        with pytest.raises(CommunicatorError, match="gone"):  # the other hears of it at once
            ranks[1].recv(np.zeros(count + 1), 0)


def test_ranks_that_disagree_about_a_message_stop() -> None:
    with group(2) as ranks:
        ranks[0].send(np.zeros(3), 1)
        with pytest.raises(CommunicatorError, match="24 bytes where 32 were due"):
            ranks[1].recv(np.zeros(4), 0)


def test_who_does_not_come_is_named() -> None:
    points = [MeetingPoint() for _ in range(3)]
    members = [point.endpoint for point in points]
    with pytest.raises(CommunicatorError, match=r"rank 1, 2 did not come to epoch 5"):
        points[0].join(0, members, epoch=5, connect_timeout=0.1)
    points[0].close()
    with pytest.raises(CommunicatorError, match=r"rank 0 at .* can't be reached"):
        points[1].join(1, members, connect_timeout=0.1)


def test_strangers_and_those_of_another_epoch_stay_outside() -> None:
    points = [MeetingPoint() for _ in range(2)]
    members = [point.endpoint for point in points]
    forged = [msgspec.structs.replace(members[0], secret=bytes(32)), members[1]]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(points[0].join, 0, members, epoch=2, connect_timeout=PATIENCE)
        for other, epoch in ((forged, 2), (members, 1)):
            with pytest.raises(CommunicatorError, match="did not come to epoch"):
                points[1].join(1, other, epoch=epoch, connect_timeout=PATIENCE)
        second = pool.submit(points[1].join, 1, members, epoch=2, connect_timeout=PATIENCE)
        ranks = [first.result(), second.result()]
    assert [x.tolist() for x in on_all(ranks, lambda comm: comm.all_reduce(np.ones(1)))] == [
        [2]
    ] * 2


KILLED = """
import sys
import msgspec, numpy as np
from tensorray.actors.host_communicator import MeetingPoint
from tensorray.actors.wire import Endpoint
point = MeetingPoint()
print(msgspec.json.encode(point.endpoint).decode(), flush=True)
other = msgspec.json.decode(sys.stdin.readline(), type=Endpoint)
comm = point.join(1, [other, point.endpoint], epoch=int(sys.argv[1]))
comm.barrier()
comm.recv(np.empty(1), 0)
"""


def test_a_killed_process_is_noticed_and_a_new_one_joins_the_next_epoch() -> None:
    point = MeetingPoint()

    def partner() -> tuple[subprocess.Popen[str], Endpoint]:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(epoch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        theirs = msgspec.json.decode(process.stdout.readline(), type=Endpoint)
        print(msgspec.json.encode(point.endpoint).decode(), file=process.stdin, flush=True)
        return process, theirs

    for epoch in (1, 2):
        process, theirs = partner()
        comm = point.join(0, [point.endpoint, theirs], epoch=epoch, connect_timeout=PATIENCE)
        comm.barrier()
        threading.Timer(0.1, os.kill, [process.pid, signal.SIGKILL]).start()
        with pytest.raises(CommunicatorError, match=r"rank 1 at .* gone"):
            comm.recv(np.empty(1), 1)
        comm.close()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def test_one_rank_alone() -> None:
    alone: Communicator = Alone()
    x = values(0, 3, 4)
    assert alone.all_reduce(x) is x
    assert alone.all_gather(x).shape == (1, 3, 4)
    assert (alone.reduce_scatter(x[None]) == x).all()
    assert alone.subgroup([0]) is alone
    with pytest.raises(ValueError, match="group of one"):
        alone.send(x, 1)
