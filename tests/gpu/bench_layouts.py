"""A replica on several GPUs beside one GPU, at published sizes with random weights, by `LLM`.

    python3 tests/gpu/bench_layouts.py [--model Llama-3.1-8B] [--layouts 1,tp2,pp2]
        [--work alone,256] [--dtype float16] [--expect tp2:alone=1.5,…] [--limit 60]
        [-- EngineConfig's fields as NAME=VALUE ...]

A layout is `tpN`, `ppN`, both joined by `x`, or 1; with `nccl` after it, as in tp2nccl, NCCL makes
all its sums. Requests are those of bench_table.py, and `short`, which is 256 requests of 128 tokens
with 128 more. Ratios are to the first layout, in this run; above 1: faster. A figure is printed as
it comes; work that fails is told of and passed over. What takes longer than --limit seconds has
every process say where its threads are, and ends everything.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from bench_table import WORK, Requests, engine_settings
from helpers.dummy_models import make_dummy_model

from tensorray.cluster.llm import LLM

_SIZES = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"}
_WORK = WORK | {"short": Requests([(128, 128)] * 256)}
_LOWER_IS_BETTER = ("start", "alone")


def settings_of(layout: str) -> dict[str, Any]:
    """What EngineConfig calls a layout."""
    sizes, nccl = layout.removesuffix("nccl"), layout.endswith("nccl")
    found: dict[str, Any] = {"disable_custom_all_reduce": True} if nccl else {}
    if sizes == "1":
        return found
    parts = [re.fullmatch(r"(tp|pp)(\d+)", part) for part in sizes.split("x")]
    if not all(parts):
        raise SystemExit(f"--layouts: {layout} is none of 1, tpN, ppN, tpNxppM, or these with nccl")
    return found | {_SIZES[part[1]]: int(part[2]) for part in parts if part}


class Watch:
    """Ends this process and the shards' when something takes too long, and says where they were."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: threading.Timer | None = None

    def next(self) -> None:
        """Something new begins."""
        self.end()
        self._timer = threading.Timer(self._seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        print(f"nothing for {self._seconds:g} s", flush=True)
        shards = psutil.Process().children()
        for how in (signal.SIGUSR1, signal.SIGKILL):
            for shard in shards:
                with suppress(psutil.NoSuchProcess):
                    shard.send_signal(how)
            faulthandler.dump_traceback()
            time.sleep(2)  # in which they write
        os._exit(3)


def measure(
    model: Path,
    works: list[str],
    settings: dict[str, Any],
    *,
    watch: Watch,
    tell: Callable[[str, float], None],
) -> None:
    """Tells milliseconds a token alone, tokens a second otherwise, and seconds to an answer."""
    watch.next()
    began = time.perf_counter()
    with LLM(str(model), **settings) as llm:
        Requests([(8, 2)]).run(llm, 0)
        tell("start", time.perf_counter() - began)
        for work in works:
            watch.next()
            requests = _WORK[work]
            try:
                seconds = requests.best(llm)
            except Exception as error:
                print(f"{work} FAILED: {type(error).__name__}: {error}", flush=True)
                continue
            per_token = seconds / requests.output
            tell(work, 1e3 * per_token if work == "alone" else 1 / per_token)
        watch.next()
    watch.end()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--layouts", default="1,tp2,pp2")
    parser.add_argument("--work", default="alone,256")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--expect", default="", help="LAYOUT:WORK=RATIO or =FIGURE, to be shown")
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("settings", nargs="*", help="NAME=VALUE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f %(message)s")
    settings = engine_settings(arguments)
    model = make_dummy_model(arguments.model, Path(tempfile.mkdtemp()))
    expected = dict(each.split("=") for each in arguments.expect.split(",") if each)
    watch = Watch(arguments.limit)
    first: dict[str, float] = {}
    print(f"{arguments.model:16} {'layout':8} {'work':6} {'figure':>10} {'ratio':>6} expected")
    for layout in arguments.layouts.split(","):

        def tell(work: str, value: float, layout: str = layout) -> None:
            base = first.setdefault(work, value)
            ratio = base / value if work in _LOWER_IS_BETTER else value / base
            wanted = expected.get(f"{layout}:{work}", "")
            print(f"{'':16} {layout:8} {work:6} {value:10.2f} {ratio:6.2f} {wanted}", flush=True)

        try:
            measure(
                model,
                arguments.work.split(","),
                settings | settings_of(layout),
                watch=watch,
                tell=tell,
            )
        except Exception as error:
            watch.end()
            print(f"{layout} FAILED: {type(error).__name__}: {error}", flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
