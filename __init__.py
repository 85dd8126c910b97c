"""Large language models on a Ray cluster: `from tensorray import LLM, SamplingParams`.

The names below are imported when they are first asked for, so that a process which needs one room
(an actor, a kernel's compiler) does not load the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorray.cluster.llm import (
        LLM,
        BeamSearchParams,
        LoRARequest,
        PoolingParams,
        SamplingParams,
    )

    __version__: str

__all__ = [
    "LLM",
    "BeamSearchParams",
    "LoRARequest",
    "PoolingParams",
    "SamplingParams",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tensorray")
    if name in __all__:
        return getattr(import_module("tensorray.cluster.llm"), name)
    raise AttributeError(f"module 'tensorray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
