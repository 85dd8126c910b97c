"""A shard on a GPU: steps are started ahead, run from graphs, and sampled where they ran.

`submit` packs a plan, uploads it and queues all of its step on the device, sampling included;
nothing in it waits. The tokens it chose stay on the device as the next step's input. What `submit`
returns waits for the copy of the tokens that the host sees, while the next step runs.

One of a replica's several shards has the layers of its stage and its rank's part of the weights;
device_ranks.py is how it reaches the others. It records its graphs once it has met them, and anew
each time, since graphs hold on to whom they were recorded with.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tensorray.actors.adapted_program import AdaptedProgram
from tensorray.actors.adapter import Adapter, AdapterSource
from tensorray.actors.beam_starts import BeamStarts
from tensorray.actors.buckets import bucket_sizes
from tensorray.actors.communicator import Communicator, CommunicatorError
from tensorray.actors.config import ShardConfig
from tensorray.actors.device import CudaDevice, Device, DeviceError, Mark
from tensorray.actors.device_adapters import DeviceAdapters
from tensorray.actors.device_drafts import (
    DeviceDrafts,
    Guesses,
    check_drafts,
    open_drafts,
    with_drafts,
)
from tensorray.actors.device_ranks import DeviceRanks, Rehearsal
from tensorray.actors.device_sampler import DeviceSampler, HostRows, PromptScores, Sampled
from tensorray.actors.device_weights import DevicePlacement
from tensorray.actors.forward import Forward
from tensorray.actors.guidance import Guidance, Vocabulary
from tensorray.actors.kv_cache import KVCache, KVPlan, choose_num_blocks, plan_stage
from tensorray.actors.link import PendingStep
from tensorray.actors.logits_processors import Registry, load_registry
from tensorray.actors.pooling import PooledChunk, Pooler, has_states
from tensorray.actors.program import ProgramRunner, Runners
from tensorray.actors.protocol import (
    KVGroups,
    Logprobs,
    ShardInfo,
    StepPlan,
    StepResult,
)
from tensorray.actors.sampler import SamplingError, refused
from tensorray.actors.segment_runners import open_runners
from tensorray.actors.step_buffers import RunningSequences, Scored, Step, StepBuffers
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.graph import DTypes, Program, trace
from tensorray.builder.joining import join
from tensorray.builder.load import load_weights, plan_bytes
from tensorray.builder.model import Model, ShardWeights
from tensorray.builder.precision import choose_dtypes, numpy_dtype
from tensorray.builder.registry import resolve

logger = logging.getLogger(__name__)

#: Tokens a step may run, where nothing is said: on an H200 a tenth of a second of a model of 8
#: billion parameters, which then answers 256 prompts 1 % faster than with half as many.
DEFAULT_STEP_TOKENS = 4096
# Fewer tokens than this, and a mixed step costs what reading the weights costs.
_SMALLEST_MIXED = 16
# What a graph takes: 48 of Llama 3.1 8B took 28 MiB on an H200.
_GRAPH_BYTES = 1 << 20
# Larger batches have drafts too seldom for graphs of their own.
_LARGEST_CHAIN = 128


@dataclass(frozen=True)
class Limits:
    """The most a shard is asked for."""

    max_model_len: int
    max_num_seqs: int
    step_tokens: int


@dataclass(frozen=True)
class GraphSizes:
    """Steps that run from graphs: decodes of so many sequences, others of so many tokens."""

    decodes: Sequence[int]
    bodies: Sequence[int]
    chains: Sequence[int] = ()  # decodes and their drafts

    @property
    def count(self) -> int:
        """How many graphs there will be at most."""
        heads = {*self.decodes, *self.chains} if self.bodies else ()
        return len(self.decodes) + len(self.bodies) + len(self.chains) + len(heads)

    @classmethod
    def choose(
        cls, limits: Limits, asked: Sequence[int] | None, eager: bool, drafts: int = 0
    ) -> GraphSizes:
        """All sizes up to the limits, those `asked` for, or, if `eager`, none. `drafts` is the most
        that a step has."""
        if eager:
            return cls([], [])
        most = min(limits.max_num_seqs + drafts, limits.step_tokens) if drafts else 0
        if asked:
            return cls(
                [size for size in asked if size <= limits.max_num_seqs],
                [size for size in asked if size <= limits.step_tokens],
                [size for size in asked if size <= most] if drafts else (),
            )
        smallest = min(_SMALLEST_MIXED, limits.step_tokens)
        return cls(
            bucket_sizes(1, limits.max_num_seqs),
            bucket_sizes(smallest, limits.step_tokens),
            bucket_sizes(1, min(most, _LARGEST_CHAIN)) if drafts else (),
        )


class GpuShard:
    """A model, or its layout's share of one, on one device."""

    def __init__(
        self,
        device: Device,
        model: Model,
        program: Program,
        weights: ShardWeights,
        runners: Runners,
        groups: KVPlan,
        dtypes: DTypes,
        limits: Limits,
        graphs: GraphSizes,
        *,
        choose_blocks: Callable[[int], int],
        kv_dtype: Any = None,
        vocabulary: Callable[[], Vocabulary] | None = None,
        processors: Registry | None = None,
        adapters: DeviceAdapters | None = None,
        drafts: DeviceDrafts | None = None,
        weight_bytes: int = 0,
        began: float | None = None,
    ) -> None:
        """`choose_blocks` sizes the KV cache, in blocks, from the bytes that are free once weights,
        activations and graphs have theirs; `kv_dtype` is that of its pages (None: the compute
        dtype). `vocabulary` is asked when a sequence first has a grammar; without it such ones
        fail. `processors` are the logits processors that sequences may name, `adapters` the LoRA
        adapters. With `drafts` plans may leave room for them. `began` is when loading did, by
        time.perf_counter."""
        began = time.perf_counter() if began is None else began
        self._device = device
        self._program = program
        self._layout = layout = model.layout
        self._model = model
        self._head_weights = weights.head
        self._pooler = Pooler()
        self._limits = limits
        self._graphs = graphs
        self._groups = len(groups.groups)
        # Steps in flight: one a stage, one waits behind them.
        depth = layout.pp_size + 1
        # A pipelined step may run one token past the last one that counts.
        self._width = -(-(limits.max_model_len + 1) // groups.block_size)
        self._lock = threading.Lock()  # submit and results come from two threads
        self._last_end = 0.0
        with device.current():
            self._drafts = drafts
            max_drafts = 0 if drafts is None else drafts.most(limits.max_num_seqs)
            heads = sorted({*graphs.decodes, *graphs.chains})
            runners.prepare([*heads, *graphs.bodies], heads)
            self._buffers = StepBuffers(
                device,
                max_seqs=limits.max_num_seqs,
                max_tokens=limits.step_tokens,
                groups=self._groups,
                width=self._width,
                block_size=groups.block_size,
                ring=depth + 1,
                max_drafts=max_drafts,
            )
            self._sampler: DeviceSampler | None = None
            self.guidance: Guidance | None = None
            if layout.rank == layout.sampler:
                if vocabulary is not None:
                    self.guidance = Guidance(vocabulary, model.vocab_size)
                self._sampler = DeviceSampler(
                    device,
                    model.vocab_size,
                    limits.max_num_seqs,
                    self._buffers.last_tokens,
                    self.guidance,
                    processors,
                )
            self._running = self._no_sequences()
            self._beams = BeamStarts()
            self._ranks: DeviceRanks | None = None
            self._unheard: deque[NDArray[np.int32]] = deque()  # rows whose tokens are to come
            # Tells the first stage a step's tokens. Whoever starts a step may hold the lock until
            # that has run, which may need these tokens, so they wait for no lock.
            self._teller: ThreadPoolExecutor | None = None
            if self._sampler is not None and layout.pp_size > 1:
                self._teller = ThreadPoolExecutor(1, thread_name_prefix="teller")
            kv_dtype = numpy_dtype(dtypes.compute) if kv_dtype is None else kv_dtype
            residual = numpy_dtype(dtypes.residual)
            self._ops = ops = ArrayOps(
                device.xp,
                KVCache(groups, 1, device.xp, kv_dtype).layers,
                max_positions=limits.max_model_len + 1,
                residual=residual,
            )

            def forward(runner: ProgramRunner) -> Forward:
                return Forward(
                    device,
                    runner,
                    ops,
                    self._buffers,
                    max_seqs=limits.max_num_seqs + max_drafts,
                    max_tokens=limits.step_tokens,
                    width=model.hidden_size,
                    residual=residual,
                    is_first=layout.is_first,
                )

            self._forward = forward(ProgramRunner(program, ops, weights, runners.get))
            self._forwards = [self._forward]
            self._adapters = adapters
            if adapters is not None:
                adapters.prepare(
                    limits.max_num_seqs,
                    limits.step_tokens,
                    len(self._buffers.sample_rows),
                    ring=depth + 1,
                )
                # What runs steps in which a row has an adapter.
                self._adapted = forward(AdaptedProgram(program, ops, weights, adapters))
                self._forwards.append(self._adapted)
            if layout.tp_size > 1:
                ops.ranks = Rehearsal(device.xp, layout.tp_size)
            self._buffers.upload(None, [])
            for each in self._forwards:
                each.keeps_stream = drafts is not None and drafts.keeps_states
                logits_dtype = each.warm_up()
            if self._sampler is not None:
                self._sampler.prepare(logits_dtype, self._forward.scored_rows)
            if drafts is not None and self._sampler is not None:
                drafts.prepare(self._buffers, self._sampler, graphs.decodes, graphs.bodies)
            recorders = len(self._forwards) + (drafts is not None)  # a draft model has its own
            to_record = graphs.count * recorders * _GRAPH_BYTES
            num_blocks = choose_blocks(device.free_memory() - to_record)
            self._cache = cache = KVCache(groups, num_blocks, device.xp, kv_dtype)
            ops.kv = cache.layers
            if drafts is not None:
                drafts.resize(num_blocks)
            if layout.size == 1:
                self._record()
        self.info = ShardInfo(
            kv=cache.groups,
            vocab_size=model.vocab_size,
            max_model_len=limits.max_model_len,
            device=device.name,
            weight_bytes=weight_bytes,
            kv_cache_bytes=cache.nbytes,
            load_seconds=time.perf_counter() - began,
            segments=runners.report(),
            rejected_plans=len(runners.rejected),
            step_tokens=limits.step_tokens,
            answers=self._sampler is not None,
            depth=depth,
            drafting=None if drafts is None else drafts.drafting,
        )

    @classmethod
    def load(cls, config: ShardConfig, device: Device | None = None) -> GpuShard:
        """Open the checkpoint, check it, load it, size the KV cache, record graphs.

        Raises DeviceError, CheckpointError, ModelConfigError, KVCacheError or ValueError, each
        saying what to change.
        """
        began = time.perf_counter()
        processors = load_registry(config.logits_processors)
        check_drafts(config)
        device = device or CudaDevice()
        checkpoint = config.open()
        try:
            layout = config.layout
            model = resolve(checkpoint.config, config.model_class)(checkpoint.config, layout)
            # A GGUF file does not say: float16 keeps more of its values' bits than bfloat16.
            dtypes = choose_dtypes(
                checkpoint.config,
                model=config.model,
                wide_residual=model.wide_residual,
                dtype=config.dtype,
                unstated="float16",
            )
            max_model_len = config.max_model_len or model.max_positions
            if max_model_len > model.max_positions:
                raise ValueError(
                    f"--max-model-len {max_model_len} is more than the {model.max_positions} "
                    "positions the model was made for"
                )
            groups, layers = plan_stage(model, config.block_size)
            compute = numpy_dtype(dtypes.compute)
            weights = load_weights(
                model, checkpoint, layers=layers, dtype=compute, place=DevicePlacement(device)
            )
        finally:
            checkpoint.close()
        logger.info("loaded the weights in %.1f s", time.perf_counter() - began)
        adapters = None
        if config.enable_lora:
            with device.current():
                adapters = DeviceAdapters(
                    device,
                    model,
                    weights,
                    layers,
                    dtype=compute,
                    source=AdapterSource(config.hf_token, config.download_dir, config.offline),
                    max_rank=config.max_lora_rank,
                    slots=config.max_loras,
                )
            logger.info("room for adapters: %.0f MiB", adapters.nbytes / 2**20)
        limits = Limits(max_model_len, config.max_num_seqs, config.step_tokens(DEFAULT_STEP_TOKENS))
        program = join(trace(model, layers))
        with device.current():
            runners = open_runners(
                program,
                weights,
                dtypes,
                backend=config.segment_backend,
                plan_store=config.plan_store,
                build_plans=config.build_plans,
                max_decode=limits.max_num_seqs,
                max_rows=limits.step_tokens,
            )
        fp8 = config.kv_cache_dtype == "fp8"
        kv_dtype = np.dtype(np.uint8) if fp8 else compute
        drafts = open_drafts(
            config,
            device,
            model,
            weights.head,
            KVGroups(groups.windows, 0, groups.block_size),
            dtypes,
            max_model_len=max_model_len,
            step_tokens=limits.step_tokens,
        )
        block_bytes, share = groups.block_bytes(kv_dtype.itemsize), 1.0
        if drafts is not None:
            share = block_bytes / (block_bytes + drafts.block_bytes)

        def choose_blocks(free: int) -> int:
            kept = int((1 - config.gpu_memory_utilization) * device.total_memory())
            return choose_num_blocks(
                groups,
                kv_dtype.itemsize,
                max_model_len=max_model_len,
                max_num_seqs=limits.max_num_seqs,
                step_tokens=limits.step_tokens,
                available=int((free - kept) * share),
                cache_bytes=config.kv_cache_memory_bytes
                and int(config.kv_cache_memory_bytes * share),
                num_blocks=config.num_kv_blocks,
            )

        return cls(
            device,
            model,
            program,
            weights,
            runners,
            groups,
            dtypes,
            limits,
            GraphSizes.choose(
                limits,
                config.cudagraph_capture_sizes,
                config.enforce_eager,
                0 if drafts is None else drafts.most(limits.max_num_seqs),
            ),
            choose_blocks=choose_blocks,
            kv_dtype=kv_dtype,
            vocabulary=config.vocabulary,
            processors=processors,
            adapters=adapters,
            drafts=drafts,
            weight_bytes=plan_bytes(model, layers=layers, dtype=compute),
            began=began,
        )

    def submit(self, plan: StepPlan) -> PendingStep:
        """Queue a step. Raises KeyError or IndexError on a plan that contradicts the books,
        DeviceError if the device failed, and CommunicatorError when another shard of the replica
        is lost; what it returns raises these, too."""
        with self._interrupting():
            return self._submit(plan)

    def _submit(self, plan: StepPlan) -> PendingStep:
        began = time.perf_counter()
        if self.guidance is not None:
            self.guidance.step()
        with self._lock, self._device.current():
            sampler, ranks = self._sampler, self._ranks
            if ranks is not None:
                ranks.check()
            plan = self._beams.complete(plan)
            guesses = None
            if (drafts := self._drafts) is not None:
                plan, guesses = drafts.take(plan, self._running, sampler, ranks)
            step = self._running.take(plan)
            unserved: dict[int, str] = {}
            if (adapters := self._adapters) is not None:
                adapters.start(plan, self._running.rows)
                unserved = adapters.missing(plan.seqs)
            if sampler is not None:
                for seq in plan.ends:
                    sampler.end(seq)
                    self._pooler.end(seq)
                for start in plan.starts:
                    sampler.start(start, self._running.rows[start.seq])
            if not plan.seqs:
                return lambda: StepResult(step=plan.step, seqs=[], tokens=[])
            if guesses is not None:
                step = with_drafts(step, guesses, self._running)
            if plan.copies:
                self._cache.copy_blocks(self._device.xp.asarray(np.array(plan.copies, np.int32)))
            self._buffers.upload(step, self._running.take_updates())
            if drafts is not None and guesses is not None:
                drafts.write(guesses, step, self._running, self._buffers, ranks)
            forward = self._forward
            if adapters is not None and adapters.select(step):
                forward = self._adapted
            self._hear(step.rows)  # as late as can be: this may have to wait
            logits = forward.run(step)
            sampled = told = None
            if step.sampled:
                if sampler is not None:
                    sampled = sampler.enqueue(step.sampled, self._buffers.sample_rows, logits)
                    if self._teller is not None and ranks is not None:
                        told = self._teller.submit(_tell, sampled, ranks)
                    if drafts is not None:
                        drafts.enqueue(guesses, step, sampler, self._buffers, forward, logits)
                if ranks is not None and self._layout.pp_size == 1:
                    ranks.share(self._buffers.last_tokens)
                elif self._layout.is_first and ranks is not None:
                    self._unheard.append(step.sample_rows)
            prompts = []
            if self._layout.is_last:
                prompts = [self._score(forward, scored) for scored in step.scored]
            states = [self._states(forward, chunk) for chunk in step.pooled]
            pending = _Pending(
                plan.step,
                step,
                sampled,
                told,
                guesses,
                prompts,
                states,
                unserved,
                self._device.mark(),
                began,
            )
        return lambda: self._collect(pending)

    def _hear(self, rows: NDArray[np.int32]) -> None:
        """On the first of several stages: take in the tokens that these rows go on from."""
        ranks, unheard = self._ranks, self._unheard
        while unheard and (
            len(unheard) > self._layout.pp_size
            or any(np.isin(rows, told).any() for told in unheard)
        ):
            assert ranks is not None
            told = unheard.popleft()
            self._buffers.set_last_tokens(told, ranks.hear(len(told)))

    def join(self, world: Communicator, num_blocks: int) -> None:
        alone = world.size == 1
        if num_blocks == self.info.kv.num_blocks and alone:
            self.reset()
            return
        with self._lock, self._device.current():
            self._device.mark().wait()
            self._forget_graphs()
            self._leave()
            if num_blocks != self.info.kv.num_blocks:
                self._ops.kv = {}
                self._cache.resize(num_blocks)
                self._ops.kv = self._cache.layers
                if self._drafts is not None:
                    self._drafts.resize(num_blocks)
                self.info = msgspec.structs.replace(
                    self.info, kv=self._cache.groups, kv_cache_bytes=self._cache.nbytes
                )
            self._forget()
            if not alone:
                self._ranks = DeviceRanks(self._device, self._layout, world)
                for forward in self._forwards:
                    forward.ranks = self._ranks
                self._ops.ranks = self._ranks.tp
            self._buffers.upload(None, [])
            self._record()
            if (drafts := self._drafts) is not None:
                self.info = msgspec.structs.replace(self.info, drafting=drafts.drafting)

    def _record(self) -> None:
        for forward in self._forwards:
            forward.record(self._graphs.decodes, self._graphs.bodies, self._graphs.chains)
        if (drafts := self._drafts) is not None:
            drafts.record(self._forward.time_drafts())

    def _forget_graphs(self) -> None:
        for forward in self._forwards:
            forward.forget()
        if self._drafts is not None:
            self._drafts.forget()

    # What its door asks: see kv_door.Pages. Copies are queued between steps, on the one stream, so
    # nothing has to be said about their order.

    @property
    def page_layout(self) -> str:
        return self._cache.page_layout

    @property
    def block_bytes(self) -> int:
        return self._cache.block_bytes

    def runs(self, seq: int) -> bool:
        return seq in self._running.rows

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        with self._lock, self._device.current():
            host = self._device.pinned(len(blocks) * self.block_bytes)
            found = self._cache.read_blocks(self._device.xp.asarray(blocks))
            self._device.download(found.reshape(-1).view(np.uint8), host)
            mark = self._device.mark()
        mark.wait()
        return host

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        with self._lock, self._device.current():  # not while graphs are recorded
            host = self._device.pinned(data.nbytes)
        host[:] = data
        with self._lock, self._device.current():
            brought = self._device.xp.empty(data.nbytes, np.uint8)
            self._device.upload(host, brought)
            self._cache.write_blocks(self._device.xp.asarray(blocks), brought)
            mark = self._device.mark()
        mark.wait()

    def add_adapter(self, adapter: Adapter) -> None:
        if self._adapters is None:
            raise ValueError("adapters need --enable-lora")
        self._adapters.load(adapter)

    def remove_adapter(self, id: int) -> None:
        if self._adapters is not None:
            self._adapters.unload(id)

    def adapters(self) -> list[Adapter]:
        return [] if self._adapters is None else self._adapters.loaded()

    def interrupt(self, reason: str) -> None:
        if (ranks := self._ranks) is not None:
            ranks.abort(reason)

    def reset(self) -> None:
        self.interrupt("its router is gone")
        with self._lock, self._device.current():
            self._device.mark().wait()
            self._forget()

    def close(self) -> None:
        """Give all of the device's memory back; nothing may be submitted any more."""
        self.interrupt("closed")
        # One that failed has nothing to wait for.
        with contextlib.suppress(DeviceError, CommunicatorError), self._device.current():
            self._device.mark().wait()
            self._forget_graphs()
            self._leave()
        if self._teller is not None:
            self._teller.shutdown(wait=False)
        if self._adapters is not None:
            del self._adapted
        self._adapters = self._drafts = None
        del self._forward, self._forwards
        del self._sampler, self._buffers, self._cache, self._ops, self._head_weights
        gc.collect()
        self._device.release()

    @contextlib.contextmanager
    def _interrupting(self) -> Iterator[None]:
        """Whatever fails here, the other shards are not left waiting for it."""
        try:
            yield
        except Exception as error:
            self.interrupt(f"{type(error).__name__}: {error}")
            raise

    def _leave(self) -> None:
        """End what there is with other shards; no graph may speak to them any more."""
        ranks, self._ranks = self._ranks, None
        for forward in self._forwards:
            forward.ranks = None
        self._ops.ranks = None
        if ranks is not None:
            ranks.close()

    def _forget(self) -> None:
        """Forget every sequence."""
        if self._sampler is not None:
            for seq in self._running.rows:
                self._sampler.end(seq)
        if self._adapters is not None:
            self._adapters.forget_sequences()
        if self._drafts is not None:
            self._drafts.reset()
        self._running = self._no_sequences()
        self._beams = BeamStarts()
        self._pooler = Pooler()
        self._unheard.clear()

    def _no_sequences(self) -> RunningSequences:
        return RunningSequences(self._limits.max_num_seqs, self._groups, self._width)

    def _score(self, forward: Forward, scored: Scored) -> list[PromptScores]:
        """Queue the log-probabilities of prompt tokens 1.. whose predecessors ran in this step."""
        start = scored.start
        count = min(scored.count, start.prompt_len - 1 - scored.begin)
        found = []
        for packed, rows, logits in forward.logits(scored.packed, count):
            if self._sampler is None:  # it only had its part in making them
                continue
            first = scored.begin + packed - scored.packed + 1
            found.append(
                self._sampler.enqueue_prompt_logprobs(
                    start.tokens[first : first + rows], logits, start.sampling.prompt_logprobs or 0
                )
            )
        return found

    def _states(self, forward: Forward, chunk: PooledChunk) -> HostRows | None:
        """Queue the hidden states that a pooled chunk is made of."""
        if self._sampler is None or not chunk.rows or not has_states(self._model):
            return None
        stream = forward.stream(chunk.rows)
        with self._device.recording():
            states = self._model.final_norm(self._ops, self._head_weights, stream)
        return self._sampler.enqueue_rows(states)

    def _brought(
        self, pending: _Pending, sampler: DeviceSampler
    ) -> Iterator[tuple[PooledChunk, NDArray[np.floating]]]:
        """The step's pooled chunks with the hidden states that have come from the device, but for
        those of sequences that have ended meanwhile."""
        for chunk, brought in zip(pending.step.pooled, pending.states, strict=True):
            states = np.empty((0, 0), np.float32)
            if brought is not None:
                states = sampler.collect_rows(brought)
            if chunk.start.seq in self._running.rows:
                yield chunk, states

    def _collect(self, pending: _Pending) -> StepResult:
        with self._interrupting():
            return self._collected(pending)

    def _collected(self, pending: _Pending) -> StepResult:
        pending.mark.wait()
        if (ranks := self._ranks) is not None:
            ranks.check()
        if (sampler := self._sampler) is None:
            return StepResult(step=pending.number, seqs=[], tokens=[])
        if pending.told is not None:
            pending.told.result()
        with self._lock:
            seqs = pending.step.sampled
            tokens: list[int] = []
            logprobs: dict[int, Logprobs] = {}
            failed: dict[int, str] = {}
            if pending.sampled is not None:
                tokens, logprobs, failed = sampler.collect(pending.sampled)
            drafted: dict[int, int] = {}
            further: dict[int, list[Logprobs]] = {}
            if (drafts := self._drafts) is not None:
                if (guesses := pending.guesses) is not None:
                    more, their_tokens, further = drafts.collect(guesses, sampler)
                    seqs, tokens = seqs + more, tokens + their_tokens
                    drafted = guesses.counts
                drafts.follow(pending.number, seqs, tokens)
            failed |= pending.unserved
            prompt_logprobs: dict[int, list[Logprobs]] = {}
            for scored, pieces in zip(pending.step.scored, pending.prompts, strict=True):
                seq = scored.start.seq
                try:
                    rows = [sampler.collect_prompt_logprobs(piece) for piece in pieces]
                except SamplingError as error:
                    failed[seq] = str(error)
                else:
                    prompt_logprobs[seq] = [row for piece in rows for row in piece]
            brought = self._brought(pending, sampler)
            pooled, unpooled = self._pooler.pool(self._model, brought)
        if failed := failed | unpooled:
            kept = [index for index, seq in enumerate(seqs) if seq not in failed]
            seqs, tokens = [seqs[i] for i in kept], [tokens[i] for i in kept]
        now = time.perf_counter()
        began = max(pending.began, self._last_end)
        self._last_end = now
        return StepResult(
            step=pending.number,
            seqs=seqs,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            failed=failed,
            pooled=pooled,
            seconds=now - began,
            drafted=drafted,
            further_logprobs=further,
            refused=refused(failed),
        )


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step on its way."""

    number: int
    step: Step
    sampled: Sampled | None
    told: Future[None] | None  # its tokens, to the first of several stages
    guesses: Guesses | None  # None: the plan had no room for any
    prompts: list[list[PromptScores]]  # a list for each of the step's scored chunks
    states: list[HostRows | None]  # for each of its pooled chunks; None: it needs none
    unserved: dict[int, str]  # sequences that can't go on, and why
    mark: Mark
    began: float


def _tell(sampled: Sampled, ranks: DeviceRanks) -> None:
    """Wait for a step's tokens, and tell the first stage."""
    assert sampled.mark is not None
    sampled.mark.wait()
    ranks.check()
    ranks.tell(sampled.results[0])
