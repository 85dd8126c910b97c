"""A draft model on a GPU: it writes its guesses into the step that checks them.

A draft model (Chen et al., arXiv 2302.01318) runs right before each step that has room for its
guesses, by steps and graphs of its own: the first runs what has come since the last, each further
one the guesses of the one before, which never leave the device. So the host knows how many guesses
there are, but not which; it queues all of it, and the large model's step, without waiting.

Its cache (draft_cache.py) has the block ids of the large model's, and its steps the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.config import ShardConfig
from tensorray.actors.device import Device
from tensorray.actors.device_drafter import TO_COME, DeviceDrafter
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.device_weights import DevicePlacement
from tensorray.actors.draft_books import DraftBooks
from tensorray.actors.draft_cache import DraftCache
from tensorray.actors.draft_choices import DraftChoices
from tensorray.actors.draft_model import define_draft_model
from tensorray.actors.drafter import Guess
from tensorray.actors.forward import Forward
from tensorray.actors.program import ProgramRunner, Runners
from tensorray.actors.protocol import KVGroups, SequenceStart
from tensorray.actors.segment_runners import open_runners
from tensorray.actors.step_buffers import Step, StepBuffers
from tensorray.builder.checkpoint import open_checkpoint
from tensorray.builder.checkpoint.open import LoadFormat
from tensorray.builder.graph import DTypes, Program, trace
from tensorray.builder.joining import join
from tensorray.builder.load import load_weights, plan_bytes
from tensorray.builder.model import Model, ShardWeights
from tensorray.builder.precision import choose_dtypes, numpy_dtype

# Steps on their way to the device at once; most drafts are shorter.
_RING = 8


class DeviceDraftModel(DeviceDrafter):
    """Guesses by a model of the same vocabulary, on the GPU of the shard that samples."""

    def __init__(
        self,
        device: Device,
        model: Model,
        program: Program,
        weights: ShardWeights,
        runners: Runners,
        groups: KVGroups,
        dtypes: DTypes,
        *,
        kv_dtype: Any,
        max_model_len: int,
        step_tokens: int,
    ) -> None:
        """`groups` is the shape of the large model's cache, `kv_dtype` that of this one's pages.
        A prompt of more than `step_tokens` tokens is taken in over several steps, before the first
        guesses."""
        self._device = device
        self._model = model
        self._runners = runners
        self.weight_bytes = plan_bytes(model, dtype=numpy_dtype(dtypes.compute))
        itemsize = np.dtype(kv_dtype).itemsize
        self.block_bytes = DraftCache.block_bytes(model, groups.block_size, itemsize)
        self._residual = numpy_dtype(dtypes.residual)
        longest = min(max_model_len, model.max_positions)
        self._cache = DraftCache(
            model, groups, longest, xp=device.xp, dtype=kv_dtype, residual=self._residual
        )
        self._program = ProgramRunner(program, self._cache.ops, weights, runners.get)
        self._books = DraftBooks(longest, self._cache.window, step_tokens)
        self._due: dict[int, list[int]] = {}  # of those that were asked last, what is to run

    @classmethod
    def load(
        cls,
        config: ShardConfig,
        device: Device,
        groups: KVGroups,
        *,
        vocab_size: int,
        max_model_len: int,
        step_tokens: int,
    ) -> DeviceDraftModel:
        """Load the model that a config names, for one of so many tokens. Raises CheckpointError,
        ModelConfigError or ValueError saying what does not fit."""
        # Random weights are for both; a format is for the large one's files.
        load_format: LoadFormat = "dummy" if config.load_format == "dummy" else "auto"
        name = str(config.guesser())
        checkpoint = open_checkpoint(name, load_format=load_format)
        try:
            model = define_draft_model(checkpoint, vocab_size)
            dtypes = choose_dtypes(
                checkpoint.config,
                model=name,
                wide_residual=model.wide_residual,
                dtype=config.dtype,
                unstated="float16",
            )
            compute = numpy_dtype(dtypes.compute)
            weights = load_weights(model, checkpoint, dtype=compute, place=DevicePlacement(device))
        finally:
            checkpoint.close()
        program = join(trace(model, range(model.num_layers)))
        with device.current():
            runners = open_runners(
                program,
                weights,
                dtypes,
                backend="kernels",
                max_decode=config.max_num_seqs,
                max_rows=step_tokens,
            )
        return cls(
            device,
            model,
            program,
            weights,
            runners,
            groups,
            dtypes,
            kv_dtype="uint8" if config.kv_cache_dtype == "fp8" else compute,
            max_model_len=max_model_len,
            step_tokens=step_tokens,
        )

    def prepare(
        self,
        buffers: StepBuffers,
        sampler: DeviceSampler,
        decodes: Sequence[int],
        bodies: Sequence[int],
    ) -> None:
        self._graphs = decodes, bodies
        self._runners.prepare([*decodes, *bodies], decodes)
        self._sampler = sampler
        self._buffers = own = buffers.beside(self._cache.group, _RING)
        self._choices = DraftChoices(self._device, sampler.state, own.last_tokens)
        self._choices.begin()  # so that its kernels are made now
        self._cache.resize(1)
        self._forward = Forward(
            self._device,
            self._program,
            self._cache.ops,
            own,
            max_seqs=len(own.last_tokens),
            max_tokens=len(own.tokens),
            width=self._model.hidden_size,
            residual=self._residual,
        )
        own.upload(None, [])
        self._forward.warm_up()

    def resize(self, num_blocks: int) -> None:
        self._books.clear()
        self._cache.resize(num_blocks)

    def record(self) -> dict[int, float]:
        self._buffers.upload(None, [])
        self._forward.record(*self._graphs)
        return self._forward.time_decodes()

    def forget(self) -> None:
        self._forward.forget()

    def start(self, start: SequenceStart) -> None:
        self._books.start(start)

    def end(self, seq: int) -> None:
        self._books.end(seq)

    def gained(self, seq: int, tokens: Sequence[int], row: NDArray[Any]) -> None:
        self._books.gained(seq, tokens)

    def draft(
        self,
        seqs: Sequence[int],
        rooms: Sequence[int],
        tables: Sequence[NDArray[Any]],
        guess: Guess,
    ) -> list[list[int]]:
        self._due = self._books.due(seqs)
        return [[TO_COME] * self._length(seq, room) for seq, room in zip(seqs, rooms, strict=True)]

    def _length(self, seq: int, room: int) -> int:
        draft, chunk = self._books[seq], self._due.get(seq, [])
        known = len(draft.tokens)
        if not chunk or draft.computed + len(chunk) < known:
            return 0  # it has no turn, or its prompt is not all run yet
        return min(room, self._books.longest - known + 1)

    def enqueue(
        self, lengths: Mapping[int, int], at: Mapping[int, int], rows: Any, into: Any
    ) -> None:
        if not self._due:
            return
        first = self._first_step([*lengths], at)
        first_logits = self._run(first)  # even if nobody guesses: prompts are taken in

        def logits(ahead: int, count: int) -> Any:
            return self._run(_decode(first, count, ahead)) if ahead else first_logits

        greedy = not any(map(self._sampler.draws, lengths))
        self._choices.fill([*lengths.values()], rows, into, logits, greedy=greedy)
        for seq, chunk in self._due.items():
            self._books[seq].computed += len(chunk) + max(lengths.get(seq, 0) - 1, 0)
        self._due = {}

    def _first_step(self, guessing: list[int], at: Mapping[int, int]) -> Step:
        """What has come since the last one: of those who guess, and then of others."""
        due, wanted = self._due, len(guessing)
        seqs = guessing + [seq for seq in due if seq not in guessing]
        counts = np.array([len(due[seq]) for seq in seqs], np.int32)
        own = np.array([at[seq] for seq in seqs], np.int32)
        ends = np.cumsum(counts)
        return Step(
            tokens=int(ends[-1]),
            sequences=len(seqs),
            rows=own,
            counts=counts,
            lens=counts + np.array([self._books[seq].computed for seq in seqs], np.int32),
            given=np.array([token for seq in seqs for token in due[seq]], np.int32),
            sampled=guessing,
            logit_rows=(ends[:wanted] - 1).astype(np.int32),
            sample_rows=own[:wanted],
            scored=[],
            pooled=[],
        )

    def _run(self, step: Step) -> Any:
        self._buffers.upload(step, [])
        return self._forward.run(step)


def _decode(first: Step, count: int, ahead: int) -> Step:
    """The step that runs the newest guesses of a step's first sequences, so many steps after it."""
    rows = first.rows[:count]
    return Step(
        tokens=count,
        sequences=count,
        rows=rows,
        counts=np.ones(count, np.int32),
        lens=first.lens[:count] + np.int32(ahead),
        given=None,
        sampled=first.sampled[:count],
        logit_rows=np.arange(count, dtype=np.int32),
        sample_rows=rows,
        scored=[],
        pooled=[],
    )
