"""The packed step: which tokens run, where their keys and values go, what they may see.

All arrays live on the device that runs the step (NumPy on a CPU, CuPy on a GPU). T packed tokens,
S sequences, R rows whose logits are wanted, G KV groups (layers that share block tables).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Batch:
    """One step's metadata, packed; every kernel reads it and none changes it."""

    tokens: Any  # int32 [T]
    positions: Any  # int32 [T], each token's position in its own sequence
    query_starts: Any  # int32 [S + 1], first packed token of each sequence; last entry T
    seq_lens: Any  # int32 [S], tokens in the cache once this step has appended its own
    block_tables: list[Any]  # per group int32 [S, max_blocks], block ids, padded with 0
    slots: list[Any]  # per group int64 [T], block * block_size + offset; -1: do not store
    logit_rows: Any  # int32 [R], packed rows whose logits are wanted
    # Known to the host: no sequence has more queries in this step (1: decode). None: unknown.
    max_query: int | None = None
    # int32 [1]: at least so many sequences come first that have one query each. None: unknown.
    singles: Any | None = None
    # Sequences of one query may read what others append in this very step: a draft's, which has the
    # block table of the sequence that it is for.
    chained: bool = False
