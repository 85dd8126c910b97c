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


# Of a Ray node's agents, as RayParams names them.
_AGENTS = (
    "dashboard_agent_listen_port",
    "metrics_agent_port",
    "metrics_export_port",
    "runtime_env_agent_port",
)


def agent_ports() -> dict[str, int]:
    """Ports for a Ray node's agents, by RayParams' names.

    A raylet that is not told them ends itself if its agents have not chosen theirs within 15 s,
    which they may need on a busy machine (https://github.com/ray-project/ray/issues/65983).
    """
    ports: set[int] = set()
    while len(ports) < len(_AGENTS):  # Ray refuses one that two of them have
        ports.add(free_port())
    return dict(zip(_AGENTS, ports, strict=True))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    while True:
        port = _CHOICE.choice(_RANGE)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
