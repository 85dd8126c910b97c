"""The tiny checkpoints of tests/fixtures/models: where they are, and what is known about them.

Each directory is a whole model in Hub layout (config, weights, byte-level tokenizer; a chat
template in all but "llama2" and "gpt2"), with transformers' own logits and greedy continuations
in reference.npz, computed in float64. reference/make_fixtures.py makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MODELS = Path(__file__).parents[1] / "fixtures" / "models"

#: Directory names, one or more a family.
NAMES = sorted(path.name for path in MODELS.iterdir() if (path / "config.json").is_file())


@dataclass(frozen=True)
class Reference:
    """What transformers (float64, one sequence at a time) computes for a prompt."""

    prompt: npt.NDArray[np.int32]  # [n]
    logits: npt.NDArray[np.float32]  # [n, vocab], rounded from float64
    greedy: npt.NDArray[np.int32]  # [16], the greedy continuation, end-of-text tokens included


def directory(name: str) -> Path:
    """A checkpoint's directory, which goes wherever a model's path does."""
    return MODELS / name


def references(name: str) -> list[Reference]:
    with np.load(MODELS / name / "reference.npz") as arrays:
        stored: dict[str, Any] = dict(arrays)
    return [
        Reference(*(stored[f"{kind}_{i}"] for kind in ("prompt", "logits", "greedy")))
        for i in range(len(stored) // 3)
    ]
