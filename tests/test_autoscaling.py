"""Replicas come when tokens queue up, and go when they don't."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from tensorray.cluster import app, autoscaling
from tensorray.cluster.config import EngineConfig
from tests.helpers.null_engine import write_model


def config(**fields: Any) -> EngineConfig:
    return EngineConfig(model="m", **fields)


def wanted(shares: dict[str, float], target: int = 3) -> float:
    context: Any = SimpleNamespace(
        aggregated_metrics={autoscaling.METRIC: shares} if shares else {},
        target_num_replicas=target,
    )
    return autoscaling.replicas_wanted(context)[0]


def test_as_many_replicas_as_there_is_work_for() -> None:
    assert wanted({"a": 2.5, "b": 0.5, "c": 0.0}) == 3.0
    assert wanted({"a": 0.0}) == 0.0
    assert wanted({}) == 3  # nothing is known: no change


def test_what_a_replica_should_have() -> None:
    assert autoscaling.target_tokens(config(max_num_seqs=8)) == 6 * 128
    given = {"max_replicas": 2, "target_queued_tokens": 5000}
    assert autoscaling.target_tokens(config(autoscaling_config=given)) == 5000


def test_serve_gets_its_own_settings() -> None:
    assert autoscaling.serve_settings(config()) is None
    given = {"min_replicas": 2, "max_replicas": 5, "target_queued_tokens": 9}
    settings = autoscaling.serve_settings(config(autoscaling_config=given))
    assert settings is not None
    assert (settings.min_replicas, settings.max_replicas) == (2, 5)
    assert settings.policy.get_policy().__name__ == "replicas_wanted"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"autoscaling_config": {"max_replicas": 2}, "data_parallel_size": 2},
            "instead of data_parallel_size",
        ),
        ({"autoscaling_config": {"min_replicas": 0}}, "min_replicas must be at least 1"),
        ({"autoscaling_config": {"target_queued_tokens": 0}}, "must be a positive number"),
    ],
)
def test_settings_that_contradict_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_settings_that_serve_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown key 'max_replica'"):
        autoscaling.serve_settings(config(autoscaling_config={"max_replica": 3}))


# --- on Serve ------------------------------------------------------------------------------------


@pytest.fixture
def handle(tmp_path: Path, serve_port: int) -> Iterator[Any]:
    from ray import serve

    settings = EngineConfig(
        model=str(write_model(tmp_path / "tiny")),
        device="null",
        null_step_ms=20,
        max_num_seqs=8,
        drain_timeout_seconds=1,
        autoscaling_config={
            "max_replicas": 2,
            "target_queued_tokens": 1000,
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 2,
        },
    )
    app.run(settings, port=serve_port, blocking=False)
    yield serve.get_app_handle(app.APP_NAME)
    app.stop(own_cluster=False)


def replicas() -> int:
    from ray import serve

    router = serve.status().applications[app.APP_NAME].deployments["Router"]
    return router.replica_states.get("RUNNING", 0)


def until(condition: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.25)


@pytest.mark.ray
def test_a_replica_comes_with_the_queue_and_goes_with_it(handle: Any) -> None:
    assert replicas() == 1
    stop = False

    def ask(number: int) -> int:
        done = 0
        while not stop:
            answer = handle.generate.remote([5, 6, number], max_tokens=100, ignore_eos=True)
            done += len(answer.result()["outputs"][0]["token_ids"])
        return done

    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, number) for number in range(16)]
        try:
            until(lambda: replicas() == 2)
        finally:
            stop = True
        assert all(each.result() % 100 == 0 for each in asked)
    until(lambda: replicas() == 1)
    assert len(handle.generate.remote([5], max_tokens=3).result()["outputs"][0]["token_ids"]) == 3
