"""One shard: one device's share of a model, and the steps it runs.

A shard owns its weights, its paged KV cache, the state of the sequences that run, and the
sampler. `execute` runs one step plan: any mix of prefill chunks and decodes, their tokens packed
end to end, through the definition's embed, layers and head, then one draw a sequence.

Where a replica has several shards, all of them get every plan and keep the same books. Each runs
its stage's layers on its part of the weights; one of them samples, and tells the tokens to those
that embed them (ranks.py).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tensorray.actors.adapter import Adapter, AdapterSource
from tensorray.actors.adapters import AdapterOps, ShardAdapters
from tensorray.actors.beam_starts import BeamStarts
from tensorray.actors.communicator import Communicator
from tensorray.actors.config import DEFAULT_STEP_TOKENS, ShardConfig
from tensorray.actors.drafters import OpenSpeculation
from tensorray.actors.guidance import Guidance, Vocabulary
from tensorray.actors.kv_cache import KVCache, choose_num_blocks, plan_stage
from tensorray.actors.link import PendingStep
from tensorray.actors.logits_processors import Registry, load_registry
from tensorray.actors.memory import available_bytes
from tensorray.actors.pooling import PooledChunk, Pooler
from tensorray.actors.protocol import (
    Logprobs,
    SequenceStart,
    ShardInfo,
    StepPlan,
    StepResult,
)
from tensorray.actors.ranks import Ranks
from tensorray.actors.sampler import Sampler, SamplingError, refused
from tensorray.actors.speculation import Speculation, pad, rows_up_to, unpad
from tensorray.builder.array_ops import ArrayOps
from tensorray.builder.load import load_weights, plan_bytes
from tensorray.builder.model import Model, ShardWeights
from tensorray.builder.registry import resolve
from tensorray.kernels import set_num_threads
from tensorray.kernels.batch import Batch

logger = logging.getLogger(__name__)

# Logits of prompt rows are made this many rows at a time: a whole chunk of a large vocabulary
# would take gigabytes.
_PROMPT_LOGIT_ROWS = 16


@dataclass(slots=True)
class _Prefill:
    """A sequence whose known tokens are not all computed yet."""

    tokens: Any  # int32, those that were not computed at its start
    start: SequenceStart


@dataclass(slots=True)
class _Drawn:
    """What a step's sequences chose, as StepResult has it; a token of -1 is none."""

    seqs: list[int]
    tokens: list[int]
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    further_logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)


class SequenceTable:
    """The running sequences' state in rows, so that a batch of decodes is gathered, not looped.

    Rows are reused; `rows` maps a sequence's id to its row.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, groups: int) -> None:
        self.rows: dict[int, int] = {}
        self.computed = np.zeros(max_num_seqs, np.int32)  # tokens whose KV is in the cache
        self.last_token = np.zeros(max_num_seqs, np.int32)
        self.unheard = np.zeros(max_num_seqs, np.int32)  # tokens sampled elsewhere, not heard of
        self.blocks = np.zeros((groups, max_num_seqs), np.int32)  # entries used of each table
        # A pipelined step may run one token past the last one that counts.
        width = -(-(max_model_len + 1) // block_size)
        self.tables = [np.zeros((max_num_seqs, width), np.int32) for _ in range(groups)]
        self.prefill: dict[int, _Prefill] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def start(self, start: SequenceStart) -> None:
        row = self.rows[start.seq] = self._free.pop()
        self.computed[row] = start.computed
        self.blocks[:, row] = 0
        rest = np.array(start.tokens[start.computed :], np.int32)
        self.prefill[start.seq] = _Prefill(rest, start)
        self.append_blocks(start.seq, start.blocks)

    def append_blocks(self, seq: int, blocks: list[list[int]]) -> None:
        row = self.rows[seq]
        for group, ids in enumerate(blocks):
            if ids:
                used = self.blocks[group, row]
                self.tables[group][row, used : used + len(ids)] = ids
                self.blocks[group, row] = used + len(ids)

    def end(self, seq: int) -> None:
        self._free.append(self.rows.pop(seq))
        self.prefill.pop(seq, None)


class Shard:
    """A model, or its layout's share of one, on one CPU, executed by the array interpreter."""

    def __init__(
        self,
        model: Model,
        weights: ShardWeights,
        cache: KVCache,
        *,
        max_model_len: int,
        max_num_seqs: int,
        weight_bytes: int,
        load_seconds: float,
        device: str = "cpu",
        step_tokens: int = DEFAULT_STEP_TOKENS,
        vocabulary: Callable[[], Vocabulary] | None = None,
        processors: Registry | None = None,
        adapters: ShardAdapters | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """`vocabulary` is asked when a sequence first has a grammar; without it such ones fail.
        `processors` are the logits processors that sequences may name, `adapters` the LoRA
        adapters. With `speculation` plans may leave room for drafts."""
        self.info = ShardInfo(
            kv=cache.groups,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            device=device,
            weight_bytes=weight_bytes,
            kv_cache_bytes=cache.nbytes,
            load_seconds=load_seconds,
            step_tokens=step_tokens,
            depth=model.layout.pp_size,
            answers=model.layout.rank == model.layout.sampler,
            drafting=None if speculation is None else speculation.drafting,
        )
        self._speculation = speculation
        self._model = model
        self._weights = weights
        self._cache = cache
        self._adapters = adapters
        self._ops = ArrayOps(np, cache.layers, max_positions=max_model_len + 1)
        if adapters is not None:
            self._ops = AdapterOps(adapters, np, cache.layers, max_positions=max_model_len + 1)
        self._max_num_seqs = max_num_seqs
        self._ranks: Ranks | None = None
        self._processors = processors or {}
        self.guidance: Guidance | None = None
        if vocabulary is not None and self.info.answers:
            self.guidance = Guidance(vocabulary, model.vocab_size)
        self.reset()

    @classmethod
    def load(cls, config: ShardConfig) -> Shard:
        """Open the checkpoint, check it against its definition, load it, size the KV cache.

        Raises CheckpointError, ModelConfigError or KVCacheError, each saying what to change.
        """
        began = time.perf_counter()
        if config.dtype not in ("auto", "float32"):
            raise ValueError(f"--dtype {config.dtype}: a CPU computes in float32")
        if config.kv_cache_dtype != "auto":
            raise ValueError(
                f"--kv-cache-dtype {config.kv_cache_dtype}: a CPU's KV cache is float32"
            )
        processors = load_registry(config.logits_processors)
        set_num_threads(config.num_threads)
        step_tokens = config.step_tokens(DEFAULT_STEP_TOKENS)
        checkpoint = config.open()
        try:
            layout = config.layout
            model = resolve(checkpoint.config, config.model_class)(checkpoint.config, layout)
            max_model_len = config.max_model_len or model.max_positions
            if max_model_len > model.max_positions:
                raise ValueError(
                    f"--max-model-len {max_model_len} is more than the {model.max_positions} "
                    "positions the model was made for"
                )
            groups, layers = plan_stage(model, config.block_size)
            weights = load_weights(model, checkpoint, layers=layers, dtype=np.float32)
        finally:
            checkpoint.close()
        adapters = None
        if config.enable_lora:
            source = AdapterSource(config.hf_token, config.download_dir, config.offline)
            adapters = ShardAdapters(
                model, weights, layers, source=source, max_rank=config.max_lora_rank
            )
        itemsize = np.dtype(np.float32).itemsize
        opened, share = None, 1.0
        if config.speculative_config is not None:
            opened = OpenSpeculation(config, model, weights)
            share = opened.share(groups.block_bytes(itemsize))
        num_blocks = choose_num_blocks(
            groups,
            itemsize,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            step_tokens=step_tokens,
            # Shards of one replica may all be on this machine.
            available=int(available_bytes() * share) // (2 * layout.size),
            cache_bytes=config.kv_cache_memory_bytes and int(config.kv_cache_memory_bytes * share),
            num_blocks=config.num_kv_blocks,
        )
        cache = KVCache(groups, num_blocks, np, np.float32)
        return cls(
            model,
            weights,
            cache,
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            weight_bytes=plan_bytes(model, layers=layers),
            load_seconds=time.perf_counter() - began,
            step_tokens=step_tokens,
            vocabulary=config.vocabulary,
            processors=processors,
            adapters=adapters,
            speculation=None
            if opened is None
            else opened.close(cache.groups, max_model_len, step_tokens),
        )

    # --- what its door asks: see kv_door.Pages ---

    @property
    def page_layout(self) -> str:
        return self._cache.page_layout

    @property
    def block_bytes(self) -> int:
        return self._cache.block_bytes

    def runs(self, seq: int) -> bool:
        return seq in self._table.rows

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = self._cache.read_blocks(blocks).reshape(-1).view(np.uint8)
        return found

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        self._cache.write_blocks(blocks, data)

    # --- and its replica ---

    def add_adapter(self, adapter: Adapter) -> None:
        if self._adapters is None:
            raise ValueError("adapters need --enable-lora")
        self._adapters.load(adapter)

    def remove_adapter(self, id: int) -> None:
        if self._adapters is not None:
            self._adapters.unload(id)

    def adapters(self) -> list[Adapter]:
        return [] if self._adapters is None else self._adapters.loaded()

    def join(self, world: Communicator, num_blocks: int) -> None:
        if num_blocks != self.info.kv.num_blocks:
            self._cache.resize(num_blocks)
            self._ops.kv = self._cache.layers
            self.info = msgspec.structs.replace(
                self.info, kv=self._cache.groups, kv_cache_bytes=self._cache.nbytes
            )
        self._ranks = Ranks(self._model.layout, world) if world.size > 1 else None
        self._ops.ranks = None if self._ranks is None else self._ranks.tp
        self._forget()

    def interrupt(self, reason: str) -> None:
        if self._ranks is not None:
            self._ranks.abort(reason)

    def reset(self) -> None:
        self.interrupt("its router is gone")
        self._forget()

    def _forget(self) -> None:
        if self._adapters is not None:
            self._adapters.forget_sequences()
        # Of the steps whose tokens are to come: rows, and the most tokens of each if not one.
        self._unheard: deque[tuple[np.ndarray, list[int] | None]] = deque()
        if self._speculation is not None:
            self._speculation.reset(self.info.kv.num_blocks)
        self._table = SequenceTable(
            self._max_num_seqs,
            self.info.max_model_len,
            self.info.kv.block_size,
            len(self.info.kv.windows),
        )
        self._beams = BeamStarts()
        self._sampler = Sampler(self._model.vocab_size, self.guidance, self._processors)
        self._pooler = Pooler()

    def close(self) -> None:
        pass

    def submit(self, plan: StepPlan) -> PendingStep:
        return partial(self.execute, plan)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises KeyError or IndexError on a plan that contradicts the books, and
        CommunicatorError when another shard of the replica is lost."""
        try:
            return self._execute(plan)
        except Exception as error:
            self.interrupt(f"{type(error).__name__}: {error}")
            raise

    def _execute(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        if self.guidance is not None:
            self.guidance.step()
        plan = self._beams.complete(plan)
        table, sampler, speculation = self._table, self._sampler, self._speculation
        if speculation is not None:
            self._hear_all()
            speculation.take(plan.ends, plan.starts)
        for seq in plan.ends:
            table.end(seq)
            sampler.end(seq)
            self._pooler.end(seq)
        for start in plan.starts:
            table.start(start)
            sampler.start(start)
        if self._adapters is not None:
            self._adapters.take(plan)
        for seq, blocks in plan.new_blocks.items():
            table.append_blocks(seq, blocks)
        if plan.copies:
            self._cache.copy_blocks(np.array(plan.copies))
        if not plan.seqs:
            return StepResult(step=plan.step, seqs=[], tokens=[])

        rows = np.array([table.rows[seq] for seq in plan.seqs], np.int32)
        counts = np.array(plan.counts, np.int32)
        self._hear(rows)
        drafts: dict[int, list[int]] = {}
        if speculation is not None:
            drafts = speculation.draft(plan.seqs, counts, table, self._ranks, sampler.guess)
        batch, sampling, scored, chunks = self._pack(plan.seqs, rows, counts, drafts)
        if self._adapters is not None:
            self._adapters.select(plan.seqs, batch.query_starts)
        watched: dict[int, Any] = {}
        if speculation is not None:
            watched = dict.fromkeys(speculation.watches)
        hidden = self._forward(batch, watched)
        table.computed[rows] += counts
        seqs = [plan.seqs[index] for index in sampling]
        for seq in [*seqs, *(chunk.start.seq for chunk in chunks if chunk.completes)]:
            table.prefill.pop(seq, None)
        logits: Any = None
        prompt_logprobs: dict[int, list[Logprobs]] = {}
        unscored: dict[int, str] = {}
        pooled: dict[int, bytes] = {}
        unpooled: dict[int, str] = {}
        if self._model.layout.is_last:
            prompt_logprobs, unscored = self._score_prompts(batch, hidden, scored)
            if self._adapters is not None:
                unscored |= self._adapters.missing(plan.seqs)
            if chunks and self.info.answers:
                states = self._states(batch, hidden, chunks)
                pooled, unpooled = self._pooler.pool(self._model, states)
            batch.logit_rows = batch.query_starts[1:][sampling] - 1
            if drafts:
                batch.logit_rows = rows_up_to(batch.logit_rows, [drafts.get(s, ()) for s in seqs])
            if seqs:
                logits = self._logits(batch, hidden)
        widths = [1 + len(drafts.get(seq, ())) for seq in seqs] if drafts else None
        if not self.info.answers:
            if seqs and self._model.layout.is_first:
                self._unheard.append((rows[sampling], widths))
                table.unheard[rows[sampling]] += 1
            return StepResult(step=plan.step, seqs=[], tokens=[])

        drawn = _Drawn([], [])
        if widths is not None:
            drawn = self._verify(seqs, rows[sampling], drafts, widths, logits)
        elif seqs:
            drawn = self._sample(seqs, rows[sampling], logits)
        gained: dict[int, list[int]] = {}
        if speculation is not None and seqs:
            ends = batch.logit_rows if widths is None else batch.logit_rows[np.cumsum(widths) - 1]
            gained = speculation.take_tokens(seqs, drawn.seqs, drawn.tokens, widths, hidden, ends)
        if speculation is not None and watched:
            speculation.watch(plan.seqs, batch, drafts, gained, table, watched)
        seqs, tokens = drawn.seqs, drawn.tokens
        if failed := drawn.failed | unscored | unpooled:
            kept = [index for index, seq in enumerate(seqs) if seq not in failed]
            seqs, tokens = [seqs[i] for i in kept], [tokens[i] for i in kept]
        return StepResult(
            step=plan.step,
            seqs=seqs,
            tokens=tokens,
            logprobs=drawn.logprobs,
            prompt_logprobs=prompt_logprobs,
            failed=failed,
            pooled=pooled,
            seconds=time.perf_counter() - began,
            drafted={seq: len(draft) for seq, draft in drafts.items()},
            further_logprobs=drawn.further_logprobs,
            refused=refused(failed),
        )

    def _sample(self, seqs: list[int], rows: np.ndarray, logits: Any) -> _Drawn:
        """A token for each sequence, told to the ranks that run it next."""
        tokens, logprobs, failed = self._sampler.sample(seqs, logits)
        self._table.last_token[rows] = tokens
        if self._ranks is not None:
            self._ranks.tell(np.array(tokens, np.int32))
        return _Drawn(seqs, tokens, logprobs, failed)

    def _verify(
        self,
        seqs: list[int],
        rows: np.ndarray,
        drafts: dict[int, list[int]],
        widths: list[int],
        logits: Any,
    ) -> _Drawn:
        """As many tokens for each sequence as its drafts were right, and one more."""
        guesses = [drafts.get(seq, []) for seq in seqs]
        chosen, logprobs, failed = self._sampler.verify(seqs, guesses, logits)
        self._advance(rows, widths, chosen)
        if self._ranks is not None:
            self._ranks.tell(pad(chosen, widths))
        return _Drawn(
            [seq for seq, tokens in zip(seqs, chosen, strict=True) for _ in tokens],
            [token for tokens in chosen for token in tokens],
            {seq: entries[0] for seq, entries in logprobs.items()},
            failed,
            {seq: entries[1:] for seq, entries in logprobs.items() if len(entries) > 1},
        )

    def _advance(self, rows: np.ndarray, widths: list[int], chosen: list[list[int]]) -> None:
        """After a step of drafts: of `widths[i]` tokens that ran, those before `chosen[i]`'s last
        were right."""
        table = self._table
        table.computed[rows] -= np.array(widths) - [max(len(tokens), 1) for tokens in chosen]
        table.last_token[rows] = [tokens[-1] if tokens else -1 for tokens in chosen]

    def _pack(
        self,
        seqs: list[int],
        rows: np.ndarray,
        counts: np.ndarray,
        drafts: dict[int, list[int]],
    ) -> tuple[Batch, np.ndarray, list[tuple[int, _Prefill, int, int]], list[PooledChunk]]:
        """The step's batch; which of its sequences sample; the prefill chunks whose rows are
        scored for prompt logprobs, as (first packed row, sequence, first position, count); and
        those of pooled sequences."""
        table = self._table
        first = table.computed[rows]
        query_starts = np.zeros(len(seqs) + 1, np.int32)
        np.cumsum(counts, out=query_starts[1:])
        total = int(query_starts[-1])
        owner = np.repeat(np.arange(len(seqs), dtype=np.int32), counts)
        positions = np.arange(total, dtype=np.int32) - query_starts[owner] + first[owner]

        tokens = table.last_token[rows][owner]
        samples = np.ones(len(seqs), bool)
        scored = []
        pooled = []
        if drafts:
            for index, seq in enumerate(seqs):
                if draft := drafts.get(seq):
                    tokens[query_starts[index] + 1 : query_starts[index + 1]] = draft
        if table.prefill:
            for index, seq in enumerate(seqs):
                prefill = table.prefill.get(seq)
                if prefill is None:
                    continue
                begin, count = int(first[index]), int(counts[index])
                packed = int(query_starts[index])
                done = begin - prefill.start.computed
                tokens[packed : packed + count] = prefill.tokens[done : done + count]
                samples[index] = done + count == len(prefill.tokens)
                if prefill.start.pooling:
                    samples[index] = False
                    pooled.append(PooledChunk(packed, begin, count, prefill.start))
                if prefill.start.sampling.prompt_logprobs is not None:
                    scored.append((packed, prefill, begin, count))

        seq_lens = first + counts
        block_size = self.info.kv.block_size
        used = -(-int(seq_lens.max()) // block_size)
        block_of, offset = np.divmod(positions, block_size)
        tables, slots = [], []
        for group_table in table.tables:
            step_table = group_table[rows, :used]
            tables.append(step_table)
            slots.append(step_table[owner, block_of].astype(np.int64) * block_size + offset)
        batch = Batch(
            tokens=tokens,
            positions=positions,
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_tables=tables,
            slots=slots,
            logit_rows=np.zeros(0, np.int32),
        )
        return batch, np.flatnonzero(samples), scored, pooled

    def _hear(self, rows: np.ndarray) -> None:
        """Take in the tokens that these rows go on from, and any that have come by now."""
        while self._unheard and (
            len(self._unheard) > self._model.layout.pp_size or self._table.unheard[rows].any()
        ):
            self._hear_next()

    def _hear_all(self) -> None:
        while self._unheard:
            self._hear_next()

    def _hear_next(self) -> None:
        table, ranks = self._table, self._ranks
        assert ranks is not None
        told, widths = self._unheard.popleft()
        if widths is None:
            table.last_token[told] = ranks.hear(len(told))
        else:
            self._advance(told, widths, unpad(ranks.hear(sum(widths)), widths))
        table.unheard[told] -= 1

    def _forward(self, batch: Batch, watched: dict[int, Any]) -> Any:
        """The residual stream after the stage's last layer, `[T, hidden]`. Where `watched` has a
        layer's index, it gets what the layer reads."""
        ops, model, weights, ranks = self._ops, self._model, self._weights, self._ranks
        ops.batch = batch
        if model.layout.is_first:
            hidden = model.embed(ops, weights.embed, batch.tokens)
        else:
            assert ranks is not None
            hidden = ranks.receive(np.empty((len(batch.tokens), model.hidden_size), np.float32))
        for layer, layer_weights in weights.layers.items():
            if layer in watched:
                watched[layer] = hidden
            hidden = model.layer(ops, layer_weights, hidden, layer)
        if model.num_layers in watched:
            watched[model.num_layers] = hidden
        if not model.layout.is_last:
            assert ranks is not None
            ranks.pass_on(hidden)
        return hidden

    def _logits(self, batch: Batch, hidden: Any) -> Any:
        """float32 `[R, vocab]` for the batch's logit rows."""
        return self._model.head(self._ops, self._weights.head, self._ops.select_rows(hidden))

    def _states(
        self, batch: Batch, hidden: Any, chunks: list[PooledChunk]
    ) -> Iterator[tuple[PooledChunk, NDArray[np.floating]]]:
        """Pooled chunks with the hidden states that they are made of."""
        for chunk in chunks:
            batch.logit_rows = np.array(chunk.rows, np.int32)
            states = self._ops.select_rows(hidden)
            if len(states):
                states = self._model.final_norm(self._ops, self._weights.head, states)
            yield chunk, states

    def _score_prompts(
        self, batch: Batch, hidden: Any, scored: list[tuple[int, _Prefill, int, int]]
    ) -> tuple[dict[int, list[Logprobs]], dict[int, str]]:
        """Log-probabilities of prompt tokens 1.. whose predecessors ran in this step, and the
        sequences that have none, with the reason."""
        found: dict[int, list[Logprobs]] = {}
        failed: dict[int, str] = {}
        for packed, prefill, begin, count in scored:
            start = prefill.start
            top = start.sampling.prompt_logprobs or 0
            count = min(count, start.prompt_len - 1 - begin)
            entries: list[Logprobs] = []
            for done in range(0, count, _PROMPT_LOGIT_ROWS):
                rows = np.arange(done, min(done + _PROMPT_LOGIT_ROWS, count), dtype=np.int32)
                batch.logit_rows = packed + rows
                targets = start.tokens[begin + done + 1 : begin + done + 1 + len(rows)]
                # On every rank of the stage, whatever becomes of them here.
                logits = self._logits(batch, hidden)
                if not self.info.answers or start.seq in failed:
                    continue
                try:
                    entries += self._sampler.prompt_logprobs(targets, logits, top)
                except SamplingError as error:
                    failed[start.seq] = str(error)
            if start.seq not in failed:
                found[start.seq] = entries
        return found, failed
