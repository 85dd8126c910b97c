"""NumPy under as much of CuPy's face as segments' runners see: arrays have device addresses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tensorray.builder.tensorrt_runtime import ALIGNMENT

STREAM = 7

_at: dict[int, Array] = {}


class Array(np.ndarray):
    """An array that has an address once it is asked for."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        address = ALIGNMENT * (len(_at) + 1)
        _at[address] = self
        return SimpleNamespace(ptr=address)


def array_at(address: int) -> Array:
    """The array that was given an address."""
    return _at[address]


class FakeCupy:
    """The module."""

    ndarray = Array
    __version__ = "14.0"
    cuda = SimpleNamespace(
        get_current_stream=lambda: SimpleNamespace(ptr=STREAM),
        runtime=SimpleNamespace(
            driverGetVersion=lambda: 13000,
            getDevice=lambda: 0,
            getDeviceProperties=lambda index: {"name": b"NVIDIA H200"},
        ),
    )

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)

        def call(*arguments: Any, **options: Any) -> Any:
            return np.asarray(function(*arguments, **options)).view(Array)

        return call

    def ascontiguousarray(self, x: Any) -> Array:
        return x if x.flags.c_contiguous else np.ascontiguousarray(x).view(Array)


cupy = FakeCupy()
