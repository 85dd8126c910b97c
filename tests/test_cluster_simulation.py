"""Many replicas under a virtual clock: the real scheduler and choice of replicas, modelled steps.

A small cut of tests/benchmarks/simulate_cluster.py. Nothing here depends on the machine's speed.
"""

from __future__ import annotations

from functools import cache

import pytest
from helpers.cluster_simulation import (
    EIGHT_H200_70B,
    H200_8B,
    Policy,
    Report,
    Workload,
    simulate,
)

REPLICAS, REQUESTS = 8, 800


@cache
def ran(policy: Policy) -> Report:
    workload = Workload(REQUESTS, rate=40.0 * REPLICAS, groups=100)
    return simulate(workload, policy, replicas=REPLICAS, ingresses=2, kv_tokens=32_768)


@pytest.mark.parametrize("policy", ["random", "balanced", "prefix"])
def test_every_request_ends_and_every_replica_works(policy: Policy) -> None:
    report = ran(policy)
    assert (report.finished, report.refused) == (REQUESTS, 0)
    assert report.output_tokens > 50 * REQUESTS
    assert report.imbalance < 1.3
    assert report.most_waiting < 50
    assert report.first_token.quantile(0.5) < report.first_token.quantile(0.99) < 10.0


def test_prefixes_are_found_more_often_than_at_random_and_first_tokens_come_sooner() -> None:
    at_random, prefix = ran("random"), ran("prefix")
    assert prefix.hit_rate > 1.25 * at_random.hit_rate
    assert prefix.first_token.quantile(0.5) < 0.95 * at_random.first_token.quantile(0.5)
    assert prefix.first_token.quantile(0.99) < at_random.first_token.quantile(0.99)


def test_a_run_is_the_same_each_time() -> None:
    workload = Workload(200, rate=120.0, groups=20)
    first, second = (simulate(workload, "prefix", replicas=3) for _ in range(2))
    assert first.first_token == second.first_token
    assert first.virtual_seconds == second.virtual_seconds


def test_step_times_are_the_measured_ones() -> None:
    """Alone, 16 at once, and 256 with 512 tokens in: an 8B model on one H200."""
    assert H200_8B.seconds(1, 256) == pytest.approx(4.94e-3, rel=0.05)
    assert H200_8B.seconds(16, 16 * 256) == pytest.approx(16 / 3018, rel=0.05)
    assert H200_8B.seconds(256 + 512, 256 * 640) == pytest.approx(256 / 9940, rel=0.05)
    assert EIGHT_H200_70B.seconds(1, 256) > 4.1e-3
