"""Where a decode step's time goes: microseconds by segment, kernel and gap, with floors beside.

    python3 tests/gpu/profile_steps.py [--models Qwen3-0.6B,Llama-3.1-8B] [--batches 1,64,256]
        [--context 256] [--dtype float16]

A step of `batch` sequences with `context` cached tokens each. Calls of a kind (a segment at all its
layers, say) are recorded as one graph by themselves, on the inputs they have in the step, and
replayed: their time on the device, launches of a graph's nodes included. The whole step's graph is
replayed likewise; what its parts do not come to is the gap, below zero where they overlap. Indented
are the calls that a segment by own kernels is made of. "idle" is how much longer a step of the
pipelined loop takes than its graph and the choice of tokens, each replayed alone.

A floor is the larger of bytes (weights, inputs, outputs and cached keys and values, once each) at
the measured copy rate, and multiply-adds at the measured rate of matrix products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import bench_steps

from tensorray.actors.fused_segment import FusedSegment
from tensorray.actors.fusion import Call as FusedCall
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.program import Call
from tensorray.builder.build import name_segments
from tensorray.builder.graph import ELEMENTWISE, SegmentCall, elementwise
from tensorray.kernels import batch_sampling

VIEWS = ("split", "heads", "merge_heads")  # ops that launch nothing
STEPS = 40  # of the pipelined loop
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


@dataclass
class Part:
    """Calls of a kind, and what they cannot do without."""

    calls: list[Callable[[], Any]] = field(default_factory=list)
    moved: float = 0.0  # bytes
    operations: float = 0.0
    kernels: dict[str, Part] = field(default_factory=dict)  # that a segment is made of

    def run(self) -> None:
        for call in self.calls:
            call()

    @property
    def floor(self) -> float:
        """Microseconds."""
        return 1e6 * max(self.moved / bench_steps.COPY_RATE, self.operations / MATRIX_RATE)


class Parts:
    """The calls of one decode step, with the inputs they had in it."""

    def __init__(self, shard: GpuShard, size: int, cached_tokens: int) -> None:
        forward = shard._forward
        runner = self._runner = forward._runner
        self.names = {each.segment: each.name for each in name_segments([shard._program])}
        self.parts: dict[str, Part] = {}
        bound = runner.bound

        def remember(call: Call, values: Any, rows: int) -> Callable[[], Any]:
            ready = bound(call, values, rows)
            self._add(call, values, rows, ready)
            return ready

        runner.bound = remember  # type: ignore[method-assign]
        try:
            forward._decode(size)
        finally:
            runner.bound = bound  # type: ignore[method-assign]
        for name, part in self.parts.items():
            if "attention" in name and part.calls and not part.kernels:
                pages = [kv.k_pages for kv in forward._ops.kv.values()]
                part.moved += sum(2.0 * cached_tokens * x[0].nbytes / x.shape[2] for x in pages)

    def _add(self, call: Call, values: Any, rows: int, ready: Callable[[], Any]) -> None:
        if not isinstance(call, SegmentCall):
            part = self.parts.setdefault(call.op, Part())
            read = [values[index] for index in call.arguments if isinstance(index, int)]
        else:
            part = self.parts.setdefault(self.names[call.segment], Part())
            weights = [self._runner._weight(ref) for ref in call.weights]
            read = [values[index] for index in call.inputs]
            run = self._runner._runner(call.segment, rows)
            if isinstance(run, FusedSegment):
                self._split(part, run, read, weights)
            part.operations += sum(_operations(weight, rows) for weight in weights)
            read += weights
        part.calls.append(ready)
        part.moved += sum(array.nbytes for array in read)

    def _split(self, part: Part, run: FusedSegment, inputs: list[Any], weights: list[Any]) -> None:
        """The segment's calls by themselves."""
        given = {id(weight) for weight in weights}
        values: dict[int | None, Any] = {None: None, **dict(enumerate([*inputs, *weights]))}
        for call in run._calls:
            arguments = [values[index] for index in call.arguments]
            work = partial(_made, run, call, arguments)
            values.update(zip(call.outputs, work(), strict=True))
            if call.op in VIEWS:
                continue
            arrays = [x for x in arguments if x is not None]
            wide = [x for x in arrays if id(x) in given and x.ndim == 2]
            label = " ".join([call.op, *(f"{x.shape[0]} x {x.shape[1]}" for x in wide)])
            kernel = part.kernels.setdefault(label, Part())
            kernel.calls.append(work)
            kernel.moved += sum(x.nbytes for x in arrays)
            kernel.operations += sum(_operations(x, len(inputs[0])) for x in wide)


def _made(run: FusedSegment, call: FusedCall, arguments: list[Any]) -> Sequence[Any]:
    """A call's outputs."""
    if call.op in ELEMENTWISE:
        return [elementwise(call.op, arguments, dict(call.attributes))]
    made = getattr(run._ops, call.op)(*arguments, **dict(call.attributes))
    return made if isinstance(made, list | tuple) else [made]


def _operations(weight: Any, rows: int) -> float:
    return 2.0 * rows * weight.size if weight.ndim == 2 else 0.0


def choice(shard: GpuShard, batch: int, logits: Any) -> Callable[[], None]:
    """Choosing a greedy token for each of the batch's sequences."""
    sampler = shard._sampler
    assert sampler is not None
    rows, out = shard._buffers.sample_rows[:batch], sampler._out[: 2 * batch].reshape(2, batch)
    return lambda: batch_sampling.greedy_rows(logits[:batch], rows, sampler._state, out)


Row = tuple[str, int, float, float]  # what, calls, microseconds, floor


def profile(shard: GpuShard, batch: int, context: int) -> tuple[list[Row], float]:
    """The table's rows, the whole step last, and the share of it in which the device idles."""
    forward = shard._forward
    size = forward._decode_sizes.fit(batch)
    assert size is not None, "no graph for this batch"
    step = 1e3 * bench_steps.decode(shard, batch, context, STEPS)[0]
    rows: list[Row] = []
    # The last decode's metadata is on the device still.
    with shard._device.current():
        parts = Parts(shard, size, batch * (context + STEPS)).parts
        for name, part in parts.items():
            rows.append((name, len(part.calls), replayed(shard, part.run), part.floor))
            for label, kernel in part.kernels.items():
                taken = replayed(shard, kernel.run)
                rows.append((f"  {label}", len(kernel.calls), taken, kernel.floor))
        metadata = replayed(shard, lambda: forward._buffers.unpack(size, size))
        rows.append(("step metadata", 1, metadata, 0.0))
        whole = bench_steps.replay(shard, batch) * 1e3
        sampling = replayed(shard, choice(shard, batch, forward._decodes[size]()))
    own = [row for row in rows if not row[0].startswith(" ")]
    floor = sum(row[3] for row in own)
    rows.append(("gaps and overlap", 0, whole - sum(row[2] for row in own), 0.0))
    rows.append(("graph", 1, whole, floor))
    rows.append(("choice of tokens", 1, sampling, 0.0))
    idle = step - whole - sampling
    rows.append(("idle", 0, idle, 0.0))
    rows.append(("step", 1, step, floor))
    return rows, idle / step


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
            rows, idle = profile(shard, batch, arguments.context)
            print(f"\n{name}, {batch} sequences of {arguments.context} tokens, {arguments.dtype}")
            print(f"{'':58} {'calls':>5} {'us':>8} {'floor':>8} {'of it':>5}")
            for what, calls, took, floor in rows:
                share = f"{floor / took:5.0%}" if floor else ""
                print(f"{what[:58]:58} {calls or '':>5} {took:8.1f} {floor:8.1f} {share}")
            print(
                f"the device idles for {idle:.1%} of a step (goal at 64 sequences: 3%)", flush=True
            )
        shard.close()
        del shard


if __name__ == "__main__":
    main()
