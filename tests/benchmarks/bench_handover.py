"""What it takes to hand a prompt's KV blocks to another replica, against computing it there.

    python tests/benchmarks/bench_handover.py --layers 4 --prompts 64 256 1024
    python3 tests/benchmarks/bench_handover.py --device cuda --model Llama-3.1-8B --prompts 1024

Two shards of one process, random weights of a published shape, over loopback. "handed" is from the
request's arrival at the replica that decodes to its first token there, "computed" the same where
the prompt is computed instead; both are medians. Microseconds a block and GB/s are of the fetch:
out of one cache, over TCP, into the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.dummy_models import make_dummy_model
from helpers.handover import Pair, pair

from tensorray.actors.protocol import Sampling
from tensorray.cluster.request import GenerationRequest, Resumed, Source


async def first_token(client: Any, asked: GenerationRequest) -> tuple[float, Source | None]:
    """Seconds until the first token, and who holds the prompt then. Cancels the rest."""
    began = time.perf_counter()
    stream = client.generate(asked)
    (delta,) = await stream.__anext__()
    seconds = time.perf_counter() - began
    if delta.source is None:
        await stream.aclose()
    return seconds, delta.source


async def measure(both: Pair, length: int, rounds: int) -> dict[str, float]:
    draw = random.Random(length)
    handed, computed = [], []
    stats = both.decode.handovers.stats
    for number in range(rounds + 1):
        if number == 1:  # the first one warmed up
            handed, computed = [], []
            blocks, nbytes, seconds = stats.blocks, stats.bytes, stats.seconds
        prompt = [draw.randrange(300, 1000) for _ in range(length)]
        asked = GenerationRequest("a", prompt, Sampling(temperature=0.0), 8)
        computed.append((await first_token(both.decode, asked))[0])
        first = GenerationRequest("b", prompt, asked.sampling, 8, hand_over=True)
        _, source = await first_token(both.prefill, first)
        begun = [Resumed(0, [5])]
        rest = GenerationRequest("c", prompt, asked.sampling, 8, source=source, resumed=begun)
        handed.append((await first_token(both.decode, rest))[0])
        await both.prefill.cancel("b")
    assert stats.failed == 0
    blocks, nbytes = stats.blocks - blocks, stats.bytes - nbytes
    seconds = stats.seconds - seconds
    return {
        "tokens": length,
        "handed_ms": 1e3 * median(handed),
        "computed_ms": 1e3 * median(computed),
        "fetch_ms": 1e3 * seconds / rounds,
        "us_a_block": 1e6 * seconds / blocks,
        "gb_a_second": nbytes / seconds / 1e9,
        "block_kib": nbytes / blocks / 1024,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen3-0.6B")
    parser.add_argument("--layers", type=int, help="so many only, and a small vocabulary")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    longest = max(options.prompts) + 16
    with tempfile.TemporaryDirectory() as folder:
        path = make_dummy_model(options.model, Path(folder))
        settings: dict[str, Any] = {
            "load_format": "dummy",
            "device": options.device,
            "dtype": "float16" if options.device == "cuda" else "auto",
            "block_size": 16,
            "max_model_len": longest,
            "num_kv_blocks": 4 * (longest // 16 + 1),
            "max_num_batched_tokens": 2048 if options.device == "cuda" else 512,
            "enable_prefix_caching": False,
        }
        if options.layers:
            settings["hf_overrides"] = {
                "num_hidden_layers": options.layers,
                "vocab_size": 4096,
            }
        async with pair(path, **settings) as both:
            print(f"{options.model} on {both.decode.info.device}, over loopback")
            found = []
            for length in options.prompts:
                row = await measure(both, length, options.rounds)
                found.append(row)
                print(
                    f"{length:6d} tokens: handed {row['handed_ms']:8.2f} ms, computed "
                    f"{row['computed_ms']:8.2f} ms; fetch {row['fetch_ms']:8.2f} ms, "
                    f"{row['us_a_block']:7.1f} us a block of {row['block_kib']:.0f} KiB, "
                    f"{row['gb_a_second']:5.2f} GB/s",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
