"""What is told of a deployment that failed: the error, and not the traceback before it."""

from __future__ import annotations

import pytest

from tensorray.cluster.deploy_failure import reason

TRACEBACK = """\
The deployment failed to start 3 times in a row. See controller logs for details. Error:
ray::ServeReplica:tensorray:Router.initialize_and_get_metadata() (pid=1, ip=192.0.2.2)
  File "replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "replica.py", line 349, in _start
    raise ShardError(f"{type(cause).__name__}: {cause}") from error
"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            TRACEBACK + "tensorray.actors.link.ShardError: ValueError: no room: 1 of 2",
            "no room: 1 of 2",
        ),
        (
            TRACEBACK + "tensorray.actors.placement.PlacementError: two lines,\nthe second",
            "two lines,\nthe second",
        ),
        (
            TRACEBACK + "ValueError: two lines\nhint: the second looks like an error",
            "two lines\nhint: the second looks like an error",
        ),
        (TRACEBACK + "KeyError: 'x'\n", "'x'"),
        ("Ingress waits", "Ingress waits"),
    ],
)
def test_the_last_error_is_told(message: str, expected: str) -> None:
    assert reason(message) == expected
