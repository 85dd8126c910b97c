"""What a grammar adds to a decode step of 16 sequences, on the demo model and a CPU.

    python tests/benchmarks/bench_guided.py

Plain and guided batches take turns on one shard; a step's time is the median over all of a kind's.
Both draw at the same temperature. The guided ones write a JSON array of objects with free strings,
which asks more of the matcher than most schemas do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from importlib import import_module

from tensorray.actors.protocol import Sampling
from tensorray.actors.shard import Shard
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.demo import MODEL_PACKAGE
from tensorray.cluster.request import GenerationRequest
from tensorray.cluster.sequence import Sequence
from tensorray.cluster.structured_outputs import StructuredOutputs
from tensorray.cluster.vocabulary import load_vocabulary

BATCH = 16
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    path = str(import_module(MODEL_PACKAGE).assemble())
    config = EngineConfig(model=path, device="cpu", max_model_len=512, max_num_seqs=BATCH)
    began = time.perf_counter()
    vocabulary = load_vocabulary(config)
    print(f"vocabulary of {len(vocabulary.tokens)} tokens: {time.perf_counter() - began:.1f} s")
    shard = Shard.load(replace(config.shard(), vocabulary=lambda: vocabulary))
    grammar = StructuredOutputs(json=SCHEMA).compiled()
    began = time.perf_counter()
    decode_seconds(config, shard, grammar, 2)  # makes the trie
    print(f"first guided batch: {time.perf_counter() - began:.1f} s")
    plain: list[float] = []
    guided: list[float] = []
    for _ in range(options.rounds):
        plain += decode_seconds(config, shard, "", options.tokens)
        guided += decode_seconds(config, shard, grammar, options.tokens)
    without, with_it = statistics.median(plain), statistics.median(guided)
    print(f"{'batch':>6} {'plain ms':>9} {'guided ms':>10} {'ratio':>6}")
    print(f"{BATCH:6} {without * 1e3:9.2f} {with_it * 1e3:10.2f} {with_it / without:6.3f}")


def decode_seconds(config: EngineConfig, shard: Shard, grammar: str, tokens: int) -> list[float]:
    """How long each decode step of a whole batch took."""
    scheduler = config.scheduler(shard.info)
    for seq in range(BATCH):
        sampling = Sampling(temperature=0.8, top_k=50, seed=seq, grammar=grammar)
        request = GenerationRequest(str(seq), [2, 100 + seq, 200], sampling, tokens)
        scheduler.add(Sequence(seq, request, sampling))
    seconds = []
    while scheduler.unfinished and (plan := scheduler.schedule()):
        began = time.perf_counter()
        result = shard.execute(plan)
        if not plan.starts and len(plan.seqs) == BATCH:
            seconds.append(time.perf_counter() - began)
        scheduler.update(result)
    shard.reset()
    return seconds


if __name__ == "__main__":
    main()
