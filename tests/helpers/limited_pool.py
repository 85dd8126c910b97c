"""Worker processes for tasks that may never end: each has a limit, and its process is replaced.

A call into a library can't be stopped half-way, but the process that makes it can.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Note = Callable[[str], None]

_SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
_NOTE_BYTES = 600


@dataclass(frozen=True)
class GivenUp:
    """Instead of a result: the task's process was stopped, or ended by itself."""

    seconds: float
    why: str
    note: str  # what the task said last


class LimitedPool(Generic[Task]):
    """As many processes as there are environments, each with its own in `os.environ`.

    `function(task, note)` runs in them, `prepare()` once before, with no limit; all have to be
    picklable. The function says with `note(text)` what it is at, which `GivenUp` tells.
    """

    def __init__(
        self,
        function: Callable[[Task, Note], Any],
        environments: Sequence[Mapping[str, str]],
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._workers = [_Worker(function, prepare, each) for each in environments]

    def run(
        self, tasks: Iterator[tuple[Task, float]], deadline: float
    ) -> Iterator[tuple[Task, Any]]:
        """Each task with its result, as they end, until `deadline` (of `time.perf_counter`).

        A task comes with its limit in seconds, which does not count its process's start, and is
        taken from `tasks` when a process is free for it. Tasks under way at the deadline are given
        up; those not begun are left in `tasks`. No process is left behind.
        """
        try:
            while True:
                now = time.perf_counter()
                for worker in self._workers:
                    if worker.idle and now < deadline:
                        for task, limit in tasks:
                            worker.begin(task, limit)
                            break
                busy = [worker for worker in self._workers if worker.busy]
                starting = [worker for worker in self._workers if worker.starting]
                if not busy and (now >= deadline or not starting):
                    return
                until = min([deadline, *(each.ends for each in busy)])
                wait(
                    [each.connection for each in (*busy, *starting)],
                    timeout=max(0.0, until - time.perf_counter()),
                )
                for worker in starting:
                    worker.look()
                for worker in busy:
                    result = worker.result(deadline)
                    if result is not None:
                        yield result
        finally:
            for worker in self._workers:
                worker.stop()


class _Worker:
    def __init__(
        self,
        function: Callable[[Any, Note], Any],
        prepare: Callable[[], None] | None,
        environment: Mapping[str, str],
    ) -> None:
        self._function = function
        self._prepare = prepare
        self._environment = environment
        self._start()

    def _start(self) -> None:
        self.connection: Connection
        self.connection, theirs = _SPAWN.Pipe()
        self._note: Any = _SPAWN.Array("c", _NOTE_BYTES)
        self._process = _SPAWN.Process(
            target=_serve, args=(theirs, self._function, self._prepare, self._note), daemon=True
        )
        before = dict(os.environ)
        os.environ.update(self._environment)  # a spawned process inherits it
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self.starting, self.busy, self._lost = True, False, False

    @property
    def idle(self) -> bool:
        return not (self.starting or self.busy or self._lost)

    def look(self) -> None:
        """Whether it has started."""
        if self.starting and self.connection.poll():
            self.starting = False
            try:
                self.connection.recv()
            except EOFError:  # it can't start, as it says itself; nor would another
                self._lost = True

    def begin(self, task: Any, limit: float) -> None:
        self._task, self._began, self._limit = task, time.perf_counter(), limit
        self._note.value = b""
        self.connection.send(task)
        self.busy = True

    @property
    def ends(self) -> float:
        return self._began + self._limit

    def result(self, deadline: float) -> tuple[Any, Any] | None:
        """What it has to say of its task, if anything; a process that was lost is replaced."""
        now = time.perf_counter()
        why = ""
        if self.connection.poll():
            try:
                self.busy, result = False, self.connection.recv()
                return self._task, result
            except EOFError:
                self._process.join()
                why = f"its process ended with status {self._process.exitcode}"
        elif now >= self.ends:
            why = f"not done after {self._limit:.0f} s"
        elif now >= deadline:
            why = "time was up"
        if not why:
            return None
        note = self._note.value.decode(errors="replace")
        self.stop()
        if now < deadline:
            self._start()
        else:
            self.starting, self.busy, self._lost = False, False, True
        return self._task, GivenUp(now - self._began, why, note)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        with suppress(OSError):
            self.connection.close()


def _serve(
    connection: Connection,
    function: Callable[[Any, Note], Any],
    prepare: Callable[[], None] | None,
    note: Any,
) -> None:
    def take_note(text: str) -> None:
        note.value = text.encode()[: _NOTE_BYTES - 1]

    if prepare is not None:
        prepare()
    connection.send(None)
    with suppress(EOFError):
        while True:
            connection.send(function(connection.recv(), take_note))
