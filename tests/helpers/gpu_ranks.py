"""Work on a communicator of several GPUs, a process each, as shards are."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tensorray.actors.communicator import CommunicatorError
from tensorray.actors.host_communicator import MeetingPoint
from tensorray.actors.peer_communicator import TRIAL_BYTES, PeerCommunicator
from tensorray.kernels.norm import add_rms_norm

_SECONDS = 60


def on_gpus(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(communicator, rank, *arguments)`, a function of a module, gives on each.

    One that takes a minute is ended, and tells where its threads were.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_run, args=(theirs, rank, work, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        members = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(members)
        answers = [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for failure, _ in answers:
        assert failure is None, failure
    return [answer for _, answer in answers]


def _run(pipe: Connection, rank: int, work: Callable[..., Any], arguments: Any) -> None:
    faulthandler.dump_traceback_later(_SECONDS, exit=True)
    logging.basicConfig(level=logging.INFO, format=f"rank {rank}: %(message)s")
    import cupy

    point = MeetingPoint()
    pipe.send(point.endpoint)
    host = point.join(rank, pipe.recv())
    try:
        with cupy.cuda.Device(rank), cupy.cuda.Stream(non_blocking=True) as stream:
            group = PeerCommunicator(host)
            answer = work(group, rank, *arguments)
            stream.synchronize()
            with suppress(CommunicatorError):  # if that was the work
                host.barrier()
            group.abort("done")
        pipe.send((None, answer))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
        raise


def sums(group: Any, rank: int, parts: list[list[Any]]) -> list[Any]:
    """Sums of arrays, by the kernel, each as it comes and all again from one graph."""
    import cupy

    assert group.reaches_peers, "the GPUs do not map each other's memory"
    group.own_sizes = frozenset(TRIAL_BYTES)
    arrays = [cupy.asarray(x) for x in parts[rank]]
    stream = cupy.cuda.get_current_stream()
    eager = [cupy.asnumpy(group.all_reduce(x)) for x in arrays]
    stream.begin_capture()
    recorded = [group.all_reduce(x) for x in arrays]
    graph = stream.end_capture()
    for _ in range(3):
        graph.launch(stream)
    for one, other in zip(recorded, eager, strict=True):
        assert cupy.asnumpy(one).tobytes() == other.tobytes()
    return eager


def normed_sums(group: Any, rank: int, cases: list[dict[str, Any]]) -> list[Any]:
    """Sums that go on to the residual stream and its norm, in one kernel and in two, each as it
    comes and all again from one graph."""
    import cupy

    assert group.reaches_peers, "the GPUs do not map each other's memory"
    group.own_sizes = frozenset(TRIAL_BYTES)
    given = []
    for case in cases:
        names = ("x", "weight", "delta_weight")
        arrays = {name: _on_gpu(case[name]) for name in names}
        given.append((cupy.asarray(case["deltas"][rank]), arrays))

    def joined() -> list[Any]:
        found = []
        for delta, arrays in given:
            x, weight, delta_weight = arrays.values()
            both = group.all_reduce_norm(x, delta, weight, 1e-5, delta_weight=delta_weight)
            assert both is not None, "the kernel does not take these"
            found += both
            if len(found) % 3 == 0:  # calls of both kinds, whose blocks and lines they share
                group.all_reduce(delta)
        return found

    one_by_one = []
    for delta, arrays in given:
        x, weight, delta_weight = arrays.values()
        total = group.all_reduce(delta)
        one_by_one += add_rms_norm(x, total, weight, 1e-5, delta_weight=delta_weight)
    stream = cupy.cuda.get_current_stream()
    eager = [cupy.asnumpy(each) for each in joined()]
    stream.begin_capture()
    recorded = joined()
    graph = stream.end_capture()
    for _ in range(3):
        graph.launch(stream)
    for one, other in zip(recorded, eager, strict=True):
        assert cupy.asnumpy(one).tobytes() == other.tobytes()
    return list(zip(eager, [cupy.asnumpy(each) for each in one_by_one], strict=True))


def _on_gpu(x: Any | None) -> Any | None:
    import cupy

    return None if x is None else cupy.asarray(x)


def collectives(group: Any, rank: int) -> list[Any]:
    """Everything else, by NCCL, eagerly and from a graph."""
    import cupy

    found = []
    stream = cupy.cuda.get_current_stream()
    for dtype in (np.float16, np.float32, np.int32):
        group.own_sizes = frozenset()
        x = cupy.arange(1000, dtype=dtype) % 100 + rank
        gathered = group.all_gather(x)
        both = group.reduce_scatter(gathered)
        total = group.all_reduce(x)
        stream.begin_capture()
        recorded = group.all_reduce(x), group.all_gather(x)
        graph = stream.end_capture()
        graph.launch(stream)
        assert (cupy.asnumpy(recorded[0]) == cupy.asnumpy(total)).all()
        assert (cupy.asnumpy(recorded[1]) == cupy.asnumpy(gathered)).all()
        if rank == 0:
            group.send(x, 1)
        else:
            x = group.recv(cupy.zeros_like(x), 0)
        y = cupy.arange(10, dtype=dtype) + 5 * rank
        group.broadcast(y, 1)
        found.append([cupy.asnumpy(each) for each in (gathered, both, total, x, y)])
    return found


def unanswered(group: Any, rank: int) -> float:
    """A sum to which one rank does not come; the group is aborted, and its stream goes on."""
    import cupy

    x = cupy.ones(4096, cupy.float16)
    if rank == 0:
        group.all_reduce(x)
        group.abort("the other is gone")
    return float(x.sum())
