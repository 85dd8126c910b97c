"""Ports for servers that have to be told one."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below those that systems give to outgoing connections (32768 and up on Linux) and above those
# that `ray start` gives its workers (10002 to 19999): nobody else takes one in between. Several
# runs of tests may ask at once, so where each begins to look is left to chance.
_RANGE = range(20_000, 32_000)
_CHOICE = random.SystemRandom()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    while True:
        port = _CHOICE.choice(_RANGE)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
