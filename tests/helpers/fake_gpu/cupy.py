"""What is asked of CuPy about a machine's GPU, on one that has none."""

from __future__ import annotations

from types import SimpleNamespace

cuda = SimpleNamespace(
    runtime=SimpleNamespace(
        getDevice=lambda: 0,
        getDeviceProperties=lambda _: {"major": 9, "minor": 0, "name": b"NVIDIA H200"},
    )
)
