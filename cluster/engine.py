"""The engine: the loop that turns waiting requests into steps and steps into token streams.

It owns the scheduler and the link to the shards, and runs on one asyncio event loop: in the
router's replica when serving, in `LLM`'s own thread in process. Nothing here knows text, HTTP
or Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from tensorray.actors.link import ShardError, ShardLink
from tensorray.actors.protocol import ShardInfo, StepPlan
from tensorray.cluster.request import Delta, FinishReason, GenerationRequest
from tensorray.cluster.scheduler import Progress, Scheduler
from tensorray.cluster.sequence import Sequence

logger = logging.getLogger(__name__)


class EngineFailed(RuntimeError):
    """The engine can't serve any more; carries the shard's own reason."""


class EngineObserver(Protocol):
    """What metrics want to hear. Times in seconds."""

    def step(self, sequences: int, tokens: int, seconds: float) -> None: ...

    def first_token(self, since_arrival: float) -> None: ...

    def next_token(self, since_last: float) -> None: ...

    def finished(
        self, reason: FinishReason, prompt_tokens: int, generated: int, since_arrival: float
    ) -> None: ...


class SilentObserver:
    """Hears everything, says nothing."""

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        pass

    def first_token(self, since_arrival: float) -> None:
        pass

    def next_token(self, since_last: float) -> None:
        pass

    def finished(
        self, reason: FinishReason, prompt_tokens: int, generated: int, since_arrival: float
    ) -> None:
        pass


@dataclass(slots=True)
class _Tracked:
    """One running sequence: where its tokens go, and the times metrics want."""

    stream: TokenStream
    index: int
    arrival: float
    last_token: float = 0.0
    generated: int = 0


class TokenStream(AsyncIterator[list[Delta]]):
    """What one request's sequences produce. Each item is all that came since the last one.

    Ends when every sequence has finished. `aclose` (or dropping out of `async for` and closing)
    cancels what still runs.
    """

    def __init__(self, engine: Engine, request: GenerationRequest, sequences: list[int]) -> None:
        self.request = request
        self.sequences = sequences  # the engine's ids, by index
        self._engine = engine
        self._pending: dict[int, Delta] = {}
        self._unfinished = set(range(request.n))
        self._ready = asyncio.Event()

    def push(self, delta: Delta) -> None:
        waiting = self._pending.get(delta.index)
        if waiting is None:
            self._pending[delta.index] = delta
        else:
            waiting.tokens += delta.tokens
            if delta.logprobs:
                waiting.logprobs = waiting.logprobs + delta.logprobs
            if delta.prompt_logprobs:
                waiting.prompt_logprobs = waiting.prompt_logprobs + delta.prompt_logprobs
            waiting.finish_reason = delta.finish_reason
            waiting.stop_token = delta.stop_token
            waiting.error = delta.error
        if delta.finish_reason is not None:
            self._unfinished.discard(delta.index)
        elif self.request.whole:
            return
        self._ready.set()

    async def __anext__(self) -> list[Delta]:
        if not self._ready.is_set():
            if not self._unfinished:
                raise StopAsyncIteration
            await self._ready.wait()
        self._ready.clear()
        deltas = list(self._pending.values())
        self._pending.clear()
        return deltas

    async def aclose(self) -> None:
        await self._engine.cancel(self.request.request_id)


class Engine:
    """In-flight batching over one replica's shards. All methods belong to one event loop."""

    def __init__(
        self,
        link: ShardLink,
        scheduler: Scheduler,
        *,
        observer: EngineObserver | None = None,
        depth: int | None = None,
    ) -> None:
        """`depth` is how many steps may be on their way to the shard at once, by default as many
        as it asks for: 2 schedules step n+1 while step n runs."""
        self.info: ShardInfo = link.info
        self.scheduler = scheduler
        self.failure: str | None = None
        self._link = link
        self._observer: EngineObserver = observer or SilentObserver()
        self._depth = link.info.depth if depth is None else depth
        self._tracked: dict[int, _Tracked] = {}
        self._streams: dict[str, TokenStream] = {}
        self._next_sequence = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._waits_since: float | None = None  # for the shard, by time.monotonic()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="engine")

    async def close(self) -> None:
        """Stop stepping; requests that still run end with finish reason "abort"."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._end_all("abort", "the engine was closed")
        await self._link.close()

    def generate(self, request: GenerationRequest) -> TokenStream:
        """Admit a request; its tokens arrive on the stream.

        Raises RequestRefused (it can never fit), QueueFull, or EngineFailed.
        """
        if self.failure is not None:
            raise EngineFailed(self.failure)
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is already running")
        sequences = []
        for index in range(request.n):
            sampling = request.sampling
            if index:
                sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
            sequences.append(Sequence(self._next_sequence + index, request, sampling))
        self.scheduler.add(*sequences)
        self._next_sequence += request.n
        stream = TokenStream(self, request, [sequence.seq for sequence in sequences])
        now = time.perf_counter()
        for index, seq in enumerate(stream.sequences):
            self._tracked[seq] = _Tracked(stream, index, now)
        self._streams[request.request_id] = stream
        self._wake.set()
        return stream

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences, now. Unknown or finished ones are ignored.

        A reader ends one sequence because its text has come to a stop string, and the whole
        request because nobody waits for it any more; metrics count the former as stopped.
        """
        outcome: FinishReason = "abort" if index is None else "stop"
        stream = self._streams.get(request_id)
        if stream is None:
            return
        for seq in stream.sequences if index is None else [stream.sequences[index]]:
            tracked = self._tracked.get(seq)
            if tracked is not None:
                self.scheduler.cancel(seq)
                delta = Delta(tracked.index, [], finish_reason="abort")
                self._finish(seq, tracked, delta, outcome)
        self._wake.set()  # the shard hears of it in the next plan

    async def _run(self) -> None:
        in_flight: deque[StepPlan] = deque()
        try:
            while True:
                while len(in_flight) < self._depth and (plan := self.scheduler.schedule()):
                    self._link.send(plan)
                    in_flight.append(plan)
                if not in_flight:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self._waits_since = time.monotonic()
                result = await self._link.receive()
                self._waits_since = None
                now = time.perf_counter()
                plan = in_flight.popleft()
                for item in self.scheduler.update(result):
                    self._advance(item, now)
                self._observer.step(len(plan.seqs), sum(plan.counts), result.seconds)
        except ShardError as error:
            self.fail(f"the shard failed: {error}")
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("the engine's loop failed")
            self.fail(f"the engine's loop failed: {type(error).__name__}: {error}")

    def _advance(self, item: Progress, now: float) -> None:
        """Pass on what a step brought one sequence."""
        seq = item.sequence.seq
        tracked = self._tracked[seq]
        delta = Delta(
            tracked.index,
            [] if item.token is None else [item.token],
            finish_reason=item.finish_reason,
            stop_token=item.stop_token,
            error=item.error,
        )
        if item.logprobs is not None:
            delta.logprobs = [item.logprobs]
        if item.prompt_logprobs:
            delta.prompt_logprobs = list(item.prompt_logprobs)
        if item.token is not None:
            if tracked.generated == 0:
                delta.cached_tokens = item.sequence.cached_tokens
                self._observer.first_token(now - tracked.arrival)
            else:
                self._observer.next_token(now - tracked.last_token)
            tracked.last_token = now
            tracked.generated += 1
        if item.finish_reason is None:
            tracked.stream.push(delta)
        else:
            self._finish(seq, tracked, delta)

    def _finish(
        self, seq: int, tracked: _Tracked, delta: Delta, outcome: FinishReason | None = None
    ) -> None:
        del self._tracked[seq]
        stream = tracked.stream
        stream.push(delta)
        if not any(other in self._tracked for other in stream.sequences):
            self._streams.pop(stream.request.request_id, None)
        assert delta.finish_reason is not None
        self._observer.finished(
            outcome or delta.finish_reason,
            len(stream.request.prompt),
            tracked.generated,
            time.perf_counter() - tracked.arrival,
        )

    def check(self, step_timeout: float) -> None:
        """Raise EngineFailed if the engine can't serve; fail it if its shard has not answered for
        `step_timeout` seconds. A dead shard ends its link; this finds one that hangs."""
        since = self._waits_since
        if self.failure is None and since is not None and time.monotonic() - since > step_timeout:
            self.fail(f"the shard has not answered a step for {step_timeout:g} s")
        if self.failure is not None:
            raise EngineFailed(self.failure)

    def fail(self, reason: str) -> None:
        """Stop for good: every stream ends with the reason, and new requests are refused by it."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self.failure = reason
        logger.error("%s", reason)
        self._end_all("error", reason)

    def _end_all(self, finish: FinishReason, reason: str) -> None:
        for seq, tracked in list(self._tracked.items()):
            self._finish(seq, tracked, Delta(tracked.index, [], finish_reason=finish, error=reason))
