"""A shard in a process of its own on this machine, for who has no Ray: what ShardHost is, over a
pipe.

GPUs of one process would share a Python interpreter and the locks of CUDA's driver, and a kernel
that waits for another GPU's might keep the thread that is to start that one from getting there.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

from tensorray.actors.adapter import Adapter
from tensorray.actors.config import ShardConfig
from tensorray.actors.shard_host import Loaded, ShardHost
from tensorray.actors.wire import Endpoint

_CLOSE_SECONDS = 30.0
# As this process finds its modules, the other does.
_START = (
    "import sys; sys.path[:] = {path!r}; "
    "from tensorray.actors.shard_process import serve; serve({fd}, {level})"
)


class ShardProcess:
    """A shard that loads, in its process, while the caller goes on. See ShardHost.

    All calls but `close` raise what they raise there, and RuntimeError once the process has ended.
    SIGUSR1 has it write to stderr where its threads are.
    """

    def __init__(self, config: ShardConfig, gpu: int = 0) -> None:
        self._rank = config.rank
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None
        self._pipe, theirs = Pipe()
        level = logging.getLogger("tensorray").getEffectiveLevel()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _START.format(path=sys.path, fd=theirs.fileno(), level=level),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._pipe.send((config, gpu))

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def loaded(self) -> Loaded:
        """Waits until it is."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._answer()
            return self._loaded

    def join(self, epoch: int, members: Sequence[Endpoint], num_blocks: int) -> None:
        self._call("join", epoch, members, num_blocks)

    def add_adapter(self, adapter: Adapter) -> None:
        self._call("add_adapter", adapter)

    def remove_adapter(self, id: int) -> None:
        self._call("remove_adapter", id)

    def adapters(self) -> list[Adapter]:
        found: list[Adapter] = self._call("adapters")
        return found

    def close(self) -> None:
        """End the process, in order if it can be."""
        self._pipe.close()  # which is what it waits for
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, name: str, *arguments: Any) -> Any:
        with self._lock:
            with suppress(OSError):
                self._pipe.send((name, arguments))
            return self._answer()

    def _answer(self) -> Any:
        try:
            error, answer = self._pipe.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_CLOSE_SECONDS)
            raise RuntimeError(
                f"the process of shard {self._rank} has ended: {_ending(self._process.returncode)}"
            ) from None
        if error is not None:
            raise error
        return answer


def _ending(code: int | None) -> str:
    if code is None:
        return "it is about to"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve(fd: int, level: int) -> None:
    """What such a process runs, until the pipe ends."""
    logging.basicConfig(level=level, format="%(asctime)s pid %(process)d %(message)s")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for who started this
    pipe = Connection(fd)
    config, gpu = pipe.recv()
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, calls), daemon=True).start()
    host: ShardHost | None = None
    try:
        host = ShardHost(config, gpu=gpu)
        _send(pipe, None, host.loaded)
    except Exception as error:
        _send(pipe, error, None)
    while (call := calls.get()) is not None:
        name, arguments = call
        try:
            _send(pipe, None, getattr(host, name)(*arguments))
        except Exception as error:
            _send(pipe, error, None)
    if host is not None:
        host.close()
    # Whatever a thread may still wait for, nobody needs it.
    os._exit(0)


def _receive(pipe: Connection, calls: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            calls.put(pipe.recv())
    except (EOFError, OSError):
        calls.put(None)
        # Even in the midst of loading: there is nobody to hear of it.
        threading.Timer(_CLOSE_SECONDS, os._exit, [1]).start()


def _send(pipe: Connection, error: Exception | None, answer: Any) -> None:
    with suppress(BrokenPipeError):
        try:
            pipe.send((error, answer))
        except (TypeError, AttributeError):  # one that can't be pickled
            pipe.send((RuntimeError(f"{type(error).__name__}: {error}"), None))
