"""The link over which step plans reach a shard and results come back.

One small interface, so that the engine does not care where a shard runs: in its own process
(`LocalLink` here) or behind one TCP connection (tcp_link.py).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from tensorray.actors.adapter import Adapter
from tensorray.actors.communicator import Communicator
from tensorray.actors.protocol import ShardInfo, StepPlan, StepResult

#: A step that was started: called once, it waits for the step's end and gives its result.
PendingStep = Callable[[], StepResult]


class ShardError(RuntimeError):
    """The shard is gone or its state can't be trusted; carries the shard's own reason."""


class StepExecutor(Protocol):
    """What stands at the far end of a link: a shard, or something that behaves like one."""

    info: ShardInfo

    def submit(self, plan: StepPlan) -> PendingStep:
        """Start a step, without waiting for it where the device runs by itself.

        Plans come in order, and results are asked for in the same order, maybe by another thread.
        An exception from either leaves the executor's state undefined.
        """
        ...

    def join(self, world: Communicator, num_blocks: int) -> None:
        """Take its place among its replica's shards, whose KV caches have `num_blocks` blocks.

        Forgets every sequence; the weights stay. A shard that is alone in its replica needs this
        only to have another number of blocks than it chose.
        """

    def add_adapter(self, adapter: Adapter) -> None:
        """Load a LoRA adapter, while steps run; sequences may start with it from now on.

        Raises CheckpointError or ValueError saying what is wrong with it.
        """

    def remove_adapter(self, id: int) -> None:
        """Forget an adapter, if it is there. No sequence will start with it any more."""

    def adapters(self) -> list[Adapter]:
        """Those that are loaded."""
        ...

    def interrupt(self, reason: str) -> None:
        """From another thread: wake a step that waits for other shards, and those that wait for
        this one, with an error. They have to be joined anew. A shard that is alone goes on."""

    def reset(self) -> None:
        """Forget every sequence (its router is gone); weights and cache memory stay."""

    def close(self) -> None: ...


class ShardLink(Protocol):
    """Plans go down in order, results come up in the same order; more than one may be in flight."""

    info: ShardInfo

    def send(self, plan: StepPlan) -> None:
        """Hand over a plan; never blocks on the step itself. Raises `ShardError`."""

    async def receive(self) -> StepResult:
        """The next result. Raises `ShardError` when the shard died or the step failed."""
        ...

    def fail(self, error: ShardError) -> None:
        """Have `receive` raise this error instead of waiting on."""

    async def check(self) -> None:
        """While nothing is on its way: raise `ShardError` if the shard is known to be gone."""

    async def close(self) -> None: ...


class LocalLink:
    """A link to an executor in this process.

    Steps are started on the event loop's own thread. With `inline` that thread waits for them too,
    inside `receive`: no thread hop, and nothing else on that loop moves meanwhile (right for `LLM`,
    which has nothing else). Without it a thread of its own waits.
    """

    def __init__(self, executor: StepExecutor, *, inline: bool = False) -> None:
        self.info = executor.info
        self._executor = executor
        self._pending: deque[PendingStep] = deque()
        self._failure: ShardError | None = None
        self._results: deque[asyncio.Future[StepResult]] = deque()
        self._thread = None if inline else ThreadPoolExecutor(1, thread_name_prefix="shard")

    def send(self, plan: StepPlan) -> None:
        try:
            step = self._executor.submit(plan)
        except Exception as error:
            raise ShardError(f"{type(error).__name__}: {error}") from error
        if self._thread is None:
            self._pending.append(step)
        else:
            loop = asyncio.get_running_loop()
            self._results.append(loop.run_in_executor(self._thread, step))

    async def receive(self) -> StepResult:
        try:
            if self._thread is None:
                # The loop's other tasks get their turn first: readers of the last step's tokens.
                await asyncio.sleep(0)
                return self._pending.popleft()()
            result = await self._results[0]
            self._results.popleft()
            return result
        except asyncio.CancelledError:
            if self._failure is not None:
                raise self._failure from None
            raise
        except Exception as error:
            raise ShardError(f"{type(error).__name__}: {error}") from error

    async def check(self) -> None:
        pass  # it lives as long as this process

    def fail(self, error: ShardError) -> None:
        self._failure = error
        for result in self._results:
            result.cancel()

    async def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._executor.close()
