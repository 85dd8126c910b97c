"""The KV cache of a model that drafts, under the block ids of the model it drafts for.

So a block that is shared, handed on or given back is so for both. What a block holds need not be
right: it may be what another sequence left there. That costs guesses, never tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.protocol import KVGroups
from tensorray.builder.array_ops import ArrayOps, LayerKV
from tensorray.builder.model import Model
from tensorray.kernels.batch import Batch


class DraftCache:
    """Keys and values of all layers of a draft, and the ops that read and append to them.

    One block table serves all its layers: that of the large model's KV group which keeps blocks
    longest. `group` is that group, `window` its window.
    """

    def __init__(
        self,
        model: Model,
        groups: KVGroups,
        max_positions: int,
        *,
        xp: Any = np,
        dtype: Any = np.float32,
        residual: Any = None,
    ) -> None:
        """`groups` is the shape of the large model's cache; there are tokens up to, but not with,
        position `max_positions`. Arrays are of the module `xp`, pages of `dtype`; `residual` is
        the residual stream's dtype (None: the weights')."""
        windows = groups.windows
        self.group = max(range(len(windows)), key=lambda g: (windows[g] is None, windows[g] or 0))
        self.window = windows[self.group]
        self.ops = ArrayOps(xp, {}, max_positions=max_positions + 1, residual=residual)
        self._dtype = dtype
        self._model = model
        self._block_size = groups.block_size

    @staticmethod
    def block_bytes(model: Model, block_size: int, itemsize: int = 4) -> int:
        """Bytes of one block, of elements of `itemsize` bytes."""
        specs = [model.kv_spec(layer) for layer in range(model.num_layers)]
        return sum(2 * itemsize * spec.kv_heads * spec.head_dim * block_size for spec in specs)

    def resize(self, num_blocks: int) -> None:
        """Forget everything; there are so many blocks from now on."""
        self.ops.kv = {}  # what there was goes before the new comes
        zeros, dtype = self.ops.xp.zeros, self._dtype
        views = {}
        for layer in range(self._model.num_layers):
            spec = self._model.kv_spec(layer)
            shape = (num_blocks, spec.kv_heads, self._block_size, spec.head_dim)
            pages = zeros(shape, dtype), zeros(shape, dtype)
            window = min((w for w in (spec.window, self.window) if w is not None), default=None)
            views[layer] = LayerKV(*pages, 0, window)
        self.ops.kv = views

    def batch(
        self,
        tokens: NDArray[np.int32],
        counts: NDArray[np.int32] | Sequence[int],
        first: NDArray[np.int32],
        table: NDArray[np.int32],
    ) -> Batch:
        """The step of `counts[i]` tokens of sequence i from position `first[i]` on, all packed in
        `tokens`, of which each sequence's last one's logits are wanted.

        `table` int32 [sequences, blocks] are their block tables.
        """
        size, counts = self._block_size, np.asarray(counts, np.int32)
        starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        positions = np.arange(starts[-1], dtype=np.int32) - starts[owner] + first[owner]
        blocks, offsets = np.divmod(positions, size)
        used = -(-int((first + counts).max()) // size)
        return Batch(
            tokens=tokens,
            positions=positions,
            query_starts=starts,
            seq_lens=first + counts,
            block_tables=[np.ascontiguousarray(table[:, :used])],
            slots=[table[owner, blocks].astype(np.int64) * size + offsets],
            logit_rows=starts[1:] - 1,
        )
