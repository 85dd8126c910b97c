"""Sampling: microseconds a step on a GPU, replayed from a CUDA graph, and the host's time.

    python tests/gpu/bench_sampling.py [--vocab 128256] [--dtype float16] [--rows 1 16 64 256]

Each step takes logits from one of several buffers, together larger than the L2 cache. The floor is
one read of the logits at the rate of a large copy (bytes read and written), measured here. PyTorch,
where `python3` has it, does argmax, and softmax, sort, running sum and multinomial for top-p.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from tensorray.actors.device import find_device
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.protocol import Sampling, SequenceStart
from tensorray.kernels import batch_sampling as kernels

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
L2_BYTES = 60e6

# "model": exponential, a few tokens with most of the weight; "flat": normal, tens of thousands.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("greedy", "model", {"temperature": 0.0}),
    ("temperature", "model", {}),
    ("top-k 50", "model", {"top_k": 50}),
    ("top-k 50, top-p 0.9", "model", {"top_k": 50, "top_p": 0.9}),
    ("top-k 50, top-p 0.9", "flat", {"top_k": 50, "top_p": 0.9}),
    ("top-k 1000", "flat", {"top_k": 1000}),
    ("top-p 0.9", "model", {"top_p": 0.9}),
    ("top-p 0.9", "flat", {"top_p": 0.9}),
    ("top-p 0.99", "flat", {"top_p": 0.99}),
    ("top-p 0.9", "equal", {"top_p": 0.9}),
    ("min-p 0.05", "model", {"min_p": 0.05}),
    ("penalties, top-p 0.9", "model", {"top_p": 0.9, "frequency_penalty": 0.5}),
    ("penalties, greedy", "model", {"temperature": 0.0, "repetition_penalty": 1.1}),
    ("5 logprobs, greedy", "model", {"temperature": 0.0, "logprobs": 5}),
]


def microseconds(calls: list[Callable[[], Any]], repeats: int = 11) -> float:
    """The median time of a call, each repeat being all of them in one graph."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        calls[0]()
        stream.synchronize()
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
        graph.launch()
        times = []
        for _ in range(repeats):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            graph.launch()
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes read and written a microsecond by a large copy."""
    source, target = cupy.ones(1 << 28, np.float32), cupy.empty(1 << 28, np.float32)

    def copy() -> None:
        target.data.copy_from_device_async(source.data, source.nbytes)

    return 2 * source.nbytes / microseconds([copy, copy])


def logits_of(spread: str, rows: int, vocab: int, dtype: str) -> Any:
    if spread == "equal":
        made = cupy.ones((rows, vocab), np.float32)
    elif spread == "model":
        made = 1.5 * cupy.random.standard_exponential((rows, vocab), np.float32)
    else:
        made = 2 * cupy.random.standard_normal((rows, vocab), np.float32)
    return made.astype(DTYPES[dtype])


def sampler_of(device: Any, rows: int, vocab: int, asked: dict[str, Any]) -> DeviceSampler:
    sampler, rng = DeviceSampler(device, vocab, rows), np.random.default_rng(0)
    for seq in range(rows):
        tokens = rng.integers(0, vocab, 500).tolist()
        sampling = Sampling(seed=seq, **asked)
        sampler.start(SequenceStart(seq, tokens, 200, 0, [], sampling), seq)
    return sampler


def in_turn(buffers: list[Any], step: Callable[[Any], Any]) -> list[Callable[[], Any]]:
    def bound(logits: Any) -> Callable[[], Any]:
        return lambda: step(logits)

    return [bound(logits) for logits in buffers]


def steps(
    sampler: DeviceSampler, buffers: list[Any], asked: dict[str, Any]
) -> list[Callable[[], Any]]:
    """The kernels that `enqueue` queues, without its copies to the host."""
    rows = len(buffers[0])
    index, out = cupy.arange(rows, dtype=np.int32), cupy.empty((2, rows), np.int32)
    top = asked.get("logprobs", 0)
    scores = cupy.empty((rows, kernels.SCORE_HEADER + 2 * top), np.int32)

    def step(logits: Any) -> None:
        if asked == {"temperature": 0.0}:
            kernels.greedy_rows(logits, index, sampler._state, out)
        else:
            kernels.sample_rows(logits, index, sampler._state, out)
        if "logprobs" in asked:
            kernels.score_rows(logits, index, out[0], scores)

    return in_turn(buffers, step)


def host_microseconds(
    sampler: DeviceSampler, logits: Any, count: int = 200
) -> tuple[float, float, float]:
    """What the host needs to queue a step, to collect it, and for both and the GPU between."""
    rows = len(logits)
    seqs, index = list(range(rows)), cupy.arange(rows, dtype=np.int32)
    queueing, collecting, whole = [], [], []
    for _ in range(count):
        began = time.perf_counter()
        sampled = sampler.enqueue(seqs, index, logits)
        queued = time.perf_counter()
        assert sampled.mark is not None
        sampled.mark.wait()
        ready = time.perf_counter()
        sampler.collect(sampled)
        done = time.perf_counter()
        queueing.append(queued - began)
        collecting.append(done - ready)
        whole.append(done - began)
    queued, collected, both = (
        1e6 * statistics.median(times) for times in (queueing, collecting, whole)
    )
    return queued, collected, both


def torch_microseconds(spread: str, rows: int, vocab: int, dtype: str) -> tuple[float, float]:
    """PyTorch's argmax, and its usual top-p."""
    import torch

    kind = getattr(torch, dtype)
    count = min(max(2, int(1.5 * L2_BYTES / (rows * vocab * 4))), 64)
    buffers = [2 * torch.randn(rows, vocab, device="cuda").to(kind) for _ in range(count)]

    def top_p(logits: Any) -> Any:
        shares, order = torch.softmax(logits.float(), -1).sort(-1, descending=True)
        shares[shares.cumsum(-1) - shares >= 0.9] = 0
        return order.gather(-1, torch.multinomial(shares, 1))

    def timed(step: Callable[[Any], Any]) -> float:
        for _ in range(3):
            step(buffers[0])
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for logits in buffers:
            step(logits)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / count

    return timed(lambda logits: logits.argmax(-1)), timed(top_p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--only", nargs="+", default=[""], help="text of the cases to run")
    parser.add_argument("--host", action="store_true", help="time the host as well")
    parser.add_argument("--torch", action="store_true", help="time PyTorch as well")
    arguments = parser.parse_args()
    vocab, dtype = arguments.vocab, arguments.dtype
    device = find_device()
    assert device is not None, "no GPU"
    with device.current():
        rate = copy_rate()
        print(f"copy {rate / 1e6:.2f} TB/s; vocabulary {vocab}, {dtype}; microseconds a step")
        print(f"{'rows':32}" + "".join(f"{rows:>9}" for rows in arguments.rows))
        floors = [rows * vocab * np.dtype(DTYPES[dtype]).itemsize / rate for rows in arguments.rows]
        print(f"{'floor':32}" + "".join(f"{floor:9.1f}" for floor in floors))
        for name, spread, asked in CASES:
            if not any(text in f"{name}, {spread}" for text in arguments.only):
                continue
            cells = []
            for rows in arguments.rows:
                size = rows * vocab * np.dtype(DTYPES[dtype]).itemsize
                count = min(max(2, int(1.5 * L2_BYTES / size)), 64)
                buffers = [logits_of(spread, rows, vocab, dtype) for _ in range(count)]
                sampler = sampler_of(device, rows, vocab, asked)
                sampler.collect(
                    sampler.enqueue(range(rows), cupy.arange(rows, dtype=np.int32), buffers[0])
                )
                cells.append(microseconds(steps(sampler, buffers, asked)))
            print(
                f"{name + ', ' + spread:32}" + "".join(f"{cell:9.1f}" for cell in cells), flush=True
            )
        for asked in ({"temperature": 0.0}, {"top_p": 0.9}, {"logprobs": 5}) * arguments.host:
            for rows in (1, 256):
                sampler = sampler_of(device, rows, vocab, asked)
                host = host_microseconds(sampler, logits_of("model", rows, vocab, dtype))
                print(
                    f"host, {rows} rows, {asked}: queue, collect, all: "
                    + ", ".join(f"{each:.0f}" for each in host),
                    flush=True,
                )
        if arguments.torch:
            for rows in arguments.rows:
                argmax, top_p = torch_microseconds("flat", rows, vocab, dtype)
                print(f"PyTorch, {rows} rows: argmax {argmax:.1f}, top-p {top_p:.1f}")


if __name__ == "__main__":
    main()
