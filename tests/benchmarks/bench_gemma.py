"""Gemma 3 270M against Hugging Face transformers: same weights, same prompts, same threads.

    python tests/benchmarks/bench_gemma.py --reference-python /path/to/python

The reference interpreter needs torch and transformers (tests/reference/bench_transformers.py);
without one, only the project's own figures are printed. Both sides load once, in processes of
their own, and are then asked in turn, so that a busy machine is busy for both; figures are medians
over the rounds, and the best round, which other work disturbs least. Everything is greedy and in
float32; transformers runs static batches of equal lengths, which is the best case for it.

Memory is the peak resident size of a shard actor that ran the 16 streams, with a KV cache as large
as they need, over the bytes of its weights and cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tensorray.cluster.demo import model_path

REFERENCE = Path(__file__).parent.parent / "reference" / "bench_transformers.py"
INPUT_LEN = 64
# Name -> streams, new tokens each, the least ratio to transformers that counts as reached.
SCENARIOS = {"1 stream": (1, 64, 1.3), "16 streams": (16, 48, 1.0)}
MEMORY_GOAL = 1.3
KV_BYTES_PER_TOKEN = 2 * 18 * 256 * 4  # keys and values, 18 layers, one head of 256, float32


class Side:
    """A process that completes prompts on request: one JSON line each way."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._read()  # it is ready

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Output tokens a second, and the tokens."""
        assert self._process.stdin is not None
        task = {"prompts": prompts, "new_tokens": new_tokens}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return sum(map(len, answer["token_ids"])) / answer["seconds"], answer["token_ids"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def worker(threads: int) -> None:
    """This project's side of the protocol."""
    from tensorray.cluster.bench import timed
    from tensorray.cluster.llm import LLM, SamplingParams

    with LLM(str(model_path()), num_threads=threads, max_model_len=2048) as llm:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            task = json.loads(line)
            params = SamplingParams(temperature=0, max_tokens=task["new_tokens"], ignore_eos=True)
            seconds, outputs = timed(llm, task["prompts"], params)
            token_ids = [output.outputs[0].token_ids for output in outputs]
            print(json.dumps({"seconds": seconds, "token_ids": token_ids}), flush=True)


def compare(ours: Side, reference: Side | None, rounds: int) -> dict[str, dict[str, float]]:
    draw = random.Random(0)
    results = {}
    for name, (streams, new_tokens, goal) in SCENARIOS.items():
        rates: dict[Side, list[float]] = {side: [] for side in (ours, reference) if side}
        agreeing = []
        for round_ in range(rounds + 1):
            prompts = [[draw.randint(1000, 9999) for _ in range(INPUT_LEN)] for _ in range(streams)]
            tokens = {}
            # Whoever goes second may find the machine in another state: take turns.
            for side in list(rates)[:: 1 if round_ % 2 else -1]:
                rate, tokens[side] = side.run(prompts, new_tokens if round_ else 8)
                if round_:  # the first is for warming up
                    rates[side].append(rate)
                print(f"{name}, round {round_}: {rate:.1f} tok/s", file=sys.stderr)
            if reference is not None:
                agreeing += map(_same, tokens[ours], tokens[reference])
        results[name] = _figures("tokens_per_second", rates[ours])
        if reference is not None:
            results[name] |= {
                **_figures("transformers", rates[reference]),
                "ratio": round(median(rates[ours]) / median(rates[reference]), 2),
                "ratio_of_best": round(max(rates[ours]) / max(rates[reference]), 2),
                "goal": goal,
                "same_tokens": round(sum(agreeing) / len(agreeing), 3),
            }
    return results


def _figures(name: str, rates: list[float]) -> dict[str, float]:
    return {name: round(median(rates), 2), f"{name}_best": round(max(rates), 2)}


def _same(ours: list[int], theirs: list[int]) -> float:
    """The share of tokens before the first that differs (a near-tie, on random prompts)."""
    pairs = zip(ours, theirs, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours)) / len(ours)


async def shard_memory(threads: int) -> dict[str, float]:
    """Peak resident memory of a shard actor over its weights and KV cache."""
    from tensorray.actors.protocol import Sampling
    from tensorray.actors.replica import Replica, Where
    from tensorray.cluster.config import EngineConfig
    from tensorray.cluster.engine import Engine
    from tensorray.cluster.request import GenerationRequest

    streams, new_tokens, _ = SCENARIOS["16 streams"]
    length = INPUT_LEN + new_tokens
    config = EngineConfig(
        model=str(model_path()),
        num_threads=threads,
        max_model_len=length,
        max_num_seqs=streams,
        # A quarter more than the tokens weigh, for blocks that are partly filled.
        kv_cache_memory_bytes=streams * length * KV_BYTES_PER_TOKEN * 5 // 4,
        enable_prefix_caching=False,
    )
    shard = await Replica.open("bench", [config.shard()], Where())
    link = await shard.connect()
    engine = Engine(link, config.scheduler(link.info))
    await engine.start()
    draw = random.Random(0)

    async def one(index: int) -> None:
        prompt = [draw.randint(1000, 9999) for _ in range(INPUT_LEN)]
        request = GenerationRequest(str(index), prompt, Sampling(temperature=0), new_tokens)
        async for _ in engine.generate(request):
            pass

    await asyncio.gather(*map(one, range(streams)))
    (described,) = await shard.describe()
    info = link.info
    await engine.close()
    await shard.close()
    owned = info.weight_bytes + info.kv_cache_bytes
    return {
        "weights_mib": info.weight_bytes >> 20,
        "kv_cache_mib": info.kv_cache_bytes >> 20,
        "peak_mib": described["peak_rss_bytes"] >> 20,
        "ratio": round(described["peak_rss_bytes"] / owned, 3),
        "goal": MEMORY_GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference-python", default=os.environ.get("REFERENCE_PYTHON"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = str(options.threads)
    if options.worker:
        worker(options.threads)
        return
    sides = [Side([sys.executable, __file__, "--worker", "--threads", threads], options.threads)]
    if options.reference_python:
        command = [options.reference_python, str(REFERENCE), str(model_path()), threads]
        sides.append(Side(command, options.threads))
    results: dict[str, Any] = {"threads": options.threads, "rounds": options.rounds}
    results |= compare(sides[0], sides[1] if len(sides) > 1 else None, options.rounds)
    for side in sides:
        side.close()
    results["shard memory"] = asyncio.run(shard_memory(options.threads))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
