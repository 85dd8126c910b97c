"""Rotary position tables: a spec names the table, `table` computes it (Su et al., arXiv 2104.09864).

The scaled variants follow their sources: `linear` position interpolation (arXiv 2306.15595),
`llama3` frequency bands (Llama 3.1's release), `yarn` (arXiv 2309.00071).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class RopeSpec:
    """Everything a rotary table depends on. `rotary_dim` <= head_dim and even."""

    rotary_dim: int
    max_positions: int
    base: float = 10000.0
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


def table(spec: RopeSpec) -> np.ndarray:
    """float32 `[max_positions, rotary_dim]`: cosines in the first half of a row, sines after."""
    raise NotImplementedError
