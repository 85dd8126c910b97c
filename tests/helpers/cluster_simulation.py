"""A cluster under a virtual clock: the real scheduler and choice of replicas, modelled steps.

Every plan is made by `Scheduler.schedule` and every request sent by `ReplicaChoice.choose`; what is
modelled is how long a step takes, when requests come, and what is in them. A router runs two plans
ahead of its shards, as on a GPU, and tells its load at the end of each step, as over its
connections. Nothing runs but Python, so a virtual hour takes as long as its decisions do.
"""

from __future__ import annotations

import heapq
import random
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from tensorray.actors.protocol import KVGroups, Sampling, StepPlan, StepResult
from tensorray.cluster.replica_choice import SEQUENCE_TOKENS, Choice, ReplicaChoice, weight
from tensorray.cluster.request import GenerationRequest, QueueFull
from tensorray.cluster.router_share import Place
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.sequence import Sequence

Policy = Literal["random", "balanced", "prefix"]

_PLANS_AHEAD = 2
_TOKEN = 7  # what every sequence says
_TIMED = 16  # of so many decisions one is timed: looking at the clock is not free
_SAMPLING = Sampling()


def who_gains(plan: StepPlan, left: dict[int, int]) -> tuple[list[int], list[int]]:
    """The sequences that a step brings a token, and those of them whose prompts it completes.
    `left` is how much of a prompt is still to be computed, by sequence; brought up to date."""
    seqs, firsts = [], []
    for seq, count in zip(plan.seqs, plan.counts, strict=True):
        if seq in left:
            left[seq] -= count
            if left[seq]:
                continue
            del left[seq]
            firsts.append(seq)
        seqs.append(seq)
    return seqs, firsts


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step: what it takes whatever it runs, for each token, and for each token of
    context that a decode reads."""

    base: float
    token: float
    context: float

    def seconds(self, tokens: int, context: int) -> float:
        return self.base + self.token * tokens + self.context * context


#: An 8B model on one H200 in FP16: weights read once a step (4.9 ms), 2 * 8e9 FLOP a token at
#: 790 TFLOP/s, 128 KiB of keys and values a token of context at 4.3 TB/s. It gives 4.94 ms a token
#: alone, 16 at once 5.4 ms, and 256 with 512 tokens in and 256 out 25.4 ms a step, where 4.94, 5.3
#: and 25.7 were measured.
H200_8B = StepTimes(4.9e-3, 20.3e-6, 30e-9)

#: A 70B model on eight: an eighth of 141 GB of weights, of 141 GFLOP a token and of 320 KiB a token
#: of context, and 160 all-reduces at 6.4 us and 3.65 us a MB.
EIGHT_H200_70B = StepTimes(4.1e-3 + 160 * 6.4e-6, 22.3e-6 + 9.6e-6, 9.5e-9)


@dataclass(frozen=True)
class Workload:
    """Requests: bursts, prompts that share beginnings, and lengths with long tails."""

    requests: int
    rate: float  # a second, over calm and bursts
    seed: int = 0
    burst: float = 2.0  # times the calm rate, half of the time
    burst_seconds: float = 4.0  # of a burst, on average; as long is calm
    groups: int = 2000  # beginnings, asked for by Zipf's law
    zipf: float = 1.0
    prefix: tuple[float, float] = (5.7, 0.6)  # lognormal: median 300 tokens
    own: tuple[float, float] = (4.6, 0.9)  # median 100
    output: tuple[float, float] = (4.2, 0.7)  # median 64
    longest: int = 4096
    users: int = 500

    def arrivals(self) -> Iterator[tuple[float, GenerationRequest]]:
        """Requests with the seconds at which they come."""
        rng = random.Random(self.seed)
        calm = self.rate * 2 / (1 + self.burst)
        by_zipf = list(accumulate((rank + 1) ** -self.zipf for rank in range(self.groups)))
        users = list(accumulate(1 / (rank + 1) for rank in range(self.users)))
        shared = [
            [2000 + group] * min(self.longest // 2, int(rng.lognormvariate(*self.prefix)))
            for group in range(self.groups)
        ]
        now = until = 0.0
        bursting = True
        for number in range(self.requests):
            now += rng.expovariate(calm * self.burst if bursting else calm)
            while now > until:
                until += rng.expovariate(1 / self.burst_seconds)
                bursting = not bursting
            (group,) = rng.choices(range(self.groups), cum_weights=by_zipf)
            (user,) = rng.choices(range(self.users), cum_weights=users)
            own = 1 + min(self.longest // 2 - 1, int(rng.lognormvariate(*self.own)))
            output = 1 + min(self.longest // 4, int(rng.lognormvariate(*self.output)))
            prompt = shared[group] + [1_000_000 + number] + [3] * (own - 1)
            yield (
                now,
                GenerationRequest(str(number), prompt, _SAMPLING, output, user=str(user)),
            )


@dataclass
class Times:
    """Many durations, in seconds."""

    values: array[float] = field(default_factory=lambda: array("f"))

    def add(self, seconds: float) -> None:
        self.values.append(seconds)

    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else 0.0

    def quantile(self, share: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass
class Report:
    """What came of a run. Times of the model are virtual; costs are CPU time spent here."""

    finished: int = 0
    refused: int = 0
    virtual_seconds: float = 0.0
    output_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    most_waiting: int = 0  # sequences, at one replica
    frames: int = 0  # that routers sent ingresses
    items: int = 0  # streams' news in them
    busy: list[float] = field(default_factory=list)  # seconds a replica
    first_token: Times = field(default_factory=Times)
    token: Times = field(default_factory=Times)  # a request's time a token after the first
    step: Times = field(default_factory=Times)
    choice_cost: Times = field(default_factory=Times)  # a request
    plan_cost: Times = field(default_factory=Times)  # `schedule`
    result_cost: Times = field(default_factory=Times)  # `update`

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def imbalance(self) -> float:
        """The busiest replica's time at work, in times of the average."""
        return max(self.busy) * len(self.busy) / sum(self.busy)


class _Request:
    """Where a request is, for the times it takes."""

    __slots__ = ("arrival", "first", "prompt")

    def __init__(self, arrival: float, prompt: int) -> None:
        self.arrival = arrival
        self.first = 0.0
        self.prompt = prompt  # tokens


class _Replica:
    """A router and the shards it plans for."""

    def __init__(self, scheduler: Scheduler, times: StepTimes) -> None:
        self.scheduler = scheduler
        self.times = times
        self.requests: dict[int, _Request] = {}
        self.doors: dict[int, int] = {}  # by sequence: the ingress that it came by
        self.told = 0  # its load, as ingresses know it
        self.unseen: dict[int, int] = {}  # by ingress: what it sent and the load does not count
        self.ends: deque[tuple[float, StepPlan]] = deque()
        self.busy = 0.0
        self.context = 0  # tokens that a step of all sequences reads
        self._left: dict[int, int] = {}  # prompt tokens that no step has run
        self._next = 0

    def add(self, request: GenerationRequest, arrival: float, ingress: int) -> None:
        """Raises QueueFull."""
        sequence = Sequence(self._next, request, request.sampling)
        self.scheduler.add(sequence)
        self.requests[self._next] = _Request(arrival, len(request.prompt))
        self.doors[self._next] = ingress
        self._next += 1

    def plan(self, now: float, report: Report) -> Iterator[float]:
        """Have plans made ahead; when each of their steps ends."""
        while len(self.ends) < _PLANS_AHEAD:
            timed = (report.steps + len(self.ends)) % _TIMED == 0
            began = time.process_time() if timed else 0.0
            plan = self.scheduler.schedule()
            if plan is None:
                return
            if timed:
                report.plan_cost.add(time.process_time() - began)
            for start in plan.starts:
                self._left[start.seq] = len(start.tokens) - start.computed
            seconds = self.times.seconds(sum(plan.counts), self.context)
            report.step.add(seconds)
            self.busy += seconds
            end = max(now, self.ends[-1][0] if self.ends else 0.0) + seconds
            self.ends.append((end, plan))
            yield end

    def end_step(self, now: float, report: Report) -> None:
        """The step that runs ends: what it brought."""
        _, plan = self.ends.popleft()
        left, requests = self._left, self.requests
        for seq in plan.ends:
            left.pop(seq, None)
        seqs, firsts = who_gains(plan, left) if left else (plan.seqs, [])
        result = StepResult(plan.step, seqs, [_TOKEN] * len(seqs))
        timed = report.steps % _TIMED == 0
        began = time.process_time() if timed else 0.0
        gains = self.scheduler.update(result)
        if timed:
            report.result_cost.add(time.process_time() - began)
        report.steps += 1
        gained = {gain.sequence.seq for gain in gains} if firsts else set()
        for seq in firsts:
            tracked = requests.get(seq)
            if tracked is not None and not tracked.first and seq in gained:
                tracked.first = now
                self.context += tracked.prompt
                report.first_token.add(now - tracked.arrival)
        # A step's news for one ingress is one frame. Those that ended a step ago gain nothing.
        doors = self.doors
        report.frames += len(set(map(doors.get, seqs)) - {None})
        for gain in gains:
            if gain.finish_reason is None:
                continue
            s = gain.sequence
            tracked = requests.pop(s.seq)
            del doors[s.seq]
            self.context -= s.prompt_len
            report.finished += 1
            report.prompt_tokens += s.prompt_len
            report.cached_tokens += s.cached_tokens
            if s.output_len > 1:
                report.token.add((now - tracked.first) / (s.output_len - 1))
        report.output_tokens += len(gains)
        report.items += len(gains)
        self.told = weight(self.scheduler.queued_tokens, self.scheduler.unfinished)
        self.unseen.clear()


class _Ingress:
    """Sends requests to replicas, by what it knows of them."""

    def __init__(self, place: Place, replicas: list[_Replica], policy: Policy, seed: int) -> None:
        self._number = place.number
        self._replicas = replicas
        self._random = random.Random(seed) if policy == "random" else None
        routing: Literal["prefix", "balanced"] = "prefix" if policy == "prefix" else "balanced"
        meet = place.ingresses > 1
        self.choice: ReplicaChoice[int] = ReplicaChoice(routing, meet=meet, seed=seed)
        senders = place.senders(len(replicas))
        for name in range(len(replicas)):
            if place.sends_to(str(name), senders):
                self.choice.add(name, str(name))

    def choose(self, request: GenerationRequest) -> Choice[int]:
        if self._random is not None:
            return Choice(self._random.randrange(len(self._replicas)), 0)
        choice = self.choice.choose(request, self._load)
        assert choice is not None
        sent = SEQUENCE_TOKENS + max(0, len(request.prompt) - choice.cached)
        unseen = self._replicas[choice.replica].unseen
        unseen[self._number] = unseen.get(self._number, 0) + sent
        return choice

    def _load(self, name: int) -> int:
        replica = self._replicas[name]
        return replica.told + replica.unseen.get(self._number, 0)


def simulate(
    workload: Workload,
    policy: Policy,
    *,
    replicas: int,
    ingresses: int = 1,
    times: StepTimes = EIGHT_H200_70B,
    kv_tokens: int = 131_072,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_waiting: int = 4096,
    more: Callable[[int], bool] = lambda _: True,
) -> Report:
    """Run a workload to its end. `more` hears how many requests have come, and says
    whether others may."""
    report = Report()
    kv = KVGroups([None], 1 + kv_tokens // block_size, block_size)
    routers = [
        _Replica(
            Scheduler(
                kv,
                max_model_len=workload.longest,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_waiting=max_waiting,
            ),
            times,
        )
        for _ in range(replicas)
    ]
    doors = [
        _Ingress(Place(i, ingresses), routers, policy, workload.seed + i) for i in range(ingresses)
    ]
    ends: list[tuple[float, int]] = []  # of steps that are under way, and whose they are
    arrivals = workload.arrivals()
    coming = next(arrivals, None)
    number = 0
    while coming is not None or ends:
        if coming is not None and (not ends or coming[0] <= ends[0][0]):
            now, request = coming
            coming = next(arrivals, None) if more(number + 1) else None
            door = number % ingresses
            number += 1
            timed = number % _TIMED == 0
            began = time.process_time() if timed else 0.0
            choice = doors[door].choose(request)
            if timed:
                report.choice_cost.add(time.process_time() - began)
            name, router = choice.replica, routers[choice.replica]
            try:
                router.add(request, now, door)
            except QueueFull:
                report.refused += 1
                continue
            report.most_waiting = max(report.most_waiting, len(router.scheduler._waiting))
        else:
            now, name = heapq.heappop(ends)
            router = routers[name]
            router.end_step(now, report)
        for end in router.plan(now, report):
            heapq.heappush(ends, (end, name))
        report.virtual_seconds = now
    report.busy = [router.busy for router in routers]
    report.preemptions = sum(router.scheduler.stats().preemptions for router in routers)
    return report
