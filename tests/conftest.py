"""Fixtures many tests share."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The same examples every time, so that a change fails on its own merits; `make soak` tries others.
# A busy machine is no failure: how long examples take to draw or to run is not looked at.
settings.register_profile(
    "tensorray",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=not os.environ.get("TENSORRAY_SOAK_EXAMPLES"),
)
settings.load_profile("tensorray")


@pytest.fixture(autouse=True)
def logs_as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test does to the process's logging, which `caplog` stands on, ends with it."""
    plugin: Any = request.config.pluginmanager.get_plugin("logging-plugin")
    handlers = (plugin.caplog_handler, plugin.report_handler)
    formatters = [handler.formatter for handler in handlers]
    loggers = [logging.getLogger(name) for name in ("tensorray", "ray.serve")]
    states = [(log.level, log.propagate, list(log.handlers)) for log in loggers]
    yield
    for handler, formatter in zip(handlers, formatters, strict=True):
        handler.setFormatter(formatter)
    for log, (level, propagate, attached) in zip(loggers, states, strict=True):
        log.setLevel(level)
        log.propagate = propagate
        log.handlers[:] = attached


@pytest.fixture(scope="session")
def load_once() -> Callable[..., Any]:
    """`load_tokenizer`, which keeps what it has loaded."""
    from tensorray.cluster import frontend

    return functools.cache(frontend.load_tokenizer)


@pytest.fixture(scope="module")
def one_tokenizer(load_once: Callable[..., Any]) -> Iterator[None]:
    """Gemma's vocabulary is long: to load its tokenizer takes seconds, so it is done once.

    Modules that do not ask for this load theirs: what they load may have changed on disk.
    """
    from tensorray.cluster import frontend

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontend, "load_tokenizer", load_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def a_place_for_ray() -> Iterator[None]:
    """Each process that runs tests, and what they start, sees no other's Ray."""
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets have to be short
    os.environ["RAY_TMPDIR"] = place
    for patience in (
        "RAY_raylet_start_wait_time_s",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",  # a proxy that is not up after 5 s is killed
    ):
        os.environ.setdefault(patience, "120")  # on a busy machine
    os.environ.pop("RAY_ADDRESS", None)
    yield
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster for the whole run; "local" never joins one that happens to run."""
    import ray
    from helpers.ports import agent_ports
    from ray._private import parameter

    ports = agent_ports()
    export = ports.pop("metrics_export_port")  # the one that `ray.init` takes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameter, "RayParams", functools.partial(parameter.RayParams, **ports))
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _metrics_export_port=export,
        )
    yield
    ray.shutdown()


@pytest.fixture
def free_cluster(ray_cluster: None) -> None:
    """`ray_cluster`, with all of its CPUs free: tests before give theirs back in their own time.

    What a test that failed has left reserved is taken away after a minute.
    """
    import ray
    from helpers.reservations import give_back

    started = time.monotonic()
    while ray.available_resources().get("CPU") != 8:
        waited = time.monotonic() - started
        assert waited < 180, ray.available_resources()
        if waited > 60:
            give_back()
        time.sleep(0.5)


@pytest.fixture(scope="session")
def serve_port(ray_cluster: None) -> Iterator[int]:
    """Where Ray Serve listens, on `ray_cluster`, for the whole run.

    Each test that deploys an application there takes it down: `app.stop(own_cluster=False)`.
    """
    from helpers.ports import free_port
    from ray import serve
    from ray.serve.config import HTTPOptions

    from tensorray.cluster.app import start_serve

    port = free_port()
    start_serve(HTTPOptions(host="127.0.0.1", port=port))
    yield port
    serve.shutdown()
