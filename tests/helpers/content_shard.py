"""A shard that computes nothing and remembers everything: what each cache slot stands for.

Keys and values at a position depend on all tokens up to it, so a slot's content is modelled by a
fingerprint of that prefix. Before a query runs, every position it may see is looked up through
the block tables the plans built; a block reused, freed or shared wrongly holds something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tensorray.actors.protocol import KVGroups, Sampling, SequenceStart, StepPlan, StepResult

VOCAB = 50


def fingerprints(tokens: Iterable[int]) -> list[int]:
    """Per position, a number that stands for the tokens up to and including it."""
    prints: list[int] = []
    last = 0
    for token in tokens:
        last = hash((last, token))
        prints.append(last)
    return prints


def sample(fingerprint: int, sampling: Sampling, generated: int) -> int:
    """The token that follows a prefix; not a stop token before `min_tokens`."""
    token = hash((fingerprint, sampling.seed)) % VOCAB
    while generated < sampling.min_tokens and token in sampling.stop_token_ids:
        token = (token + 1) % VOCAB
    return token


def generate_alone(prompt: list[int], sampling: Sampling, max_tokens: int) -> list[int]:
    """What a sequence generates, whatever shares its batch."""
    tokens = list(prompt)
    last = fingerprints(prompt)[-1]
    for generated in range(max_tokens):
        token = sample(last, sampling, generated)
        tokens.append(token)
        last = hash((last, token))
        if token in sampling.stop_token_ids and generated >= sampling.min_tokens:
            break
    return tokens[len(prompt) :]


@dataclass
class _State:
    start: SequenceStart
    tokens: list[int]
    prints: list[int]
    computed: int
    tables: list[list[int]]


@dataclass
class ContentShard:
    """Executes plans in order, and asserts that each could be executed on a real shard."""

    kv: KVGroups
    max_num_seqs: int
    max_num_batched_tokens: int
    states: dict[int, _State] = field(default_factory=dict)
    #: (block, offset) -> (group, fingerprint, step, sequence)
    slots: dict[tuple[int, int], tuple[int, int, int, int]] = field(default_factory=dict)
    next_step: int = 0
    computed_tokens: int = 0

    def execute(self, plan: StepPlan, fail: Iterable[int] = ()) -> StepResult:
        assert plan.step == self.next_step
        self.next_step += 1
        assert plan.seqs, "a plan that runs nothing"
        assert len(set(plan.seqs)) == len(plan.seqs) == len(plan.counts)
        assert sum(plan.counts) <= self.max_num_batched_tokens
        for seq in plan.ends:
            del self.states[seq]
        for start in plan.starts:
            assert start.seq not in self.states
            assert start.seq in plan.seqs
            self.states[start.seq] = _State(
                start,
                list(start.tokens),
                fingerprints(start.tokens),
                start.computed,
                [list(table) for table in start.blocks],
            )
        assert len(self.states) <= self.max_num_seqs
        for seq, added in plan.new_blocks.items():
            for table, blocks in zip(self.states[seq].tables, added, strict=True):
                table += blocks

        for seq, count in zip(plan.seqs, plan.counts, strict=True):
            self._write(plan.step, seq, count)
        for seq, count in zip(plan.seqs, plan.counts, strict=True):
            self._read(plan.step, seq, count)

        seqs: list[int] = []
        tokens: list[int] = []
        failed: dict[int, str] = {}
        for seq, count in zip(plan.seqs, plan.counts, strict=True):
            state = self.states[seq]
            state.computed += count
            self.computed_tokens += count
            if state.computed < len(state.tokens):
                continue
            generated = len(state.tokens) - state.start.prompt_len
            token = sample(state.prints[-1], state.start.sampling, generated)
            state.tokens.append(token)
            state.prints.append(hash((state.prints[-1], token)))
            if seq in fail:
                failed[seq] = "broken on purpose"
            else:
                seqs.append(seq)
                tokens.append(token)
        return StepResult(step=plan.step, seqs=seqs, tokens=tokens, failed=failed)

    def _write(self, step: int, seq: int, count: int) -> None:
        state = self.states[seq]
        size = self.kv.block_size
        assert count >= 1
        assert state.computed + count <= len(state.tokens), "tokens that are not known yet"
        for position in range(state.computed, state.computed + count):
            for group, table in enumerate(state.tables):
                block = table[position // size]
                assert 0 < block < self.kv.num_blocks
                slot = (block, position % size)
                before = self.slots.get(slot)
                assert before is None or before[2] < step, "two writes to a slot in one step"
                self.slots[slot] = (group, state.prints[position], step, seq)

    def _read(self, step: int, seq: int, count: int) -> None:
        state = self.states[seq]
        size = self.kv.block_size
        for group, (table, window) in enumerate(zip(state.tables, self.kv.windows, strict=True)):
            first = 0 if window is None else max(0, state.computed - window + 1)
            for position in range(first, state.computed + count):
                slot = (table[position // size], position % size)
                held_group, held, written, writer = self.slots[slot]
                where = f"sequence {seq}, group {group}, position {position}, slot {slot}"
                assert (held_group, held) == (group, state.prints[position]), where
                # A plan must not lean on what another sequence computes in the same plan.
                assert written < step or writer == seq, where
