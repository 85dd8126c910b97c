"""A thousand replicas of eight GPUs, a million requests, in virtual time: what breaks first?

    python tests/benchmarks/simulate_cluster.py                       # half an hour of a core, 4 GB
    python tests/benchmarks/simulate_cluster.py --replicas 16 --requests 20000

The scheduler and the choice of replicas are the real ones; steps take as long as a 70B model's on
eight H200s (helpers/cluster_simulation.py says what that is made of). For each way of choosing a
replica it prints what users would see, and what deciding costs on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import resource
import socket
import sys
import time
from functools import partial
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers.cluster_simulation import Policy, Report, Workload, simulate

from tensorray.actors.wire import frame, read_frame
from tensorray.cluster.engine_link import Item, Told
from tensorray.cluster.request import Delta
from tensorray.cluster.router_share import Place


async def frame_cost(items: float, connections: int = 250) -> float:
    """CPU seconds to read and decode a frame with the news of so many streams, as an ingress does:
    of many connections, each of which has one."""
    count = max(1, round(items))
    told = Told([Item(i, [Delta(0, [i])]) for i in range(count)], 1, 1, 1)
    data = frame(msgspec.msgpack.encode(told))
    pairs = [socket.socketpair() for _ in range(connections)]
    heard = asyncio.Semaphore(0)

    async def listen(end: socket.socket) -> None:
        reader, _ = await asyncio.open_connection(sock=end)
        decoder = msgspec.msgpack.Decoder(Told)
        while True:
            decoder.decode(await read_frame(reader))
            heard.release()

    listeners = [asyncio.create_task(listen(near)) for near, _ in pairs]
    await asyncio.sleep(0)
    spent, rounds = 0.0, 20
    for _ in range(rounds):
        for _, far in pairs:
            far.sendall(data)
        began = time.process_time()
        for _ in pairs:
            await heard.acquire()
        spent += time.process_time() - began
    for listener in listeners:
        listener.cancel()
    for _, far in pairs:
        far.close()
    await asyncio.gather(*listeners, return_exceptions=True)
    return spent / (rounds * connections)


def table(report: Report, replicas: int, ingresses: int, wall: float) -> None:
    rate = report.finished / report.virtual_seconds
    frames = report.frames / report.virtual_seconds / ingresses
    items = report.items / max(1, report.frames)
    choice, step = report.choice_cost, report.step
    place = Place(0, ingresses)
    scheduler = report.plan_cost.mean() + report.result_cost.mean()
    worst = report.plan_cost.quantile(0.99) + report.result_cost.quantile(0.99)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = {
        "requests finished, refused": f"{report.finished:,}, {report.refused:,}",
        "virtual seconds, wall seconds": f"{report.virtual_seconds:.0f}, {wall:.0f}",
        "requests/s, output tokens/s": f"{rate:,.0f}, "
        f"{report.output_tokens / report.virtual_seconds:,.0f}",
        "prompt tokens found in caches": f"{report.hit_rate:.1%}",
        "first token p50, p99": f"{report.first_token.quantile(0.5) * 1e3:.0f}, "
        f"{report.first_token.quantile(0.99) * 1e3:.0f} ms",
        "a token after that p50, p99": f"{report.token.quantile(0.5) * 1e3:.1f}, "
        f"{report.token.quantile(0.99) * 1e3:.1f} ms",
        "GPUs at work; the busiest replica": f"{sum(report.busy) / replicas:.1f} s each; "
        f"{report.imbalance:.2f} x the average",
        "longest queue of a replica; preemptions": f"{report.most_waiting}; {report.preemptions:,}",
        "choice of replica, CPU mean, p99": f"{choice.mean() * 1e6:.0f}, "
        f"{choice.quantile(0.99) * 1e6:.0f} us a request: "
        f"{rate / ingresses * choice.mean():.1%} of each ingress's core",
        "scheduler, CPU mean, p99": f"{scheduler * 1e6:.0f}, {worst * 1e6:.0f} us "
        f"a step of {step.mean() * 1e3:.1f} ms: {scheduler / step.mean():.1%} of a router's core",
        "an ingress sends to": f"{replicas * place.senders(replicas) / ingresses:,.0f} replicas",
        "frames read by an ingress": f"{frames:,.0f}/s of {items:.1f} streams: "
        f"{frames * asyncio.run(frame_cost(items)):.1%} of its core",
        "memory so far, a replica's share": f"{memory / 1024:.1f} GB, {memory / replicas:.1f} MB",
    }
    for name, value in rows.items():
        print(f"  {name:42} {value}", flush=True)


def more(began: float, seconds: float, requests: int) -> bool:
    now = time.monotonic() - began
    if requests % 50_000 == 0:
        print(f"{requests:,} requests after {now:.0f} s", file=sys.stderr, flush=True)
    return now < seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=45.0, help="requests a second and replica")
    parser.add_argument("--minutes", type=float, default=600.0, help="then no more requests come")
    parser.add_argument("--ingresses", type=int, default=8)
    parser.add_argument("--kv-tokens", type=int, default=65_536, help="of one replica's cache")
    parser.add_argument(
        "--policies", nargs="+", default=["prefix"], metavar="random|balanced|prefix"
    )
    arguments = parser.parse_args()
    workload = Workload(arguments.requests, arguments.rate * arguments.replicas)
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)
    for name in arguments.policies:
        policy: Policy = name
        print(f"\n{policy}: {arguments.replicas} replicas, {arguments.ingresses} ingresses")
        began = time.monotonic()
        report = simulate(
            workload,
            policy,
            replicas=arguments.replicas,
            ingresses=arguments.ingresses,
            kv_tokens=arguments.kv_tokens,
            more=partial(more, began, 60 * arguments.minutes),
        )
        table(report, arguments.replicas, arguments.ingresses, time.monotonic() - began)


if __name__ == "__main__":
    main()
