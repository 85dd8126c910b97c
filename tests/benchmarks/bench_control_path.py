"""How long a plan takes from the router to its shards: over the links, and by plain actor calls.

    python tests/benchmarks/bench_control_path.py --shards 1 2 4 8

Shards are Ray actors on this machine that note when a plan has reached them (decoded) and compute
nothing. "plan to shard" is from before the plan is encoded to its arrival at the last shard, which
the machine's one clock allows to take; "round trip" is until the router has the result. The two
ways take turns in one run, so that what else the machine does disturbs both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from functools import partial
from typing import Any

import numpy as np
import ray

from tensorray.actors.communicator import Communicator
from tensorray.actors.group_link import GroupLink
from tensorray.actors.link import PendingStep
from tensorray.actors.protocol import KVGroups, ShardInfo, StepPlan, StepResult
from tensorray.actors.tcp_link import ShardServer, TcpLink
from tensorray.actors.wire import Endpoint

BATCH = 64  # decodes a plan
WARM_UP = 50


class Stopwatch:
    """A shard that notes when plans arrive."""

    def __init__(self, answers: bool) -> None:
        self.info = ShardInfo(
            kv=KVGroups([None], 2, 16),
            vocab_size=1,
            max_model_len=1,
            device="null",
            weight_bytes=0,
            kv_cache_bytes=0,
            load_seconds=0.0,
            answers=answers,
        )
        self.arrivals: list[float] = []

    def submit(self, plan: StepPlan) -> PendingStep:
        self.arrivals.append(time.clock_gettime(time.CLOCK_MONOTONIC))
        return partial(self.execute, plan)

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(step=plan.step, seqs=plan.seqs, tokens=plan.seqs)

    def join(self, world: Communicator, num_blocks: int) -> None:
        pass

    def interrupt(self, reason: str) -> None:
        pass

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


class Actor:
    """A stopwatch that can be reached both ways."""

    def __init__(self, answers: bool) -> None:
        self._linked, self._called = Stopwatch(answers), Stopwatch(answers)
        self._server = ShardServer(self._linked)

    def endpoint(self) -> Endpoint:
        return self._server.endpoint

    def step(self, plan: StepPlan) -> StepResult:
        return self._called.submit(plan)()

    def arrivals(self) -> tuple[list[float], list[float]]:
        return self._linked.arrivals, self._called.arrivals


async def measure(shards: int, steps: int) -> dict[str, Any]:
    actors: list[Any] = [
        ray.remote(Actor).options(num_cpus=0).remote(rank == 0) for rank in range(shards)
    ]
    links = [await TcpLink.connect(await actor.endpoint.remote()) for actor in actors]
    link = GroupLink(links) if shards > 1 else links[0]
    plan = StepPlan(step=0, seqs=list(range(BATCH)), counts=[1] * BATCH)
    sent: dict[str, list[float]] = {"link": [], "calls": []}
    trips: dict[str, list[float]] = {"link": [], "calls": []}
    for _ in range(WARM_UP + steps):
        sent["link"].append(began := time.clock_gettime(time.CLOCK_MONOTONIC))
        link.send(plan)
        await link.receive()
        trips["link"].append(time.clock_gettime(time.CLOCK_MONOTONIC) - began)
        sent["calls"].append(began := time.clock_gettime(time.CLOCK_MONOTONIC))
        await asyncio.gather(*[actor.step.remote(plan) for actor in actors])
        trips["calls"].append(time.clock_gettime(time.CLOCK_MONOTONIC) - began)
    await asyncio.sleep(0.2)  # those that don't answer may be behind
    arrivals = await asyncio.gather(*[actor.arrivals.remote() for actor in actors])
    await link.close()
    for actor in actors:
        ray.kill(actor)
    row: dict[str, Any] = {"shards": shards}
    for way, name in enumerate(("link", "calls")):
        last = np.max([np.array(each[way]) for each in arrivals], axis=0)
        for what, seconds in (
            ("plan_to_shard", last - np.array(sent[name])),
            ("round_trip", np.array(trips[name])),
        ):
            micros = seconds[WARM_UP:] * 1e6
            row[f"{name}_{what}_us"] = round(float(np.median(micros)), 1)
            row[f"{name}_{what}_p99_us"] = round(float(np.quantile(micros, 0.99)), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rows = [asyncio.run(measure(shards, options.steps)) for shards in options.shards]
    ray.shutdown()
    if options.json:
        print(json.dumps(rows))
        return
    print("microseconds, median (p99)     over links                 by actor calls")
    for what in ("plan_to_shard", "round_trip"):
        for row in rows:
            cells = [
                f"{row[f'{name}_{what}_us']:9.0f} ({row[f'{name}_{what}_p99_us']:.0f})"
                for name in ("link", "calls")
            ]
            label = f"{what.replace('_', ' ')}, {row['shards']} shards"
            print(f"{label:26} {cells[0]:>22} {cells[1]:>26}")


if __name__ == "__main__":
    main()
