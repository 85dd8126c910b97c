"""How many plans models need, and what building them takes: python tests/benchmarks/bench_plans.py

Compiles every distinct segment of Llama 3.1's three sizes with TensorRT-RTX, ahead of time, in
bfloat16. Prints a Markdown table: plans against the layers and ranks they serve, processor and
wall-clock seconds of all builds, and the plans' size.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.published_configs import PUBLISHED

from tensorray.builder.graph import DTypes, SegmentCall, trace
from tensorray.builder.plan import build_plan, default_profiles
from tensorray.builder.tensorrt_flavour import load_flavour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="sm_89")
    target_name = parser.parse_args().target
    flavour = load_flavour("tensorrt_rtx")
    target = flavour.target(target_name)
    print(f"TensorRT-RTX {flavour.version}, {target_name}, bfloat16\n")
    print("| model | layers | TP | segments run a step, all ranks | plans | CPU s | s | MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B"):
        for ranks in (1, 8):
            model = PUBLISHED[name].model(ranks)
            program = trace(model)
            calls = sum(isinstance(call, SegmentCall) for call in program.calls)
            cpu, wall = time.process_time(), time.perf_counter()
            plans = [
                build_plan(
                    segment,
                    dtypes=DTypes(),
                    profiles=default_profiles(target),
                    target=target,
                    flavour=flavour,
                )
                for segment in program.segments()
            ]
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            size = sum(len(plan.data) for plan in plans) / 1e6
            print(
                f"| {name} | {model.num_layers} | {ranks} | {calls * ranks} | {len(plans)} "
                f"| {cpu:.1f} | {wall:.1f} | {size:.1f} |"
            )


if __name__ == "__main__":
    main()
