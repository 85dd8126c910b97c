"""One user who asks for a thousand answers at once, beside ten who ask for one at a time.

    python tests/benchmarks/bench_fairness.py          # a quarter of a minute

The scheduler is the real one; steps take as long as an 8B model's on one H200 (modelled, see
helpers/cluster_simulation.py) and time is virtual. Without users' names all are one user, so the
queue is first come, first served. It is the router's queue: which ingress a request came by makes
no difference.
"""

from __future__ import annotations

import heapq
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.cluster_simulation import H200_8B, who_gains

from tensorray.actors.protocol import KVGroups, Sampling, StepResult
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.sequence import Sequence

HEAVY, LIGHT = 1000, 10  # requests at once; users
EVERY, UNTIL = 2.0, 40.0  # seconds between a light user's requests, and of the whole
SLOTS = 64


@dataclass(order=True)
class Asked:
    at: float
    number: int
    user: str
    prompt: int
    output: int


def requests() -> list[Asked]:
    asked = [Asked(0.0, number, "heavy", 512, 256) for number in range(HEAVY)]
    for user in range(LIGHT):
        at = 0.1 + EVERY * user / LIGHT
        while at < UNTIL:
            asked.append(Asked(at, len(asked), f"light {user}", 128, 64))
            at += EVERY
    return asked


def first_tokens(fair: bool) -> dict[str, list[float]]:
    """Seconds to first tokens, of "heavy" and "light" requests; steps are synchronous."""
    scheduler = Scheduler(
        KVGroups([None], 1 + (1 << 18) // 16, 16),
        max_model_len=4096,
        max_num_seqs=SLOTS,
        max_num_batched_tokens=2048,
    )
    coming = requests()
    heapq.heapify(coming)
    began: dict[int, Asked] = {}
    found: dict[str, list[float]] = {"heavy": [], "light": []}
    left: dict[int, int] = {}
    context = 0
    now = 0.0
    while coming or scheduler.unfinished:
        while coming and (coming[0].at <= now or not scheduler.unfinished):
            asked = heapq.heappop(coming)
            now = max(now, asked.at)
            request = GenerationRequest(
                str(asked.number),
                [asked.number + 1] * asked.prompt,  # nobody shares anything
                Sampling(),
                asked.output,
                user=asked.user if fair else "",
            )
            scheduler.add(Sequence(asked.number, request, request.sampling))
            began[asked.number] = asked
        plan = scheduler.schedule()
        assert plan is not None
        left.update({start.seq: len(start.tokens) - start.computed for start in plan.starts})
        now += H200_8B.seconds(sum(plan.counts), context)
        done, _ = who_gains(plan, left)
        for gain in scheduler.update(StepResult(plan.step, done, [7] * len(done))):
            s = gain.sequence
            asked = began[s.seq]
            if s.output_len == 1:
                context += s.prompt_len
                found[asked.user.split()[0]].append(now - asked.at)
            if gain.finish_reason is not None:
                context -= s.prompt_len
    return found


def main() -> None:
    fair, unfair = first_tokens(fair=True), first_tokens(fair=False)
    for kind in ("light", "heavy"):
        with_names, without = mean(fair[kind]), mean(unfair[kind])
        print(
            f"{kind} users' first token after {with_names:.2f} s, first come first served after "
            f"{without:.2f} s: {without / with_names:.1f} x"
        )


if __name__ == "__main__":
    main()
