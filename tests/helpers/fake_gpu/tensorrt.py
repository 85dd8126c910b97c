"""As much of TensorRT 10 as says what it would build for; it builds nothing."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

__version__ = "10.99"


class BuilderFlag(IntEnum):
    TF32 = 7


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4


class Builder:
    def __init__(self, logger: ILogger) -> None:
        pass

    def create_builder_config(self) -> Any:
        return SimpleNamespace(
            flags=0,
            builder_optimization_level=3,
            get_tactic_sources=lambda: 3,
            clear_flag=lambda flag: None,
        )
