"""Speculative decoding on Gemma 3 270M, on a CPU: its tokens a second over those of plain decoding.

    python tests/benchmarks/bench_speculative.py [--threads 2] [--rounds 5] [--tokens 96]
        [--config '{"method": "ngram"}'] [--streams 1]

Both engines are loaded once and asked in turn, so that a busy machine is busy for both; ratios are
of one round's two figures, and their median is reported. Both write the same tokens, which is
checked.

"copying" prompts have an answer that mostly repeats what they hold: code with a name changed, a
list put in another form, a text with corrections; they are continued greedily. "random" ones are
random tokens, continued by draws at temperature 1.5, which nobody can guess. The goals are ratios
of 1.5 and 0.95.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from statistics import median
from typing import Any

from tensorray.cluster.bench import timed
from tensorray.cluster.demo import model_path
from tensorray.cluster.llm import LLM, SamplingParams

GOALS = {"copying": 1.5, "random": 0.95}
RANDOM_LEN = 64

_CODE = '''\
def total_price(items, tax):
    """The price of all items, with tax."""
    price = 0
    for item in items:
        if item.count < 0:
            raise ValueError("an item's count must not be negative")
        price = price + item.price * item.count
    return price + price * tax


def print_receipt(items, tax):
    """Print a line for each of the items, and the total."""
    for item in items:
        print(item.name, item.count, item.price * item.count)
    print("total", total_price(items, tax))
'''

_MINUTES = """\
The meeting began at nine. Anna Berger reported that the new warehouse in Linz will open in March,
two weeks later than planned, because the sprinkler system has to be inspected again. Tom Okafor
said that the second delivery van is still being repaired and that the workshop expects to return
it on Friday. The team agreed to rent a van until then. Anna Berger will ask the landlord for a
lower rent for the first month. The next meeting will take place on Tuesday at nine in the small
conference room.
"""

_LIST = """\
- Copper kettle, 2 litres, 39.90
- Cast iron pan, 28 cm, 54.50
- Bread knife, serrated, 24.00
- Chopping board, walnut, 61.20
- Mixing bowl, steel, 3 litres, 18.75
- Measuring jug, glass, 1 litre, 9.95
- Rolling pin, beech, 45 cm, 14.30
- Colander, enamel, 22 cm, 27.60
"""

_CONFIG = """\
[server]
listen_address = "127.0.0.1"
listen_port = 8080
request_timeout_seconds = 30
max_connections = 256

[storage]
data_directory = "/var/lib/records"
snapshot_interval_seconds = 600
keep_snapshots = 12
"""


def _begun(title: str, text: str, second: str, edited: str, copied: int) -> str:
    """A text, then its edited version as far as its first `copied` characters."""
    return f"{title}\n\n{text}\n{second}\n\n{edited[:copied]}"


def copying_prompts() -> list[str]:
    """Prompts whose likely continuation repeats most of what they hold."""
    return [
        _begun(
            "Before:", _CODE, "After renaming `items` to `goods`:", _CODE.replace("items", "goods"),
            190,
        ),
        _begun(
            "Draft of the minutes:", _MINUTES, "Final minutes, with the time corrected to ten:",
            _MINUTES.replace("nine", "ten"), 120,
        ),
        _begun("Stock:", _LIST, "The same list, numbered:", _numbered(_LIST), 74),
        _begun(
            "Old settings:", _CONFIG, "New settings, with the port changed to 9090:",
            _CONFIG.replace("8080", "9090"), 60,
        ),
    ]  # fmt: skip


def _numbered(text: str) -> str:
    lines = text.replace("- ", "", 8).splitlines()
    return "\n".join(f"{n}. {line.removeprefix('- ')}" for n, line in enumerate(lines, 1))


def random_prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randint(1000, 9999) for _ in range(RANDOM_LEN)] for _ in range(count)]


def run(
    llm: LLM, prompts: list[Any], params: SamplingParams, streams: int
) -> tuple[float, list[list[int]], int, int]:
    """Tokens a second over all prompts, `streams` at a time; the tokens; drafts and right ones."""
    seconds, tokens = 0.0, []
    drafted = accepted = 0
    for first in range(0, len(prompts), streams):
        took, outputs = timed(llm, prompts[first : first + streams], params)
        seconds += took
        tokens += [output.outputs[0].token_ids for output in outputs]
        for output in outputs:
            right = output.usage.accepted_prediction_tokens
            accepted += right
            drafted += right + output.usage.rejected_prediction_tokens
    return sum(map(len, tokens)) / seconds, tokens, drafted, accepted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="that each prompt is continued by")
    parser.add_argument("--streams", type=int, default=1, help="prompts at once")
    parser.add_argument("--config", default='{"method": "ngram"}', help="--speculative-config")
    options = parser.parse_args()
    settings: dict[str, Any] = {
        "device": "cpu",
        "num_threads": options.threads,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,  # each round has the same prompts
    }
    greedy = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    drawn = SamplingParams(temperature=1.5, seed=0, max_tokens=options.tokens, ignore_eos=True)
    copying = copying_prompts()
    kinds: dict[str, tuple[list[Any], SamplingParams]] = {
        "copying": (copying, greedy),
        "random": (random_prompts(len(copying)), drawn),
    }
    results: dict[str, Any] = {"threads": options.threads, "streams": options.streams}
    how = json.loads(options.config)
    with (
        LLM(str(model_path()), **settings) as plain,
        LLM(str(model_path()), **settings, speculative_config=how) as speculative,
    ):
        for kind, (prompts, params) in kinds.items():
            rates: dict[LLM, list[float]] = {plain: [], speculative: []}
            written: dict[LLM, list[list[int]]] = {}
            drafted = accepted = 0
            for round_ in range(options.rounds + 1):
                # Whoever goes second may find the machine in another state: take turns.
                for llm in list(rates)[:: 1 if round_ % 2 else -1]:
                    asked = prompts if round_ else prompts[:1]  # the first is for warming up
                    rate, written[llm], *drafts = run(llm, asked, params, options.streams)
                    if round_:
                        rates[llm].append(rate)
                    if llm is speculative:
                        drafted, accepted = drafts
                print(f"{kind}, round {round_}", file=sys.stderr)
            pairs = zip(rates[speculative], rates[plain], strict=True)
            results[kind] = {
                "plain_tokens_per_second": round(median(rates[plain]), 2),
                "speculative_tokens_per_second": round(median(rates[speculative]), 2),
                "ratio": round(median(ours / theirs for ours, theirs in pairs), 2),
                "goal": GOALS[kind],
                "drafted": drafted,
                "accepted": accepted,
                "tokens": sum(map(len, written[plain])),
                "same_tokens": written[plain] == written[speculative],
            }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
