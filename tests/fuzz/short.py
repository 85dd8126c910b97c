"""A short fuzzing run that is the same every time: seeds, what was found once, and changes of them.

python -m tests.fuzz.short [TARGET ...] [--changes 1000] [--seed 0] [--keep DIRECTORY]
"""

from __future__ import annotations

import argparse
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, Target, inputs

HANGS_AFTER = 60  # seconds for one input, which take milliseconds


class Hang(BaseException):
    """One input took too long; no `except Exception` takes it for an error of its own."""


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Raises Hang in the main thread after that many seconds."""

    def over(_: int, frame: FrameType | None) -> None:
        raise Hang("".join(traceback.format_stack(frame)[-6:]))

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, target: Target, changes: int, seed: int) -> tuple[int, list[tuple[bytes, str]]]:
    """How many inputs ran, and those that found something, with what."""
    known = inputs(name, target)
    random = Random(f"{name} {seed}")
    queue = [*known, *(mutated(random.choice(known), known, random) for _ in range(changes))]
    told = ((data, fault(target, data)) for data in queue)
    return len(queue), [(data, why) for data, why in told if why]


def fault(target: Target, data: bytes) -> str:
    """What an input finds: empty for nothing."""
    try:
        with no_longer_than(HANGS_AFTER):
            target.run(data)
    except (Exception, Hang) as error:
        return _told(error)
    return ""


def _told(error: BaseException) -> str:
    """What it is, and where it began, which is the last line."""
    cause = error.__cause__ or error
    said = f"{type(cause).__name__}: {str(cause)[:300]} ({str(error)[:200]})"
    frames = traceback.extract_tb(cause.__traceback__)[-4:]
    places = [f"  {frame.filename}:{frame.lineno} {frame.line}" for frame in frames]
    return "\n".join([said, *places])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--changes", type=int, default=1000, help="changed inputs a target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="write what finds something here")
    args = parser.parse_args()
    failures = 0
    for name in args.targets or TARGETS:
        began = time.perf_counter()
        count, found = run(name, TARGETS[name](), args.changes, args.seed)
        seconds = time.perf_counter() - began
        print(f"{name}: {count} inputs in {seconds:.1f} s, {len(found)} findings", flush=True)
        kinds = {why.splitlines()[-1]: (data, why) for data, why in found}
        for number, (data, why) in enumerate(kinds.values()):
            print(f"  {data[:300]!r}\n{why}")
            if args.keep:
                place = args.keep / name
                place.mkdir(parents=True, exist_ok=True)
                (place / f"seed{args.seed}-{number}").write_bytes(data)
        failures += len(found)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
