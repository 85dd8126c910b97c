"""Published sizes with random weights, through `LLM` in process, beside what vLLM does.

    python3 tests/gpu/bench_table.py [--models Llama-3.1-8B,Qwen3-0.6B] [--work alone,16,256,mixed]
        [--dtype bfloat16] [--json FILE] [-- EngineConfig's fields as NAME=VALUE ...]

Times include everything from token ids to text. Prefix caching is off, at most 256 sequences run
at once, and end-of-sequence tokens are ignored. vLLM's figures: 0.24.0 with PyTorch 2.11, bfloat16,
its offline API, the same requests, on the same kind of GPU (one H200).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

from helpers.dummy_models import make_dummy_model  # noqa: E402

from tensorray.cluster.llm import LLM, SamplingParams  # noqa: E402

# vLLM: start in s, ms a token, output tok/s of the other three.
VLLM = {
    "Llama-3.1-8B": {"start": 66.0, "alone": 4.94, "16": 3018.0, "256": 9940.0, "mixed": 10563.0},
    "Qwen3-0.6B": {"start": 71.0, "alone": 2.41, "16": 8719.0, "256": 29505.0, "mixed": 23238.0},
}


@dataclass(frozen=True)
class Requests:
    """Lengths in and out, one pair a request."""

    lengths: list[tuple[int, int]]
    tries: int = 1  # the best counts: what happens once is over then

    def run(self, llm: LLM, seed: int) -> float:
        """Seconds for all of them, once."""
        draw = random.Random(seed)
        prompts = [[draw.randrange(300, 30000) for _ in range(n)] for n, _ in self.lengths]
        params = [
            SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for _, n in self.lengths
        ]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - began
        assert [len(each.outputs[0].token_ids) for each in outputs] == [n for _, n in self.lengths]
        return seconds

    def best(self, llm: LLM) -> float:
        """Seconds for all of them, of as many tries as they have."""
        return min(self.run(llm, seed) for seed in range(self.tries))

    @property
    def output(self) -> int:
        return sum(n for _, n in self.lengths)


def _mixed() -> Requests:
    draw = random.Random(0)
    return Requests([(draw.randint(100, 1024), draw.randint(100, 1024)) for _ in range(512)])


WORK = {
    "alone": Requests([(128, 256)], tries=3),
    "16": Requests([(128, 256)] * 16, tries=3),
    "256": Requests([(512, 256)] * 256, tries=2),
    "mixed": _mixed(),
}


def engine_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """EngineConfig's fields: those of every measurement, and those that were asked for."""
    return {
        "load_format": "dummy",
        "dtype": arguments.dtype,
        "max_model_len": 4096,
        "max_num_seqs": 256,
        "enable_prefix_caching": False,
        **dict(each.split("=", 1) for each in arguments.settings),
    }


def print_table(found: dict[str, dict[str, float]]) -> None:
    """Figures by model and work, beside vLLM's."""
    print(f"\n{'model':14} {'work':6} {'here':>9} {'vLLM':>9} {'ratio':>6}  (above 1: faster)")
    for name, figures in found.items():
        for work, value in figures.items():
            theirs = VLLM[name][work]
            lower_is_better = work in ("start", "alone")
            ratio = theirs / value if lower_is_better else value / theirs
            print(f"{name:14} {work:6} {value:9.2f} {theirs:9.2f} {ratio:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join(VLLM))
    parser.add_argument("--work", default=",".join(WORK))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="NAME=VALUE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f %(message)s")
    settings = engine_settings(arguments)
    parent = Path(tempfile.mkdtemp())
    found: dict[str, dict[str, float]] = {}
    for name in arguments.models.split(","):
        model = make_dummy_model(name, parent)
        began = STARTED if not found else time.perf_counter()
        with LLM(str(model), **settings) as llm:
            Requests([(8, 2)]).run(llm, 0)
            figures = found[name] = {"start": time.perf_counter() - began}
            print(f"{name}: first answer after {figures['start']:.1f} s", flush=True)
            for work in arguments.work.split(","):
                requests = WORK[work]
                seconds = requests.best(llm)
                per_token = seconds / requests.output
                figures[work] = 1e3 * per_token if work == "alone" else 1 / per_token
                print(f"{name} {work}: {figures[work]:.2f}", flush=True)
    print_table(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
