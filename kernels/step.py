"""A step's metadata: uploaded in one piece, unpacked on the device.

Block tables and each sequence's newest token stay on the device, a row a sequence, so that a step
uploads what is new and no more. `StepLayout` says where in the upload, int32 words, everything is.
What the model's kernels read (kernels/batch.py) is in part the upload itself, in part unpacked
from it by the functions here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tensorray.kernels.device import is_cuda

# The first words of an upload. TOKENS_AT is -1 if no token is given; SINGLES is how many sequences
# come first that have one token each.
TOKENS, UPDATES, UPDATES_AT, TOKENS_AT, SINGLES = range(5)

_ALIGN = 32  # words; sections start at multiples of 128 bytes


@dataclass(frozen=True)
class StepLayout:
    """Where the sections of an upload start, for at most `max_seqs` sequences.

    Of fixed size: `rows` (each sequence's row in the tables), `starts` (first packed token of each
    sequence, and the end), `lens` (tokens cached once the step has run), `logit_rows` (packed rows
    whose logits are wanted) and `sample_rows` (the table rows these belong to). Then, where the
    header says: table updates, pairs of a flat index and a block id; and the step's tokens, -1 for
    the newest of the sequence that the token belongs to.
    """

    max_seqs: int

    @cached_property
    def rows(self) -> int:
        return _ALIGN

    @cached_property
    def starts(self) -> int:
        return self.rows + _aligned(self.max_seqs)

    @cached_property
    def lens(self) -> int:
        return self.starts + _aligned(self.max_seqs + 1)

    @cached_property
    def logit_rows(self) -> int:
        return self.lens + _aligned(self.max_seqs)

    @cached_property
    def sample_rows(self) -> int:
        return self.logit_rows + _aligned(self.max_seqs)

    @cached_property
    def rest(self) -> int:
        """Where the sections of fixed size end."""
        return self.sample_rows + _aligned(self.max_seqs)


def _aligned(words: int) -> int:
    return -(-words // _ALIGN) * _ALIGN


def update_tables(packed: Any, tables: Any) -> None:
    """Write the upload's new block ids into the tables int32 `[groups, rows, width]`, in place."""
    if is_cuda(packed):
        from tensorray.kernels.cuda import step

        step.update_tables(packed, tables)
    else:
        update_tables_numpy(packed, tables)


def update_tables_numpy(packed: Any, tables: Any) -> None:
    """The twin of `update_tables`."""
    first, count = packed[UPDATES_AT], packed[UPDATES]
    pairs = packed[first : first + 2 * count].reshape(-1, 2)
    tables.reshape(-1)[pairs[:, 0]] = pairs[:, 1]


def unpack_step(
    packed: Any,
    layout: StepLayout,
    tables: Any,
    last_tokens: Any,
    tokens: Any,
    positions: Any,
    slots: Any,
    block_tables: Any,
    block_size: int,
) -> None:
    """Fill a step's arrays from its upload, for T tokens and S sequences, padding included.

    tables int32 `[groups, rows, width]`; last_tokens int32 `[rows]`. Written: tokens and positions
    int32 `[T]`; slots int64 `[groups, T]`; block_tables int32 `[groups, S, width]`, of which a row
    is written as far as its sequence's tokens reach. Padding tokens get token 0, position 0 and
    slot -1. Each output's last axis is dense.
    """
    if is_cuda(packed):
        from tensorray.kernels.cuda import step as kernels
    else:
        return unpack_step_numpy(
            packed, layout, tables, last_tokens, tokens, positions, slots, block_tables, block_size
        )
    kernels.unpack_step(
        packed, layout, tables, last_tokens, tokens, positions, slots, block_tables, block_size
    )


def unpack_step_numpy(
    packed: Any,
    layout: StepLayout,
    tables: Any,
    last_tokens: Any,
    tokens: Any,
    positions: Any,
    slots: Any,
    block_tables: Any,
    block_size: int,
) -> None:
    """The twin of `unpack_step`."""
    total = packed[TOKENS]
    tokens[total:], positions[total:], slots[:, total:] = 0, 0, -1
    for s in range(block_tables.shape[1]):
        row, length = packed[layout.rows + s], packed[layout.lens + s]
        first, last = packed[layout.starts + s], packed[layout.starts + s + 1]
        used = -(-length // block_size)
        block_tables[:, s, :used] = tables[:, row, :used]
        own = np.arange(length - (last - first), length)
        positions[first:last] = own
        slots[:, first:last] = (
            tables[:, row, own // block_size].astype(np.int64) * block_size + own % block_size
        )
        tokens[first:last] = last_tokens[row]
        if packed[TOKENS_AT] >= 0:
            given = packed[packed[TOKENS_AT] + first : packed[TOKENS_AT] + last]
            tokens[first:last] = np.where(given < 0, tokens[first:last], given)
