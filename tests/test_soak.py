"""A short cut of `make soak`: hundreds of streams through the whole service, on a null device.

Two cores that run tests as well don't bear a thousand streams in real time; how long things take
is not looked at here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "soak_streams.py"


@pytest.mark.ray
def test_no_stream_is_lost() -> None:
    """Each of 250 streams, over and over, is answered in whole, with every token."""
    options = ["--streams=250", "--seconds=10", "--warm-up=1", "--step-ms=200", "--tokens=10"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--growth=1"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    report = json.loads(done.stdout)
    assert report["lost"] == 0
    assert report["answers"] >= 250
    assert report["tokens"] == 10 * report["answers"]
    assert set(report["mib_first_and_last"]) == {"ingress", "proxy", "router", "shard"}
