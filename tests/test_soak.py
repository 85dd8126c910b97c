"""A short cut of `make soak`: hundreds of streams through the whole service, on a null device.

Two cores that run tests as well don't bear a thousand streams in real time; how long things take
is not looked at here.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path

import psutil
import pytest

from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig
from tests.benchmarks.soak_streams import soak
from tests.helpers.null_engine import write_model

STREAMS, STEP_MS, TOKENS = 250, 200, 10


@pytest.mark.ray
def test_no_stream_is_lost(serve_port: int, tmp_path: Path) -> None:
    """Each of 250 streams, over and over, is answered in whole, with every token."""
    config = EngineConfig(
        model=str(write_model(tmp_path / "soak")),
        device="null",
        null_step_ms=STEP_MS,
        max_num_seqs=STREAMS,
        max_waiting=STREAMS,
    )
    load = Namespace(
        streams=STREAMS, seconds=6, warm_up=1, step_ms=STEP_MS, tokens=TOKENS, gemma=False, growth=1
    )
    app.run(config, port=serve_port, blocking=False)
    try:
        report, faults = asyncio.run(soak(serve_port, psutil.Process(), load))
    finally:
        app.stop(own_cluster=False)
    assert not faults
    assert report["lost"] == 0
    assert report["answers"] >= STREAMS
    assert report["tokens"] == TOKENS * report["answers"]
    assert set(report["mib_first_and_last"]) == {"ingress", "proxy", "router", "shard"}
