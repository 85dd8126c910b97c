"""A device that computes nothing: it keeps a shard's books and answers after a fixed time.

With it everything but the model can be measured and tested: scheduler, links, router, service.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from functools import partial

import msgspec

from tensorray.actors.adapter import Adapter
from tensorray.actors.beam_starts import BeamStarts
from tensorray.actors.communicator import Communicator
from tensorray.actors.config import DEFAULT_STEP_TOKENS, ShardConfig
from tensorray.actors.kv_cache import plan_groups
from tensorray.actors.link import PendingStep
from tensorray.actors.protocol import (
    KVGroups,
    Logprobs,
    SequenceStart,
    ShardInfo,
    StepPlan,
    StepResult,
)
from tensorray.builder.checkpoint import open_files
from tensorray.builder.model import stage_layers
from tensorray.builder.registry import resolve


@dataclass
class _State:
    start: SequenceStart
    known: int  # tokens whose ids are known: prompt and samples
    computed: int  # tokens run so far


class NullShard:
    """Samples a pseudo-random token, fixed by seed and position, never one that would stop.

    Raises ValueError on a plan that contradicts its books, so it checks the router as well.
    """

    def __init__(self, info: ShardInfo, step_ms: float = 0.0, hidden_size: int = 8) -> None:
        self.info = info
        self._hidden_size = hidden_size
        self._seconds = step_ms / 1e3
        self._states: dict[int, _State] = {}
        self._beams = BeamStarts()
        self._adapters: dict[int, Adapter] = {}

    @classmethod
    def from_config(cls, config: ShardConfig) -> NullShard:
        """Takes vocabulary and context length from the model's config; reads no weights."""
        if config.speculative_config is not None:
            raise ValueError("--speculative-config: the null device has nothing to check drafts by")
        found = open_files(
            config.model,
            load_format=config.load_format,
            revision=config.revision,
            token=config.hf_token,
            cache_dir=config.download_dir,
            offline=config.offline,
            hf_overrides=config.hf_overrides,
        )
        layout = config.layout
        model = resolve(found.config, config.model_class)(found.config, layout)
        max_model_len = config.max_model_len or model.max_positions
        specs = [model.kv_spec(layer) for layer in range(model.num_layers)]
        stages = [stage_layers(model.num_layers, layout.pp_size, i) for i in range(layout.pp_size)]
        groups = plan_groups(specs, config.block_size, stages, layout.pp_rank)
        step_tokens = config.step_tokens(DEFAULT_STEP_TOKENS)
        one_sequence = groups.blocks_for(max_model_len, step_tokens)
        num_blocks = config.num_kv_blocks or 1 + config.max_num_seqs * one_sequence
        info = ShardInfo(
            kv=KVGroups(groups.windows, num_blocks, config.block_size),
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            device="null",
            weight_bytes=0,
            kv_cache_bytes=0,
            load_seconds=0.0,
            step_tokens=step_tokens,
            depth=layout.pp_size,
            answers=layout.rank == layout.sampler,
        )
        return cls(info, config.null_step_ms, model.hidden_size)

    def submit(self, plan: StepPlan) -> PendingStep:
        return partial(self.execute, plan)

    def execute(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        plan = self._beams.complete(plan)
        for seq in plan.ends:
            del self._states[seq]
        for start in plan.starts:
            if start.seq in self._states:
                raise ValueError(f"sequence {start.seq} started twice")
            if start.adapter and start.adapter not in self._adapters:
                raise ValueError(f"sequence {start.seq} started with an adapter that is not here")
            self._states[start.seq] = _State(start, len(start.tokens), start.computed)
        seqs: list[int] = []
        tokens: list[int] = []
        logprobs: dict[int, Logprobs] = {}
        prompt_logprobs: dict[int, list[Logprobs]] = {}
        pooled: dict[int, bytes] = {}
        vocab = self.info.vocab_size
        for seq, count in zip(plan.seqs, plan.counts, strict=True):
            state = self._states[seq]
            sampling = state.start.sampling
            if count < 1 or state.computed + count > state.known:
                raise ValueError(
                    f"sequence {seq}: {count} tokens asked, {state.known - state.computed} known"
                )
            if sampling.prompt_logprobs is not None:
                last = min(state.computed + count, state.start.prompt_len - 1)
                scored = state.start.tokens[state.computed + 1 : last + 1]
                prompt_logprobs[seq] = [Logprobs(token, 0.0, 1, [], []) for token in scored]
            state.computed += count
            if state.start.pooling:
                if state.computed == state.known:
                    pooled[seq] = struct.pack("<f", state.known) * self._hidden_size
            elif state.computed == state.known:
                token = (sampling.seed * 31 + state.known * 7919) % vocab
                while token in sampling.stop_token_ids:
                    token = (token + 1) % vocab
                state.known += 1
                seqs.append(seq)
                tokens.append(token)
                if sampling.logprobs is not None:
                    count = sampling.logprobs if sampling.beam else 1
                    best = [(token + i) % vocab for i in range(count)]
                    logprobs[seq] = Logprobs(token, 0.0, 1, best, [float(-i) for i in range(count)])
        left = self._seconds - (time.perf_counter() - began)
        if left > 0:
            time.sleep(left)
        return StepResult(
            step=plan.step,
            seqs=seqs,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
            seconds=time.perf_counter() - began,
        )

    def add_adapter(self, adapter: Adapter) -> None:
        self._adapters[adapter.id] = adapter

    def remove_adapter(self, id: int) -> None:
        self._adapters.pop(id, None)

    def adapters(self) -> list[Adapter]:
        return list(self._adapters.values())

    def join(self, world: Communicator, num_blocks: int) -> None:
        kv = msgspec.structs.replace(self.info.kv, num_blocks=num_blocks)
        self.info = msgspec.structs.replace(self.info, kv=kv)
        self.reset()

    def interrupt(self, reason: str) -> None:
        pass  # it waits for nobody

    def reset(self) -> None:
        self._states.clear()
        self._beams = BeamStarts()

    def close(self) -> None:
        pass
