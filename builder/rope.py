"""Rotary position tables: a spec names the table, `table` computes it (arXiv 2104.09864).

The scaled variants follow their sources: `linear` position interpolation (arXiv 2306.15595),
`llama3` frequency bands (Llama 3.1's release), `yarn` (arXiv 2309.00071).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

RopeScaling = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeSpec:
    """Everything a rotary table depends on. `rotary_dim` <= head_dim and even."""

    rotary_dim: int
    max_positions: int
    base: float = 10000.0
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


def table(spec: RopeSpec) -> npt.NDArray[np.float32]:
    """float32 `[max_positions, rotary_dim]`: cosines in the first half of a row, sines after.

    Angles are float32 products, as in the reference implementations the models were trained and
    published with: at long positions more precision would mean other numbers than theirs.
    """
    frequencies = inverse_frequencies(spec).astype(np.float32)
    angles = np.arange(spec.max_positions, dtype=np.float32)[:, None] * frequencies
    half = spec.rotary_dim // 2
    out = np.empty((spec.max_positions, spec.rotary_dim), np.float32)
    np.cos(angles, out=out[:, :half])
    np.sin(angles, out=out[:, half:])
    if spec.attention_factor != 1.0:
        out *= np.float32(spec.attention_factor)
    return out


def inverse_frequencies(spec: RopeSpec) -> npt.NDArray[np.float64]:
    """float64 `[rotary_dim / 2]`: radians per position of each pair of dims, fastest first."""
    exponents = np.arange(0, spec.rotary_dim, 2) / spec.rotary_dim
    plain: npt.NDArray[np.float64] = spec.base**-exponents
    stretched = plain / spec.factor
    if spec.scaling == "none":
        return plain
    if spec.scaling == "linear":
        return stretched
    # Both other kinds keep fast pairs, stretch slow ones, and blend in between; they differ in
    # what the blend is linear in.
    keep = _llama3_keep(spec, plain) if spec.scaling == "llama3" else _yarn_keep(spec)
    return stretched * (1 - keep) + plain * keep


def _llama3_keep(spec: RopeSpec, frequencies: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How much of each pair stays as it was: linear in its turns over the original context."""
    turns = spec.original_max_positions * frequencies / (2 * math.pi)
    keep = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    return np.clip(keep, 0.0, 1.0)


def _yarn_keep(spec: RopeSpec) -> npt.NDArray[np.float64]:
    """How much of each pair stays as it was: linear in its index, between two whole indices."""

    def pair_index(turns: float) -> float:
        """The pair (as a real number) that makes this many turns over the original context."""
        per_turn = spec.original_max_positions / (turns * 2 * math.pi)
        return spec.rotary_dim * math.log(per_turn) / (2 * math.log(spec.base))

    low = max(math.floor(pair_index(spec.beta_fast)), 0)
    high = min(math.ceil(pair_index(spec.beta_slow)), spec.rotary_dim - 1)
    ramp = (np.arange(spec.rotary_dim // 2) - low) / max(high - low, 0.001)
    return 1.0 - np.clip(ramp, 0.0, 1.0)
