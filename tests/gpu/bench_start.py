"""Seconds from a process's start to its first answer, by what they go to, weights on local disk.

    python3 tests/gpu/bench_start.py [--model Llama-3.1-8B] [--dtype float16] [--folder DIR]
        [--cold]

Writes a checkpoint of the published shapes, random values, to a new folder in DIR (default: where
temporary files go) and removes it in the end. Then starts a fresh process twice, which makes an
`LLM` and answers one request: first with an empty cache of compiled kernels, then with what that
one left. The files come from the page cache, as they were just written, unless `--cold`: then they
are flushed and the system is asked to let go of them.

Goal: 20 s for the second start of Llama 3.1 8B.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

STARTED = "BENCH_START_AT"  # time.time() just before the process began
SHARD_BYTES = 4 << 30
BLOCK_VALUES = (16 << 20) + 12345  # random values, of which all tensors are made
GOAL_SECONDS = 20.0


def write_checkpoint(directory: Path, dtype: str) -> int:
    """The tensors that the config in a directory declares; returns their bytes."""
    import numpy as np

    from tensorray.builder.checkpoint.safetensors import INDEX, dtype_name
    from tensorray.builder.load import _groups, _parts
    from tensorray.builder.model import Layout
    from tensorray.builder.precision import numpy_dtype
    from tensorray.builder.registry import resolve

    config = json.loads((directory / "config.json").read_text())
    model = resolve(config)(config, Layout())
    shapes = {part.name: part.shape for part in _parts(_groups(model, None))}
    kind = numpy_dtype(dtype)
    rng = np.random.default_rng(0)
    # Around zero, as models are initialised; norms with such weights are small and finite.
    block = (rng.random(BLOCK_VALUES, np.float32) * 0.07 - 0.035).astype(kind).tobytes()
    files: list[dict[str, Any]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * kind.itemsize
        if filled and filled + size > SHARD_BYTES:
            files.append({})
            filled = 0
        span = [filled, filled + size]
        files[-1][name] = {"dtype": dtype_name(kind), "shape": list(shape), "data_offsets": span}
        filled += size
    names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    total = 0
    with ThreadPoolExecutor(16) as pool:
        tasks = []
        for name, tensors in zip(names, files, strict=True):
            header = json.dumps(tensors).encode()
            header += b" " * (-len(header) % 8)
            end = max(each["data_offsets"][1] for each in tensors.values())
            total += end
            file = os.open(directory / name, os.O_CREAT | os.O_WRONLY)
            os.pwrite(file, len(header).to_bytes(8, "little") + header, 0)
            first = 8 + len(header)
            for at in range(0, end, len(block)):
                piece = memoryview(block)[: min(len(block), end - at)]
                tasks.append(pool.submit(os.pwrite, file, piece, first + at))
        for task in tasks:
            task.result()
    weight_map = {t: name for name, tensors in zip(names, files, strict=True) for t in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return total


def forget_files(directory: Path) -> None:
    """Have the system drop the files' pages from its cache."""
    for path in directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


class Clock:
    """Seconds by what they went to; what is timed inside something else counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # of each timed thing under way, what those inside it took

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[what] = self.seconds.get(what, 0.0) + took - self._inner.pop()
            self._inner[-1] += took

    def watch(self, owner: Any, name: str, what: str) -> None:
        """Have calls of a function or method timed, those of the thread that loads the model."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.timing(what):
                return function(*arguments, **options)

        setattr(owner, name, timed)


def answer(directory: Path, dtype: str, since: float) -> None:
    """What the fresh process does; prints where its time went, as JSON."""
    from tensorray.actors import device, forward, gpu_shard, segment_runners
    from tensorray.cluster.llm import LLM, SamplingParams
    from tensorray.kernels.cuda import compiler

    imported = time.time() - since
    clock = Clock()
    clock.watch(device, "find_device", "CuPy, and the CUDA context")
    clock.watch(gpu_shard, "load_weights", "weights")
    clock.watch(compiler, "compile", "kernels: compiled, or read from the cache")
    clock.watch(compiler, "_load", "kernels: loaded")
    clock.watch(segment_runners.SegmentRunners, "prepare", "segments")
    clock.watch(forward.Forward, "warm_up", "largest step")
    clock.watch(gpu_shard, "KVCache", "KV cache")
    clock.watch(gpu_shard, "DeviceSampler", "sampler")
    clock.watch(forward.Forward, "record", "graphs")
    with clock.timing("the rest of loading"):
        llm = LLM(str(directory), dtype=dtype, max_model_len=4096, max_num_seqs=256)
    with clock.timing("first answer"):
        llm.generate([[1, 2, 3, 4, 5, 6, 7, 8]], SamplingParams(max_tokens=1, temperature=0.0))
    total = time.time() - since
    print(json.dumps({"interpreter, imports": imported, **clock.seconds, "total": total}))
    llm.close()


def start(arguments: argparse.Namespace, directory: Path, cache: Path) -> dict[str, float]:
    """A fresh process's `answer`."""
    command = [sys.executable, __file__, "--dtype", arguments.dtype, "--answer", str(directory)]
    variables = {**os.environ, "TENSORRAY_CACHE_DIR": str(cache), STARTED: repr(time.time())}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer(arguments.answer, arguments.dtype, float(os.environ[STARTED]))
        return
    from helpers.dummy_models import make_dummy_model

    prepare: Callable[[Path], None] = forget_files if arguments.cold else lambda directory: None
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        began = time.perf_counter()
        directory = make_dummy_model(arguments.model, Path(folder))
        size = write_checkpoint(directory, arguments.dtype)
        took = time.perf_counter() - began
        print(f"{arguments.model}: {size / 1e9:.2f} GB written in {took:.1f} s", flush=True)
        print("files asked out of the page cache" if arguments.cold else "page cache warm")
        found: list[dict[str, float]] = []
        for kernels in ("compiled now", "from the cache"):
            prepare(directory)
            seconds = start(arguments, directory, Path(folder) / "cache")
            found.append(seconds)
            print(f"kernels {kernels}: {seconds['total']:.1f} s", flush=True)
    first, second = found
    print(f"\n{'seconds':42} {'first start':>12} {'second':>8}")
    for what in first:
        note = f"  {size / 1e9 / second[what]:.1f} GB/s" if what == "weights" else ""
        print(f"{what:42} {first[what]:12.2f} {second.get(what, 0.0):8.2f}{note}")
    share = second["total"] / GOAL_SECONDS
    print(f"goal for Llama 3.1 8B: {GOAL_SECONDS:.0f} s; the second start takes {share:.0%} of it")


if __name__ == "__main__":
    main()
