"""Run a definition under ArrayOps by hand: packed steps over a small, shuffled, paged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tensorray.builder.array_ops import ArrayOps, LayerKV
from tensorray.builder.model import Model, ShardWeights
from tensorray.kernels.batch import Batch

OpsFactory = Callable[[list[LayerKV]], ArrayOps]


class PagedRun:
    """Sequences with paged KV caches, one group of layers a window; blocks come in random order.

    Pages start as NaN, so that reading what was never written shows.
    """

    def __init__(
        self,
        model: Model,
        weights: ShardWeights,
        *,
        block_size: int = 4,
        num_blocks: int = 64,
        seed: int = 0,
        make_ops: OpsFactory = lambda kv: ArrayOps(np, kv),
    ) -> None:
        self.model = model
        self.weights = weights
        self.block_size = block_size
        specs = [model.kv_spec(layer) for layer in range(model.num_layers)]
        windows = list(dict.fromkeys(spec.window for spec in specs))
        kv = []
        for spec in specs:
            shape = (num_blocks, spec.kv_heads, block_size, spec.head_dim)
            pages = (np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32))
            kv.append(LayerKV(*pages, windows.index(spec.window), spec.window))
        self.ops = make_ops(kv)
        generator = np.random.default_rng(seed)
        self._free = [list(generator.permutation(num_blocks)) for _ in windows]
        self._tables: dict[str, list[list[int]]] = {}
        self._lengths: dict[str, int] = {}

    def step(
        self, chunks: Sequence[tuple[str, npt.NDArray[np.int32]]]
    ) -> list[npt.NDArray[np.float32]]:
        """Run some sequences' next tokens in one packed step; logits `[n, vocab]` of each."""
        batch = self._pack(chunks)
        ops, model, weights = self.ops, self.model, self.weights
        ops.batch = batch
        x = model.embed(ops, weights.embed, batch.tokens)
        for layer, layer_weights in weights.layers.items():
            x = model.layer(ops, layer_weights, x, layer)
        logits = model.head(ops, weights.head, ops.select_rows(x))
        return np.split(logits, batch.query_starts[1:-1])

    def _pack(self, chunks: Sequence[tuple[str, npt.NDArray[np.int32]]]) -> Batch:
        counts = [len(tokens) for _, tokens in chunks]
        positions, lengths = [], []
        for name, tokens in chunks:
            tables = self._tables.setdefault(name, [[] for _ in self._free])
            start = self._lengths.get(name, 0)
            lengths.append(start + len(tokens))
            self._lengths[name] = lengths[-1]
            positions.append(np.arange(start, lengths[-1]))
            for table, free in zip(tables, self._free, strict=True):
                while len(table) * self.block_size < lengths[-1]:
                    table.append(free.pop())
        widest = -(-max(lengths) // self.block_size)
        tables_of, slots_of = [], []
        for group in range(len(self._free)):
            padded = np.zeros((len(chunks), widest), np.int32)
            slots: list[Any] = []
            for row, (name, _) in enumerate(chunks):
                table = np.array(self._tables[name][group], np.int64)
                padded[row, : len(table)] = table
                blocks, offsets = np.divmod(positions[row], self.block_size)
                slots.append(table[blocks] * self.block_size + offsets)
            tables_of.append(padded)
            slots_of.append(np.concatenate(slots))
        starts = np.cumsum([0, *counts]).astype(np.int32)
        return Batch(
            tokens=np.concatenate([tokens for _, tokens in chunks]).astype(np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            query_starts=starts,
            seq_lens=np.array(lengths, np.int32),
            block_tables=tables_of,
            slots=slots_of,
            logit_rows=np.arange(starts[-1], dtype=np.int32),
        )
