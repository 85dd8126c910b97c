"""A replica on several GPUs beside one GPU, at published sizes with random weights, by `LLM`.

    python3 tests/gpu/bench_layouts.py [--model Llama-3.1-8B] [--layouts 1,tp2,pp2]
        [--work alone,256] [--dtype float16] [-- EngineConfig's fields as NAME=VALUE ...]

A layout is `tpN`, `ppN`, both joined by `x`, or 1. Requests are those of bench_table.py. Ratios are
to the first layout, in this run; above 1: faster.
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_table import WORK, Requests, engine_settings
from helpers.dummy_models import make_dummy_model

from tensorray.cluster.llm import LLM

_SIZES = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size"}


def sizes(layout: str) -> dict[str, int]:
    """What EngineConfig calls a layout."""
    if layout == "1":
        return {}
    parts = [re.fullmatch(r"(tp|pp)(\d+)", part) for part in layout.split("x")]
    if not all(parts):
        raise SystemExit(f"--layouts: {layout} is none of 1, tpN, ppN, tpNxppM")
    return {_SIZES[part[1]]: int(part[2]) for part in parts if part}


def measure(model: Path, works: list[str], settings: dict[str, Any]) -> dict[str, float]:
    """Milliseconds a token alone, tokens a second otherwise, and seconds to the first answer."""
    began = time.perf_counter()
    found: dict[str, float] = {}
    with LLM(str(model), **settings) as llm:
        Requests([(8, 2)]).run(llm, 0)
        found["start"] = time.perf_counter() - began
        for work in works:
            requests = WORK[work]
            rounds = 3 if work in ("alone", "16") else 1
            seconds = min(requests.run(llm, seed) for seed in range(rounds))
            per_token = seconds / requests.output
            found[work] = 1e3 * per_token if work == "alone" else 1 / per_token
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--layouts", default="1,tp2,pp2")
    parser.add_argument("--work", default="alone,256")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("settings", nargs="*", help="NAME=VALUE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)7.0f %(message)s")
    settings = engine_settings(arguments)
    model = make_dummy_model(arguments.model, Path(tempfile.mkdtemp()))
    works = arguments.work.split(",")
    first: dict[str, float] = {}
    print(f"{arguments.model:16} {'layout':8} {'work':6} {'figure':>10} {'ratio':>6}")
    for layout in arguments.layouts.split(","):
        found = measure(model, works, settings | sizes(layout))
        first = first or found
        for work, value in found.items():
            ratio = first[work] / value if work in ("start", "alone") else value / first[work]
            print(f"{'':16} {layout:8} {work:6} {value:10.2f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
