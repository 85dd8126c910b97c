"""Which device an array lives on."""

from __future__ import annotations

from typing import Any


def is_cuda(x: Any) -> bool:
    """Whether x is a CuPy array. Never imports CuPy: a machine without a GPU need not have it."""
    return type(x).__module__.partition(".")[0] == "cupy"
