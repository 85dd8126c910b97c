"""Guessed tokens at published sizes, random weights: what a step with drafts costs, and can bring.

    python3 tests/gpu/bench_speculative.py [--models Llama-3.1-8B,Qwen3-0.6B] [--batches 1,4,16]
        [--drafts 4,8] [--context 256] [--steps 40] [--dtype float16] [--draft-model Qwen3-0.6B]

Random weights do not copy their prompts, so steps are measured by drafters that know what comes:
one always wrong, one always right. Columns, in milliseconds: a plain step, two in flight; a plain
step that waits for the result before; a step with wrong drafts, and with right ones; how many
tokens the latter brings a sequence; and how many times as fast as plain tokens its tokens come.
Then, through `LLM`, prompt lookup by the costs that the shard measures (without it:
tests/gpu/bench_table.py): what random weights write greedily may repeat itself, which is looked up
as a copy is.

With `--draft-model`, of the same vocabulary as `--models`, that one guesses. What random weights
guess is wrong, but for a model that is its own draft; so the columns are a plain step, a step with
drafts, how many of these were right, and what tokens would cost, in plain steps, if each draft were
right with a chance of 0.5 to 0.9.

What was expected, and found: kernels/cuda/NOTES.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from helpers.dummy_models import make_dummy_model
from helpers.oracle import Oracle
from helpers.published_configs import PUBLISHED

from tensorray.actors.config import ShardConfig
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan, StepResult
from tensorray.actors.speculative_config import parse_speculative_config
from tensorray.cluster.llm import LLM, SamplingParams

NGRAM = {"method": "ngram", "num_speculative_tokens": 8}


def config_of(name: str) -> Path:
    """A directory with the config alone."""
    directory = Path(tempfile.mkdtemp()) / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(PUBLISHED[name].config))
    return directory


class Bench:
    """One shard, whose sequences run by plans made here."""

    def __init__(
        self, name: str, dtype: str, context: int, steps: int, how: dict[str, Any] = NGRAM
    ) -> None:
        self.context, self.steps, self.step = context, steps, 0
        self.shard = GpuShard.load(
            ShardConfig(
                str(config_of(name)),
                load_format="dummy",
                device="cuda",
                dtype=dtype,
                max_model_len=4096,
                segment_backend="kernels",
                cudagraph_capture_sizes=(1, 4, 8, 16, 32, 64, 80, 256, 2048),
                speculative_config=parse_speculative_config(how),
            )
        )

    def prompts(self, batch: int) -> list[list[int]]:
        rng = np.random.default_rng(batch)
        prompts: list[list[int]] = rng.integers(10, 1000, (batch, self.context)).tolist()
        return prompts

    def begin(self, batch: int) -> list[list[int]]:
        """Run prompts: the tokens that came next."""
        self.shard.reset()
        width = -(-(self.context + 10 * self.steps) // self.shard.info.kv.block_size)
        first: list[list[int]] = []
        for seq, prompt in enumerate(self.prompts(batch)):
            blocks = [[1 + seq * width + i for i in range(width)]] * len(self.shard.info.kv.windows)
            start = SequenceStart(seq, prompt, len(prompt), 0, blocks, Sampling(temperature=0.0))
            result = self.run([StepPlan(self.next(), [seq], [len(prompt)], starts=[start])])[0]
            first.append(result.tokens)
        return first

    def next(self) -> int:
        self.step += 1
        return self.step

    def run(self, plans: Sequence[StepPlan], depth: int = 1) -> list[StepResult]:
        pending: deque[Any] = deque()
        results = []
        for plan in plans:
            pending.append(self.shard.submit(plan))
            if len(pending) == depth:
                results.append(pending.popleft()())
        return results + [each() for each in pending]

    def timed(self, batch: int, drafts: int, depth: int) -> tuple[float, list[list[int]]]:
        """Milliseconds a step, and each sequence's tokens."""
        texts = self.begin(batch)
        seqs, counts = list(range(batch)), [1 + drafts] * batch
        plans = [StepPlan(self.next(), seqs, counts) for _ in range(self.steps)]
        warm, rest = plans[:5], plans[5:]
        results = self.run(warm, depth)
        began = time.perf_counter()
        results += self.run(rest, depth)
        seconds = time.perf_counter() - began
        for result in results:
            for seq, token in zip(result.seqs, result.tokens, strict=True):
                texts[seq].append(token)
        return 1e3 * seconds / len(rest), texts

    def measure(self, batch: int, lengths: Sequence[int]) -> list[list[float]]:
        """The columns, for each of these numbers of drafts."""
        guessing = self.shard._drafts
        assert guessing is not None
        plain, _ = self.timed(batch, 0, 2)
        waits, _ = self.timed(batch, 0, 1)
        steps, self.steps = self.steps, self.steps * (1 + max(lengths))  # what is to be guessed
        _, texts = self.timed(batch, 0, 2)
        self.steps = steps
        prompts = self.prompts(batch)
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        columns = []
        for drafts in lengths:
            guessing._drafter = Oracle(whole, lambda seq, place: True)
            wrong, _ = self.timed(batch, drafts, 1)
            guessing._drafter = Oracle(whole)
            right, found = self.timed(batch, drafts, 1)
            gained = sum(len(each) - 1 for each in found) / batch / self.steps
            same = sum(own == text[: len(own)] for text, own in zip(texts, found, strict=True))
            print(f"{same} of {batch} sequences are those of plain decoding")
            columns.append([plain, waits, wrong, right, gained, gained * plain / right])
        return columns


CHANCES = (0.5, 0.6, 0.7, 0.8, 0.9)


def by_draft_model(arguments: argparse.Namespace) -> None:
    """The table of a draft model's steps, for each model."""
    small, lengths = arguments.draft_model, [int(each) for each in arguments.drafts.split(",")]
    gains = " ".join(f"{f'if {chance}':>7}" for chance in CHANCES)
    for name in arguments.models.split(","):
        how = {"model": str(config_of(small)), "num_speculative_tokens": max(lengths)}
        bench = Bench(name, arguments.dtype, arguments.context, arguments.steps, how)
        print(f"{name} by {small}: {bench.shard.info.drafting}")
        print(
            f"{'model':14} {'batch':>5} {'drafts':>6} {'plain':>7} {'step':>7} {'right':>7} {gains}"
        )
        for batch in map(int, arguments.batches.split(",")):
            plain, _ = bench.timed(batch, 0, 2)
            for drafts in lengths:
                step, texts = bench.timed(batch, drafts, 1)
                right = sum(len(text) - 1 for text in texts) / batch / bench.steps - 1
                brought = [(1 - p ** (drafts + 1)) / (1 - p) * plain / step for p in CHANCES]
                figures = " ".join(f"{each:7.3f}" for each in (plain, step, right, *brought))
                print(f"{name:14} {batch:5} {drafts:6} {figures}", flush=True)
        bench.shard.close()
        del bench
        through_llm(name, arguments.dtype, how)


def through_llm(name: str, dtype: str, how: dict[str, Any] = NGRAM) -> None:
    """Milliseconds a token alone, tokens a second of 16: the work of tests/gpu/bench_table.py."""
    model = make_dummy_model(name, Path(tempfile.mkdtemp()))
    settings: dict[str, Any] = {
        **{"load_format": "dummy", "dtype": dtype, "max_model_len": 4096, "max_num_seqs": 256},
        **{"enable_prefix_caching": False, "speculative_config": how},
    }
    with LLM(str(model), **settings) as llm:
        for count in (1, 16):
            draw = random.Random(count)
            prompts = [[draw.randrange(300, 30000) for _ in range(128)] for _ in range(count)]
            params = SamplingParams(temperature=0.0, max_tokens=256, ignore_eos=True)
            best = float("inf")
            for _ in range(2):
                began = time.perf_counter()
                outputs = llm.generate(prompts, params)
                best = min(best, time.perf_counter() - began)
            right = sum(each.usage.accepted_prediction_tokens for each in outputs)
            wrong = sum(each.usage.rejected_prediction_tokens for each in outputs)
            print(
                f"LLM {name} {count}: "
                f"{1e3 * best / 256:.3f} ms a token and sequence, {count * 256 / best:.0f} tok/s, "
                f"{right} guesses right, {wrong} wrong",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="Llama-3.1-8B,Qwen3-0.6B")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--drafts", default="4,8")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--draft-model")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f %(message)s")
    if arguments.draft_model:
        by_draft_model(arguments)
        return
    lengths = [int(each) for each in arguments.drafts.split(",")]
    rows = []
    for name in arguments.models.split(","):
        bench = Bench(name, arguments.dtype, arguments.context, arguments.steps)
        print(f"{name}: {bench.shard.info.drafting}")
        for batch in map(int, arguments.batches.split(",")):
            for drafts, columns in zip(lengths, bench.measure(batch, lengths), strict=True):
                rows.append((name, batch, drafts, *columns))
                print(rows[-1], flush=True)
        bench.shard.close()
        del bench
        through_llm(name, arguments.dtype)
    print(
        f"{'model':14} {'batch':>5} {'drafts':>6} {'plain':>7} {'waits':>7} {'wrong':>7} "
        f"{'right':>7} {'tokens':>7} {'gain':>6}"
    )
    for name, batch, drafts, *figures in rows:
        print(f"{name:14} {batch:5} {drafts:6} " + " ".join(f"{each:7.3f}" for each in figures))


if __name__ == "__main__":
    main()
