"""What the scheduler and block manager cost: microseconds of `schedule` plus `update` per step.

    python tests/benchmarks/bench_scheduler.py

"decode": a fixed number of sequences, all decoding. "churn": 256 running out of an endless queue,
prompts of 100 to 1000 tokens, outputs of 50 to 400, a step admitting whatever has room. Every
block is hashed and offered for reuse, as when serving; the garbage collector stays on. Every run
is repeated, and each step counted at its fastest: the work of a step is the same each time, other
processes only ever add to it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque

from tensorray.actors.protocol import KVGroups, Sampling, StepPlan, StepResult
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.sequence import Sequence

MODELS: dict[str, list[int | None]] = {
    "1 group": [None],
    "6 groups (Gemma 3 270M: 1 full, 5 of window 512)": [None, 512, 512, 512, 512, 512],
}
REPEATS = 3
SAMPLING = Sampling(stop_token_ids=[1, 106])


class InstantShard:
    """Answers a plan at once; only keeps how many tokens each sequence still has to prefill."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        left = self.left
        for seq in plan.ends:
            left.pop(seq, None)
        for start in plan.starts:
            left[start.seq] = len(start.tokens) - start.computed
        seqs = []
        for seq, count in zip(plan.seqs, plan.counts, strict=True):
            left[seq] -= count
            if left[seq] <= 0:
                seqs.append(seq)
        return StepResult(plan.step, seqs, [2000 + plan.step % 1000] * len(seqs))


def scheduler(windows: list[int | None], max_num_seqs: int, num_blocks: int) -> Scheduler:
    return Scheduler(
        KVGroups(windows, num_blocks, 16),
        max_model_len=8192,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
    )


def sequence(seq: int, rng: random.Random, prompt: int, max_tokens: int) -> Sequence:
    tokens = [rng.randrange(200_000) for _ in range(prompt)]
    return Sequence(seq, GenerationRequest(str(seq), tokens, SAMPLING, max_tokens), SAMPLING)


def timed_step(
    engine: Scheduler, shard: InstantShard, results: deque[StepResult], depth: int
) -> float:
    """One step with `depth` plans out; the scheduler's own seconds."""
    spent = 0.0
    while len(results) < depth:
        begin = time.thread_time()
        plan = engine.schedule()
        spent += time.thread_time() - begin
        assert plan is not None
        results.append(shard.execute(plan))
    begin = time.thread_time()
    engine.update(results.popleft())
    return spent + time.thread_time() - begin


def decode(windows: list[int | None], running: int, depth: int) -> list[float]:
    """Seconds of each of many steps in which `running` sequences decode."""
    rng = random.Random(0)
    engine = scheduler(windows, running, 400_000)
    shard = InstantShard()
    results: deque[StepResult] = deque()
    for seq in range(running):
        engine.add(sequence(seq, rng, rng.randrange(100, 700), 4000))
    while engine.stats().prefill_tokens or not engine.stats().decode_tokens:
        timed_step(engine, shard, results, depth)
    return [timed_step(engine, shard, results, depth) for _ in range(640)]


def churn(windows: list[int | None], depth: int) -> list[float]:
    """Seconds of each of many steps at full load, sequences coming and going."""
    rng = random.Random(0)
    # About what 256 sequences need; blocks of ended ones are evicted all the time.
    engine = scheduler(windows, 256, 1 + 256 * (40 + 34 * (len(windows) - 1)))
    shard = InstantShard()
    results: deque[StepResult] = deque()
    times = []
    seq = 0
    for step in range(1500):
        while engine.stats().waiting < 32:
            engine.add(sequence(seq, rng, rng.randrange(100, 1000), rng.randrange(50, 400)))
            seq += 1
        spent = timed_step(engine, shard, results, depth)
        if step >= 500:
            times.append(spent)
    return times


def report(name: str, runs: list[list[float]]) -> None:
    times = sorted(min(step) * 1e6 for step in zip(*runs, strict=True))
    mean, p50, p99 = statistics.fmean(times), times[len(times) // 2], times[len(times) * 99 // 100]
    print(f"  {name:20} mean {mean:6.0f}   p50 {p50:6.0f}   p99 {p99:6.0f}   us a step")


def main() -> None:
    for name, windows in MODELS.items():
        for depth in (1, 2):
            print(f"{name}, {depth} plan{'s' * (depth > 1)} out")
            for running in (1, 16, 64, 256):
                runs = [decode(windows, running, depth) for _ in range(REPEATS)]
                report(f"decode, {running} running", runs)
            report("churn, 256 running", [churn(windows, depth) for _ in range(REPEATS)])


if __name__ == "__main__":
    main()
