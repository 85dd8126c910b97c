"""A step's work on a device: from its uploaded metadata to logits, eagerly or from graphs.

A step of decodes alone is one graph, for as many sequences as its bucket has; one of decodes and
drafts is another, whose attention waits for all keys of the step. Any other step is two: the layers
over its packed tokens, padded to a bucket of those, leave the residual stream in a buffer; the head
runs over the rows that are wanted, padded to a bucket of sequences. So buckets of tokens and of
rows add up, and don't multiply.

A stage of a pipeline takes that stream from the stage before and hands it to the stage after, as
many rows as the step has tokens, between the graphs.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tensorray.actors.buckets import Buckets
from tensorray.actors.device import Device, least_seconds
from tensorray.actors.device_ranks import DeviceRanks
from tensorray.actors.program import ProgramRunner
from tensorray.actors.step_buffers import Step, StepBuffers
from tensorray.builder.array_ops import ArrayOps
from tensorray.kernels.batch import Batch

logger = logging.getLogger(__name__)

# Rows of the residual stream that prompt log-probabilities are made of at a time, at most.
_SCORED_ROWS = 64


class Forward:
    """Runs steps whose metadata is in `buffers`. All calls belong inside `device.current()`.

    `max_seqs` sequences, drafts included, and `max_tokens` packed tokens are the most a step has;
    the residual stream is `[tokens, width]` of dtype `residual`. With `is_first` unset it comes
    from the stage before.
    """

    #: The other shards of the replica, once they have met; None: there are none.
    ranks: DeviceRanks | None = None
    #: Whether graphs of decodes leave their residual stream for `stream`.
    keeps_stream = False

    def __init__(
        self,
        device: Device,
        runner: ProgramRunner,
        ops: ArrayOps,
        buffers: StepBuffers,
        *,
        max_seqs: int,
        max_tokens: int,
        width: int,
        residual: Any,
        is_first: bool = True,
    ) -> None:
        self._device = device
        self._runner = runner
        self._ops = ops
        self._buffers = buffers
        self._max_seqs = max_seqs
        self._max_tokens = max_tokens
        #: Rows of a piece of `logits`.
        self.scored_rows = min(_SCORED_ROWS, max_tokens)
        self._hidden = device.xp.zeros((max_tokens, width), residual)
        self._received = None if is_first else device.xp.zeros((max_tokens, width), residual)
        self._decodes: dict[int, Callable[[], Any]] = {}
        self._chains: dict[int, Callable[[], Any]] = {}  # decodes with drafts
        self._bodies: dict[int, Callable[[], None]] = {}
        self._heads: dict[int, Callable[[], Any]] = {}
        self._decode_sizes = Buckets([])
        self._chain_sizes = Buckets([])
        self._body_sizes = Buckets([])
        self._head_sizes = Buckets([])

    def run(self, step: Step) -> Any:
        """Queue a step; returns logits `[>= R, vocab]` on the device, or None if none is wanted,
        or this stage has none.

        What reads them has to be queued before other recorded work of the device, and before
        anything is made inside its `recording`.
        """
        if self._received is not None:
            assert self.ranks is not None
            self.ranks.receive(self._received[: step.tokens])
        logits = self._run(step)
        if not self._runner.has_head:
            assert self.ranks is not None
            self.ranks.pass_on(self._hidden[: step.tokens])
        return logits

    def _run(self, step: Step) -> Any:
        if step.is_decode:
            sizes, graphs = self._decode_sizes, self._decodes
            if step.drafts:
                sizes, graphs = self._chain_sizes, self._chains
            if (size := sizes.fit(step.sequences)) is not None:
                return graphs[size]()
        size = self._body_sizes.fit(step.tokens)
        if size is None:
            with self._device.recording():
                self._body(step.tokens)
        else:
            self._bodies[size]()
        wanted = len(step.logit_rows)
        if not wanted or not self._runner.has_head:
            return None
        size = self._head_sizes.fit(wanted)
        if size is not None:
            return self._heads[size]()
        with self._device.recording():
            return self._head(wanted)

    def stream(self, rows: range) -> Any:
        """Packed rows of the residual stream of the step that `run` queued last: `[rows, width]`,
        overwritten by the next step. For steps of decodes alone only if `keeps_stream`."""
        return self._hidden[rows.start : rows.stop]

    def logits(self, first: int, count: int) -> Iterator[tuple[int, int, Any]]:
        """Logits of packed rows of the step that `run` queued last: (first row, number of rows,
        logits `[rows, vocab]`), in pieces of bounded size. What reads a piece has to be queued
        before the next one is asked for, what reads those that `run` gave before the first."""
        chunk = self.scored_rows
        for at in range(first, first + count, chunk):
            rows = min(chunk, first + count - at)
            # Always as many rows, so that whatever is tuned by their number is so once.
            start = min(at, self._max_tokens - chunk)
            with self._device.recording():
                logits = self._runner.head_of(self._hidden, start, chunk)
            yield at, rows, logits[at - start : at - start + rows]

    def warm_up(self) -> Any:
        """Run the largest step there may be, on padding alone: kernels are made, and the memory
        for activations is taken. Returns the dtype of logits, None where there is no head."""
        dtype = None
        with self._device.recording():
            self._body(self._max_tokens)
            if self._runner.has_head:
                dtype = self._head(self._max_seqs).dtype
                for _ in self.logits(0, 2 * self.scored_rows):  # who reads one holds it
                    pass
        self._device.mark().wait()
        return dtype

    def record(
        self, decodes: Sequence[int], bodies: Sequence[int], chains: Sequence[int] = ()
    ) -> None:
        """Make graphs of decodes of so many sequences, of layers over so many tokens, and of
        decodes that are so many with their drafts.

        What is uploaded has to be a step of padding.
        """
        began = time.perf_counter()
        before = self._device.free_memory()
        for size in sorted(decodes, reverse=True):  # the largest first: others fit its memory
            self._decodes[size] = self._recorded("decode", size, self._decode)
        for size in sorted(chains, reverse=True):
            self._chains[size] = self._recorded("drafts", size, self._chain)
        for size in sorted(bodies, reverse=True):
            self._bodies[size] = self._recorded("step", size, self._body)
        heads = {*decodes, *chains} if bodies and self._runner.has_head else ()
        for size in sorted(heads, reverse=True):
            self._heads[size] = self._recorded("head", size, self._head)
        self._decode_sizes = Buckets([*self._decodes])
        self._chain_sizes = Buckets([*self._chains])
        self._body_sizes = Buckets([*self._bodies])
        self._head_sizes = Buckets([*self._heads])
        self._device.mark().wait()
        logger.info(
            "recorded %d graphs in %.1f s, %.0f MiB",
            len(self._decodes) + len(self._chains) + len(self._bodies) + len(self._heads),
            time.perf_counter() - began,
            (before - self._device.free_memory()) / 2**20,
        )

    def time_drafts(self) -> dict[int, float]:
        """Seconds that decodes with drafts take, by the number of rows, of those with graphs.

        What is uploaded has to be a step of padding.
        """
        return self._times(self._chains)

    def time_decodes(self) -> dict[int, float]:
        """Likewise of decodes alone."""
        return self._times(self._decodes)

    def _times(self, graphs: dict[int, Callable[[], Any]]) -> dict[int, float]:
        return {size: least_seconds(self._device, run) for size, run in graphs.items()}

    def forget(self) -> None:
        """Let go of all graphs: of the memory they write to, and of the ranks they speak to."""
        self._decodes, self._chains, self._bodies, self._heads = {}, {}, {}, {}
        self._decode_sizes = self._chain_sizes = Buckets([])
        self._body_sizes = self._head_sizes = Buckets([])
        gc.collect()

    def _recorded(self, kind: str, size: int, work: Callable[[int], Any]) -> Callable[[], Any]:
        began = time.perf_counter()
        recorded = self._device.record(lambda: work(size))
        logger.info("recorded %s %d in %.2f s", kind, size, time.perf_counter() - began)
        return recorded

    def _chain(self, size: int) -> Any:
        return self._decode(size, chained=True)

    def _decode(self, size: int, chained: bool = False) -> Any:
        self._buffers.unpack(size, size)
        batch = self._buffers.batch(size, size, max_query=1, chained=chained)
        self._ops.batch = batch
        hidden = self._runner.body(self._entering(batch))
        if self.keeps_stream or not self._runner.has_head:
            self._hidden[:size] = hidden
        return self._runner.head(hidden) if self._runner.has_head else None

    def _body(self, tokens: int) -> None:
        self._buffers.unpack(tokens, self._max_seqs)
        batch = self._ops.batch = self._buffers.batch(tokens, self._max_seqs, max_query=None)
        self._hidden[:tokens] = self._runner.body(self._entering(batch))

    def _entering(self, batch: Batch) -> Any:
        """What the layers begin with: tokens, or the residual stream."""
        return batch.tokens if self._received is None else self._received[: len(batch.tokens)]

    def _head(self, rows: int) -> Any:
        self._ops.batch = self._buffers.batch(0, 0, max_query=None, rows=rows)
        return self._runner.head(self._runner.select(self._hidden))
