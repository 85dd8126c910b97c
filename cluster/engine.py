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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from tensorray.actors.link import ShardError, ShardLink
from tensorray.actors.protocol import ShardInfo, StepPlan
from tensorray.cluster.adapters import EngineAdapters
from tensorray.cluster.beams import Hypothesis
from tensorray.cluster.engine_observer import EngineObserver, SilentObserver
from tensorray.cluster.handover import Handovers
from tensorray.cluster.replica_choice import weight
from tensorray.cluster.request import (
    Delta,
    FinishReason,
    GenerationRequest,
    Resumed,
    UnknownAdapter,
)
from tensorray.cluster.scheduler import Progress, Scheduler
from tensorray.cluster.sequence import Sequence
from tensorray.cluster.token_stream import TokenStream

logger = logging.getLogger(__name__)


#: Puts shards that failed right: takes their link's error, and what to call with the reason once
#: that is known better; returns a new link. Raises when it can't.
Recover = Callable[[ShardError, Callable[[str], None]], Awaitable[ShardLink]]


class Rest(Protocol):
    """Shards that can be put to sleep while nobody needs them."""

    async def sleep(self) -> None:
        """Free all that they hold."""

    async def wake(self) -> ShardLink:
        """Have them as they were when they were new. Raises when it can't."""
        ...


class Busy(RuntimeError):
    """An engine that has requests does not sleep."""


#: How often an idle engine looks whether its shards are still there.
_IDLE_SECONDS = 0.5

#: A sequence that ran in so many steps that failed, with no token in between, is given up: it may
#: be what the shards die of.
_MOST_FAILURES = 3


class EngineFailed(RuntimeError):
    """The engine can't serve any more; carries the shard's own reason."""


@dataclass(slots=True)
class _Tracked:
    """One running sequence: where its tokens go, and the times metrics want."""

    stream: TokenStream
    index: int
    arrival: float
    last_token: float = 0.0
    generated: int = 0
    failures: int = 0  # of the shards while it ran, since its last token
    began: float = 0.0  # its first step; 0: none yet
    others: range = range(0)  # further indices that end with it: of a beam search all but the first


class Engine:
    """In-flight batching over one replica's shards. All methods belong to one event loop."""

    def __init__(
        self,
        link: ShardLink,
        scheduler: Scheduler,
        *,
        observer: EngineObserver | None = None,
        depth: int | None = None,
        recover: Recover | None = None,
        adapters: EngineAdapters | None = None,
        rest: Rest | None = None,
        idle_seconds: float | None = None,
        hold_seconds: float = 30.0,
    ) -> None:
        """`depth` is how many steps may be on their way to the shard at once, by default as many
        as it asks for: 2 schedules step n+1 while step n runs. Without `recover` the engine fails
        for good when its shards do; without `adapters` requests can't ask for any. With `rest` the
        shards sleep when told to, or after `idle_seconds` without a request; the next one wakes
        them, and waits. `hold_seconds` is the most that handing a prompt over may take."""
        self.info: ShardInfo = link.info
        self.scheduler = scheduler
        self.failure: str | None = None
        self.recovering: str | None = None  # from what, while it waits for its shards
        self.prefix_routed = 0  # requests that an ingress chose this engine for, by their prefix
        self.adapters = adapters
        if adapters is not None:
            adapters.in_flight = lambda: scheduler.in_flight
        self.asleep = False
        self._rest = rest
        self._idle_seconds = idle_seconds
        self._idle_since = time.monotonic()
        self._bedtime = False  # told to sleep, or to stay so
        self._recover = recover
        self._link = link
        self._observer: EngineObserver = observer or SilentObserver()
        self._depth = link.info.depth if depth is None else depth
        self._tracked: dict[int, _Tracked] = {}
        self._streams: dict[str, TokenStream] = {}
        self._next_sequence = 0
        self._wake = asyncio.Event()
        self.handovers = Handovers(
            scheduler,
            hold_seconds,
            expire=self._expire,
            wake=self._wake.set,
            fail=lambda error: self._link.fail(error),
        )
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
        self.handovers.forget()
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
        if request.lora:
            request = self._with_adapter(request)
        resumed: dict[int, Resumed | None] = dict.fromkeys(range(request.n))
        if request.resumed is not None:
            resumed = {each.index: each for each in request.resumed}
        count = request.n
        if request.beams is not None:  # one sequence leads the search; nothing was told before
            count = request.beams.width
            resumed = {0: resumed.get(0)}
        sequences = {}
        for index, begun in resumed.items():
            sampling = request.sampling
            if index:
                sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
            seq = self._next_sequence + index
            sequences[index] = Sequence(seq, request, sampling, begun)
        self.scheduler.add(*sequences.values(), always=request.resumed is not None)
        self._next_sequence += count
        stream = TokenStream(request, {i: each.seq for i, each in sequences.items()}, self.cancel)
        now = time.perf_counter()
        for index, sequence in sequences.items():
            generated = sequence.output_len
            tracked = _Tracked(stream, index, now, now, generated)
            if request.beams is not None:
                tracked.others = range(1, request.n)
            self._tracked[sequence.seq] = tracked
        self._streams[request.request_id] = stream
        if request.adapter and self.adapters is not None:
            self.adapters.acquire(request.adapter)
        self.prefix_routed += request.expected_hit > 0
        self._wake.set()
        return stream

    @property
    def load(self) -> int:
        """What there is to do, as replicas are compared by."""
        return weight(self.scheduler.queued_tokens, self.scheduler.unfinished)

    @property
    def room(self) -> int:
        """Sequences that it would queue beside those it has."""
        return self.scheduler.room

    async def connect(self) -> None:
        """See replicas.LoadedClient: it is right here."""

    def _with_adapter(self, request: GenerationRequest) -> GenerationRequest:
        """The request, with the version of its adapter that it began with, or the present one."""
        if self.adapters is None:
            raise UnknownAdapter("adapters need --enable-lora")
        id = self.adapters.find(request.lora, request.adapter)
        if request.adapter not in (0, id):
            raise EngineFailed(
                f"the version of adapter {request.lora!r} that this request began with has been "
                "replaced, and went with the router that ran it; ask again"
            )
        return msgspec.structs.replace(request, adapter=id)

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences, now. Unknown or finished ones are ignored.

        A reader ends one sequence because its text has come to a stop string, and the whole
        request because nobody waits for it any more; metrics count the former as stopped.
        """
        outcome: FinishReason = "abort" if index is None else "stop"
        stream = self._streams.get(request_id)
        if stream is None:
            return
        for at in stream.sequences if index is None else [index]:
            seq = stream.sequences.get(at, -1)
            tracked = self._tracked.get(seq)
            if tracked is not None:
                self.scheduler.cancel(seq)
                delta = Delta(tracked.index, [], finish_reason="abort")
                held = self.handovers.release(seq)  # then it has done what it was to do
                self._finish(seq, tracked, delta, "length" if held else outcome)
        self._wake.set()  # the shard hears of it in the next plan

    def _expire(self, seq: int) -> None:
        """End a sequence that was held, or that the shards have lost meanwhile."""
        self.scheduler.cancel(seq)
        if (tracked := self._tracked.get(seq)) is not None:
            self._finish(seq, tracked, Delta(tracked.index, [], finish_reason="abort"), "length")
        self._wake.set()

    async def _run(self) -> None:
        in_flight: deque[StepPlan] = deque()
        try:
            while self.failure is None:
                try:
                    await self._step(in_flight)
                except ShardError as error:  # noqa: PERF203
                    if self._recover is None:
                        self.fail(f"the shard failed: {error}")
                    else:
                        await self._restart(error, in_flight, self._recover)
                        in_flight.clear()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("the engine's loop failed")
            self.fail(f"the engine's loop failed: {type(error).__name__}: {error}")

    async def _step(self, in_flight: deque[StepPlan]) -> None:
        """Send plans as far as depth goes, then take one result in, or wait for work."""
        while len(in_flight) < self._depth and (plan := self.scheduler.schedule()):
            in_flight.append(plan)
            for start in plan.starts:
                if (tracked := self._tracked.get(start.seq)) is not None and not tracked.began:
                    tracked.began = time.perf_counter()
            self._link.send(plan)
        if self.scheduler.wants_fetches:
            self.handovers.begin(self.info.doors)
        if not in_flight:
            self._wake.clear()
            if self._rest is not None and self._tired():
                await self._sleep(self._rest)
                return
            try:
                await asyncio.wait_for(self._wake.wait(), _IDLE_SECONDS)
            except asyncio.TimeoutError:
                await self._link.check()
            return
        self._waits_since = self._idle_since = time.monotonic()
        try:
            result = await self._link.receive()
        finally:
            self._waits_since = None
        now = time.perf_counter()
        plan = in_flight.popleft()
        if self.adapters is not None and self.adapters.fading:
            self.adapters.heard()
        for item in self.scheduler.update(result):
            self._advance(item, now)
        self._observer.step(len(plan.seqs), sum(plan.counts), result.seconds)

    def _tired(self) -> bool:
        if self.scheduler.unfinished:
            return False
        idle = time.monotonic() - self._idle_since
        return self._bedtime or (self._idle_seconds is not None and idle >= self._idle_seconds)

    async def _sleep(self, rest: Rest) -> None:
        """Until there is a request, or somebody says so."""
        logger.warning("nothing to do: the shards sleep")
        self.asleep = self._bedtime = True
        try:
            self.handovers.forget()
            await rest.sleep()
            self.scheduler.restart(self.info.kv)  # nothing runs; what was cached is gone
            while self._bedtime and not self.scheduler.unfinished:
                self._wake.clear()
                await self._wake.wait()
            began = time.perf_counter()
            try:
                self._link = await rest.wake()
            except Exception as error:
                logger.exception("the shards do not wake")
                self.fail(f"the shards do not wake: {error}")
                return
            logger.warning("the shards are awake after %.1f s", time.perf_counter() - began)
        finally:
            self.asleep = self._bedtime = False
            self._idle_since = time.monotonic()
        self.info = self._link.info
        for sequence in self.scheduler.restart(self.info.kv):
            self._give_up(sequence.seq, "the KV cache has become too small for it")

    def sleep(self) -> None:
        """Have the shards sleep until a request, or `wake_up`. Raises Busy while there are
        requests."""
        if self.scheduler.unfinished:
            raise Busy(f"{self.scheduler.unfinished} sequences run or wait")
        self._bedtime = True
        self._wake.set()

    def wake_up(self) -> None:
        self._bedtime = False
        self._wake.set()

    async def _restart(
        self, error: ShardError, in_flight: deque[StepPlan], recover: Recover
    ) -> None:
        """Wait for the shards to be put right; then everything goes on from the tokens it has."""
        began = time.perf_counter()
        self._note(str(error))
        self._observer.failed(str(error))
        self.handovers.forget()
        for seq in {self.scheduler.leader(seq) for plan in in_flight for seq in plan.seqs}:
            tracked = self._tracked.get(seq)
            if tracked is None:
                continue
            tracked.failures += 1
            logger.warning(
                "it ran when the shards failed", extra={"request": tracked.stream.log_id}
            )
            if tracked.failures == _MOST_FAILURES:
                self.scheduler.cancel(seq)
                reason = f"it ran in {_MOST_FAILURES} steps that failed, the last so: {error}"
                self._give_up(seq, reason)
        self.scheduler.restart(self.info.kv)
        if self.adapters is not None:
            self.adapters.heard(of_all=True)
        try:
            self._link = await recover(error, self._note)
        except Exception as failure:
            logger.exception("the shards can't be put right")
            self.fail(f"the shards failed ({self.recovering}) and can't be put right: {failure}")
            return
        self.info = self._link.info
        for sequence in self.scheduler.restart(self.info.kv):
            self._give_up(sequence.seq, "the KV cache has become too small for it")
        seconds = time.perf_counter() - began
        logger.warning("the shards are back after %.1f s", seconds)
        self._observer.recovered(self.recovering or "", seconds)
        self.recovering = None

    def _note(self, reason: str) -> None:
        """Why shards failed, as far as it is known now."""
        self.recovering = reason
        logger.error("shards failed: %s", reason)

    def _give_up(self, seq: int, reason: str) -> None:
        tracked = self._tracked[seq]
        delta = Delta(tracked.index, [], finish_reason="error", error=reason)
        logger.error("given up: %s", reason, extra={"request": tracked.stream.log_id})
        self._finish(seq, tracked, delta)

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
            refused=item.refused,
            pooled=item.pooled,
        )
        if item.sequence.drafted:
            delta.drafted, delta.accepted = item.sequence.drafted, item.sequence.accepted
        if item.logprobs is not None:
            delta.logprobs = [item.logprobs]
        if item.hypotheses is not None:
            self._answer(seq, tracked, item.hypotheses, item.sequence.cached_tokens, now)
            return
        if item.sequence.group is not None:
            tracked.failures = 0
            if not item.prompt_logprobs and item.finish_reason is None:
                return  # a step of a search tells nothing
        if item.prompt_logprobs:
            delta.prompt_logprobs = list(item.prompt_logprobs)
            delta.adapter = tracked.stream.request.adapter
        if item.token is not None:
            if tracked.generated == 0:
                delta.cached_tokens = item.sequence.cached_tokens
                delta.adapter = tracked.stream.request.adapter
                delta.queued = tracked.began - tracked.arrival
                self._observer.first_token(now - tracked.arrival, delta.queued)
            else:
                self._observer.next_token(now - tracked.last_token)
            tracked.last_token = now
            tracked.generated += 1
            tracked.failures = 0
        if item.lent is not None:
            delta.source = self.handovers.hold(seq, self.info.doors, item.lent)
        if item.finish_reason is None:
            tracked.stream.push(delta)
        else:
            self._finish(seq, tracked, delta)

    def _answer(
        self, seq: int, tracked: _Tracked, found: list[Hypothesis], cached: int, now: float
    ) -> None:
        """Tell what a beam search has found, all at once. Of those that were asked for and that
        its rules leave no tokens for nothing is told but their end."""
        deltas = []
        for index, each in enumerate(found):
            entries = each.entries
            tokens = [entry.token for entry in entries]
            delta = Delta(index, tokens, logprobs=entries, finish_reason=each.finish_reason)
            if each.finish_reason == "stop":
                delta.stop_token = tokens[-1]
            deltas.append(delta)
            tracked.generated += len(tokens)
        n = tracked.stream.request.n
        deltas += [Delta(i, [], finish_reason="abort") for i in range(len(found), n)]
        deltas[0].cached_tokens = cached
        tracked.others = range(0)
        self._observer.first_token(now - tracked.arrival, tracked.began - tracked.arrival)
        for delta in deltas[1:]:
            tracked.stream.push(delta)
        self._finish(seq, tracked, deltas[0])

    def _finish(
        self, seq: int, tracked: _Tracked, delta: Delta, outcome: FinishReason | None = None
    ) -> None:
        del self._tracked[seq]
        stream = tracked.stream
        for index in tracked.others:
            stream.push(msgspec.structs.replace(delta, index=index))
        stream.push(delta)
        if not any(other in self._tracked for other in stream.sequences.values()):
            self._streams.pop(stream.request.request_id, None)
            if stream.request.adapter and self.adapters is not None:
                self.adapters.release(stream.request.adapter)
        assert delta.finish_reason is not None
        self._observer.finished(
            outcome or delta.finish_reason,
            len(stream.request.prompt),
            tracked.generated,
            time.perf_counter() - tracked.arrival,
        )

    @property
    def waits(self) -> float:
        """For how many seconds a shard has not answered a step; 0 if it owes none."""
        return 0.0 if self._waits_since is None else time.monotonic() - self._waits_since

    def check(self, step_timeout: float) -> None:
        """Raise EngineFailed if the engine can't serve; fail it if its shard has not answered for
        `step_timeout` seconds. A dead shard ends its link; this finds one that hangs."""
        since = self._waits_since
        if self.failure is None and since is not None and time.monotonic() - since > step_timeout:
            reason = f"the shard has not answered a step for {step_timeout:g} s"
            if self._recover is None:
                self.fail(reason)
            else:
                self._waits_since = None
                self._link.fail(ShardError(reason))
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
