"""Fuzzing of one target by coverage, with libFuzzer (atheris), until the time is over.

    python -m tests.fuzz.long TARGET [libFuzzer's options, as -max_total_time=60]

Ends with an error at the first finding, which libFuzzer writes as crash-…, timeout-… or oom-… to
where its -artifact_prefix= says. What is found goes into tests/fuzz/corpus/TARGET once it is
mended.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["tensorray"]):
    from tests.fuzz.mutate import mutated
    from tests.fuzz.targets import TARGETS, inputs

MAX_BYTES = 1 << 16


def main() -> None:
    name, *options = sys.argv[1:]
    target = TARGETS[name]()
    known = inputs(name, target)

    def change(data: bytes, max_size: int, seed: int) -> bytes:
        """Half of the time as the short run does it, which knows of JSON, else as libFuzzer."""
        random = Random(seed)
        if random.random() < 0.5:
            return mutated(data, known, random)[:max_size]
        return bytes(atheris.Mutate(data, max_size))

    with TemporaryDirectory() as corpus:
        for number, data in enumerate(known):
            (Path(corpus) / str(number)).write_bytes(data)
        defaults = ["-timeout=60", "-rss_limit_mb=4096", f"-max_len={MAX_BYTES}"]
        atheris.Setup(
            [sys.argv[0], *defaults, "-print_final_stats=1", *options, corpus],
            target.run,
            custom_mutator=change,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
