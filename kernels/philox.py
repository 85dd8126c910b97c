"""Random numbers without state: Philox4x32-10, keyed by a request's seed and an output position.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A
draw is a function of (seed, position) alone, so batch mates, preemption and the order of execution
can't change it. The layout (key: seed; counter: position, then zeros; low words first) is
cuRAND's for `curand_init(seed, subsequence=0, offset=4 * position)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
# [word, 1]: multipliers of counter words 0 and 2, and what each round adds to the two key words.
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_KEY_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _WEYL
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[Any], key: NDArray[Any]) -> NDArray[np.uint64]:
    """Ten rounds over `counter` [4, R] with `key` [2, R], all 32-bit words held in uint64.

    Returns [4, R], 32-bit words in uint64.
    """
    round_keys = (key.astype(np.uint64) + _KEY_STEPS) & _LOW
    even, odd = counter[0::2].astype(np.uint64), counter[1::2].astype(np.uint64)
    for round_key in round_keys:
        products = (even * _MULTIPLIERS)[::-1]
        even, odd = (products >> _HALF) ^ odd ^ round_key, products & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniform(
    seeds: Sequence[int] | NDArray[np.uint64], positions: Sequence[int] | NDArray[Any]
) -> NDArray[np.float64]:
    """One draw in [0, 1) for each of R (seed, output position) pairs: float64 [R], 53 random bits.

    `seeds` are uint64, `positions` 0 or more.
    """
    words = np.array([positions, seeds], np.uint64)  # [2, R]
    low, high = words & _LOW, words >> _HALF
    unused = np.zeros_like(low[0])
    word = philox4x32(np.stack([low[0], high[0], unused, unused]), np.stack([low[1], high[1]]))
    bits = (word[0] << _HALF | word[1]) >> np.uint64(11)
    draws: NDArray[np.float64] = bits * 2.0**-53
    return draws
