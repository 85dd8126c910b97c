"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Free host memory in bytes, or what the container's limit leaves, whichever is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except OSError:
        return free  # no cgroup v2 here: not Linux, or not in a container
    return free if limit == "max" else min(free, max(0, int(limit) - used))
