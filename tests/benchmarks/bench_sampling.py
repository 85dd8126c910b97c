"""What sampling costs a step on this machine: python tests/benchmarks/bench_sampling.py

Best of several, whole `Sampler.sample` calls, in milliseconds. Logits are random, in two shapes: as
a language model's (a few hundred tokens far above the rest) and flat (a normal distribution of
width 3, as random weights give), which is the worst case of top-p without top-k.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.protocol import Sampling, SequenceStart
from tensorray.actors.sampler import Sampler

CASES = {
    "greedy": Sampling(temperature=0.0),
    "greedy, 5 logprobs": Sampling(temperature=0.0, logprobs=5),
    "greedy, penalties": Sampling(temperature=0.0, repetition_penalty=1.1),
    "temperature": Sampling(temperature=0.7),
    "min-p 0.05": Sampling(min_p=0.05),
    "top-k 64": Sampling(top_k=64),
    "top-k 64, top-p 0.95": Sampling(top_k=64, top_p=0.95),
    "top-p 0.95": Sampling(top_p=0.95),
}


def make_logits(rows: int, vocab: int, flat: bool) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
    if not flat:
        for row in logits:
            row[rng.integers(0, vocab, 300)] += np.linspace(5, 18, 300, dtype=np.float32)
    return logits


def best_ms(sampling: Sampling, logits: NDArray[np.float32], repeats: int) -> float:
    rows, vocab = logits.shape
    sampler = Sampler(vocab)
    for seq in range(rows):
        sampler.start(SequenceStart(seq, list(range(500)), 500, 0, [], sampling))
    seqs = list(range(rows))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        sampler.sample(seqs, logits)
        best = min(best, time.perf_counter() - began)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    heads = [f"{kind} {rows:>3}" for kind in ("model", "flat") for rows in options.rows]
    print(f"vocabulary {options.vocab}, ms a step, best of {options.repeats}; columns: rows")
    print(" " * 24 + "".join(f"{head:>12}" for head in heads))
    batches = [
        make_logits(rows, options.vocab, flat) for flat in (False, True) for rows in options.rows
    ]
    for name, sampling in CASES.items():
        times = [best_ms(sampling, logits, options.repeats) for logits in batches]
        print(f"{name:<24}" + "".join(f"{ms:>12.3f}" for ms in times))

    seqs, vocab = 256, 64
    ms = best_ms(CASES["greedy"], make_logits(seqs, vocab, flat=True), 200)
    print(f"\n{seqs} greedy sequences, vocabulary {vocab} (the books alone): {ms:.3f} ms")


if __name__ == "__main__":
    main()
