"""Compile a model's engines from Python, for several layouts, and say what it took.

    python deploy/examples/build_plans.py MODEL sm_89,sm_120

Runs on the Ray cluster that RAY_ADDRESS names or this machine is in, else on this machine alone.
"""

from __future__ import annotations

import sys

from tensorray.cluster.build import build


def main(model: str, targets: str) -> int:
    failures = []
    for tp in (1, 2):
        report = build(model=model, tp=tp, target=targets, config_only=True)
        built = [outcome for outcome in report.outcomes if outcome.state == "compiled"]
        megabytes = sum(outcome.bytes for outcome in report.outcomes) / 1e6
        print(
            f"tp {tp}: {len(report.outcomes)} plans of {megabytes:.1f} MB in {report.store}, "
            f"{len(built)} of them compiled just now, in {report.seconds:.1f} s"
        )
        failures += report.failures
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} MODEL TARGETS")
    sys.exit(main(*sys.argv[1:]))
