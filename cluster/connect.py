"""The Ray cluster a command runs on: the one that is named, or one of its own."""

from __future__ import annotations

import logging
import os

import ray

# Ray warns that a cluster takes orders from those who have its token only. That it does not is
# what a user should know.
logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(
    lambda record: "authentication is enabled" not in record.getMessage()
)


def joins() -> bool:
    """Whether `connect` finds a cluster, instead of starting one."""
    return ray.is_initialized() or "RAY_ADDRESS" in os.environ


def connect(logging_level: int = logging.WARNING) -> bool:
    """Connect to the cluster that RAY_ADDRESS names, or start one; whether one was started.

    A cluster is joined only by name, so that nobody's work lands on somebody else's by accident.
    Besides, Ray's note of the last one on this machine may be stale, and looking for that one ends
    the process.
    """
    if ray.is_initialized():
        return False
    if "RAY_ADDRESS" not in os.environ:
        start(logging_level)
        return True
    _be_patient()
    ray.init(log_to_driver=False, logging_level=logging_level)
    return False


def start(logging_level: int = logging.WARNING) -> None:
    """Start a cluster on this machine, and connect to it."""
    _be_patient()
    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, logging_level=logging_level
    )


def _be_patient() -> None:
    """Have Ray give processes time to start: 30 s, and 5 s for a proxy of Serve's, which is killed
    and started again otherwise, are little on a busy machine."""
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "300")
