"""Where a decode step's time goes: microseconds by segment, kernel and gap, with floors beside.

    python3 tests/gpu/profile_steps.py [--models Qwen3-0.6B,Llama-3.1-8B] [--batches 1,64,256]
        [--context 256] [--dtype float16]

A step of `batch` sequences with `context` cached tokens each. Calls of a kind (a segment at all its
layers, say) are recorded as one graph by themselves, on the inputs they have in the step, and
replayed: their time on the device, launches of a graph's nodes included. The whole step's graph is
replayed likewise; what its parts do not come to is the gap. "between steps" is how much longer a
step of the pipelined loop takes than its graph and the sampling kernels: the device's idle time.

A floor is the larger of bytes (weights, inputs, outputs and cached keys and values, once each) at
the measured copy rate, and multiply-adds at the measured rate of matrix products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import bench_steps

from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.program import Call
from tensorray.builder.build import name_segments
from tensorray.builder.graph import SegmentCall

MATRIX_RATE = 790e12  # floating-point operations a second, float16 and bfloat16, on an H200


def replayed(shard: GpuShard, work: Callable[[], Any], times: int = 20) -> float:
    """Microseconds of work, recorded and replayed back to back."""
    device = shard._device
    graph = device.record(work)
    graph()
    device.mark().wait()
    began = time.perf_counter()
    for _ in range(times):
        graph()
    device.mark().wait()
    return (time.perf_counter() - began) / times * 1e6


class Parts:
    """The calls of one decode step, with the inputs they had in it."""

    def __init__(self, shard: GpuShard, size: int) -> None:
        forward = shard._forward
        runner = self._runner = forward._runner
        self._kv = forward._ops.kv
        names = {each.segment: each.name for each in name_segments([shard._program])}
        self.calls: dict[str, list[Callable[[], Any]]] = {}
        self.bytes: dict[str, float] = {}
        self.operations: dict[str, float] = {}
        bound = runner.bound

        def remember(call: Call, values: Any, rows: int) -> Callable[[], Any]:
            ready = bound(call, values, rows)
            name = names[call.segment] if isinstance(call, SegmentCall) else call.op
            self.calls.setdefault(name, []).append(ready)
            self._count(name, call, values, rows)
            return ready

        runner.bound = remember  # type: ignore[method-assign]
        try:
            forward._decode(size)
        finally:
            runner.bound = bound  # type: ignore[method-assign]

    def _count(self, name: str, call: Call, values: Any, rows: int) -> None:
        moved = operations = 0.0
        if isinstance(call, SegmentCall):
            weights = [self._runner._weight(ref) for ref in call.weights]
            moved += sum(w.nbytes for w in weights)
            operations += sum(2.0 * rows * w.size for w in weights if w.ndim == 2)
        moved += sum(
            values[i].nbytes
            for i in (call.inputs if isinstance(call, SegmentCall) else call.arguments)
            if isinstance(i, int)
        )
        self.bytes[name] = self.bytes.get(name, 0.0) + moved
        self.operations[name] = self.operations.get(name, 0.0) + operations

    def add_cache(self, tokens: int) -> None:
        """What attention reads of the cache, for so many tokens in all."""
        for name in self.calls:
            if "attention" in name:
                for _, kv in zip(self.calls[name], self._kv, strict=True):
                    pages = kv.k_pages
                    self.bytes[name] += 2.0 * tokens * pages[0].nbytes / pages.shape[2]

    def floor(self, name: str) -> float:
        return 1e6 * max(
            self.bytes[name] / bench_steps.COPY_RATE, self.operations[name] / MATRIX_RATE
        )


def profile(shard: GpuShard, batch: int, context: int) -> list[tuple[str, int, float, float]]:
    """(what, calls, microseconds, floor), the whole last."""
    forward = shard._forward
    size = forward._decode_sizes.fit(batch)
    assert size is not None, "no graph for this batch"
    step, _ = bench_steps.decode(shard, batch, context, steps=40)
    rows = []
    # The last decode's metadata is on the device still.
    with shard._device.current():
        parts = Parts(shard, size)
        parts.add_cache(batch * (context + 40))
        for name, calls in parts.calls.items():

            def run(calls: Any = calls) -> None:
                for call in calls:
                    call()

            rows.append((name, len(calls), replayed(shard, run), parts.floor(name)))
        metadata = replayed(shard, lambda: forward._buffers.unpack(size, size))
        rows.append(("step metadata", 1, metadata, 0.0))
        whole = bench_steps.replay(shard, batch) * 1e3
    rows.append(("gaps and overlap", 0, whole - sum(row[2] for row in rows), 0.0))
    floor = sum(row[3] for row in rows)
    rows.append(("graph", 1, whole, floor))
    rows.append(("sampling and between steps", 1, 1e3 * step - whole, 0.0))
    rows.append(("step", 1, 1e3 * step, floor))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="Qwen3-0.6B,Llama-3.1-8B")
    parser.add_argument("--batches", default="1,64,256")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--backend", default="kernels")
    parser.add_argument("--context", type=int, default=256)
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    arguments.eager, arguments.graphs = False, batches
    for name in arguments.models.split(","):
        shard = bench_steps.load(name, arguments)
        for batch in batches:
            rows = profile(shard, batch, arguments.context)
            print(f"\n{name}, {batch} sequences of {arguments.context} tokens, {arguments.dtype}")
            print(f"{'':58} {'calls':>5} {'us':>8} {'floor':>8} {'of it':>5}")
            for what, calls, took, floor in rows:
                share = f"{floor / took:5.0%}" if floor else ""
                print(f"{what[:58]:58} {calls or '':>5} {took:8.1f} {floor:8.1f} {share}")
        shard.close()
        del shard


if __name__ == "__main__":
    main()
