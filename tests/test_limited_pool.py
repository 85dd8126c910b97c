"""Tasks that end, that never do, and whose process dies."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import wait

from helpers.limited_pool import GivenUp, LimitedPool, Note


def _task(task: str, note: Note) -> str:
    note(f"at {task}")
    if task == "hangs":
        time.sleep(1000)
    if task == "dies":
        os._exit(3)
    return f"{task} by {os.environ['WORKER']}, {os.environ['PREPARED']}"


def _prepare() -> None:
    if os.environ["WORKER"] == "broken":
        os._exit(1)
    os.environ["PREPARED"] = "prepared"


def _pool(count: int) -> LimitedPool[str]:
    return LimitedPool(_task, [{"WORKER": str(i)} for i in range(count)], _prepare)


def test_each_task_has_its_result_and_each_process_its_environment() -> None:
    tasks = iter([(f"task {i}", 60.0) for i in range(8)])
    results = dict(_pool(2).run(tasks, time.perf_counter() + 120))
    assert sorted(results) == [f"task {i}" for i in range(8)]
    for task, result in results.items():
        assert result in (f"{task} by 0, prepared", f"{task} by 1, prepared")
    assert not {"WORKER", "PREPARED"} & {*os.environ}


def test_a_task_without_end_is_given_up_and_the_rest_is_done() -> None:
    tasks = iter([("hangs", 3.0), ("dies", 60.0), ("third", 60.0), ("fourth", 60.0)])
    results = dict(_pool(1).run(tasks, time.perf_counter() + 120))
    hung, dead = results.pop("hangs"), results.pop("dies")
    assert isinstance(hung, GivenUp)
    assert (hung.note, "not done" in hung.why) == ("at hangs", True)
    assert isinstance(dead, GivenUp)
    assert dead.why == "its process ended with status 3"
    assert results == {each: f"{each} by 0, prepared" for each in ("third", "fourth")}


def test_what_is_under_way_at_the_deadline_is_given_up_and_the_rest_left() -> None:
    tasks = iter([("hangs", 600.0), ("left", 60.0)])
    pool = _pool(1)
    worker = pool._workers[0]
    wait([worker.connection])  # have the process up: the deadline is for tasks
    worker.look()
    deadline = time.perf_counter() + 1
    ((task, result),) = pool.run(tasks, deadline)
    assert task == "hangs"
    assert isinstance(result, GivenUp)
    assert result.why == "time was up"
    assert next(tasks)[0] == "left"


def test_a_process_that_cannot_start_leaves_the_work_to_others() -> None:
    pool = LimitedPool(_task, [{"WORKER": "0"}, {"WORKER": "broken"}], _prepare)
    tasks = iter([("first", 60.0), ("second", 60.0)])
    results = dict(pool.run(tasks, time.perf_counter() + 120))
    assert results == {each: f"{each} by 0, prepared" for each in ("first", "second")}
    broken = LimitedPool(_task, [{"WORKER": "broken"}], _prepare)
    assert list(broken.run(iter([("left", 60.0)]), time.perf_counter() + 120)) == []
