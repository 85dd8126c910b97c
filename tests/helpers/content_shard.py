"""A shard that computes nothing and remembers everything: what each cache slot stands for.

Keys and values at a position depend on all tokens up to it, so a slot's content is modelled by a
fingerprint of that prefix. Before a query runs, every position it may see is looked up through
the block tables the plans built; a block reused, freed or shared wrongly holds something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log
from random import Random

from tensorray.actors.beam_starts import BeamStarts
from tensorray.actors.protocol import (
    KVGroups,
    Logprobs,
    Sampling,
    SequenceStart,
    StepPlan,
    StepResult,
)
from tensorray.cluster.beams import Search
from tensorray.cluster.request import BeamSearch

VOCAB = 50


def fingerprints(tokens: Iterable[int], before: Iterable[int] = ()) -> list[int]:
    """Per position, a number that stands for the tokens up to and including it.

    `before` are those of the tokens that these follow; the result has them too.
    """
    prints = list(before)
    last = prints[-1] if prints else 0
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


def continuations(fingerprint: int, sampling: Sampling, generated: int) -> Logprobs:
    """What a beam's shard reports: the likeliest of the tokens that may follow a prefix."""
    weights = {token: 1 + hash((fingerprint, sampling.seed, token)) % 97 for token in range(VOCAB)}
    total = sum(weights.values())
    if generated < sampling.min_tokens:
        for token in sampling.stop_token_ids:
            weights.pop(token, None)
    tokens = sorted(weights, key=lambda token: (-weights[token], token))[: sampling.logprobs]
    logprobs = [log(weights[token] / total) for token in tokens]
    return Logprobs(tokens[0], logprobs[0], 1, tokens, logprobs)


def search_alone(
    prompt: list[int], sampling: Sampling, rules: BeamSearch, max_tokens: int, n: int
) -> list[tuple[list[int], float]]:
    """What a beam search finds, whatever shares its batch: tokens and scores, best first."""
    stops = frozenset(sampling.stop_token_ids)
    search = Search(rules, max_tokens=max_tokens, stops=stops)
    prints = {search.root: fingerprints(prompt)[-1]}
    while search.beams:
        found = {beam: continuations(prints[beam], sampling, beam.length) for beam in search.beams}
        search.advance(found)
        for beam in search.beams:
            assert beam.parent is not None
            assert beam.entry is not None
            prints[beam] = hash((prints[beam.parent], beam.entry.token))
    return [([entry.token for entry in each.entries], each.score) for each in search.best(n)]


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
    """Executes plans in order, and asserts that each could be executed on a real shard.

    With `luck` it guesses tokens where a plan has room: so many, rightly and wrongly, at random.
    """

    kv: KVGroups
    max_num_seqs: int
    max_num_batched_tokens: int
    states: dict[int, _State] = field(default_factory=dict)
    #: (block, offset) -> (group, fingerprint, step, sequence)
    slots: dict[tuple[int, int], tuple[int, int, int, int]] = field(default_factory=dict)
    next_step: int = 0
    computed_tokens: int = 0
    beams: BeamStarts = field(default_factory=BeamStarts)
    luck: Random | None = None

    def execute(self, plan: StepPlan, fail: Iterable[int] = ()) -> StepResult:
        plan = self.beams.complete(plan)
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

        copied = [self._block(source) for source, _ in plan.copies]
        assert len({target for _, target in plan.copies}) == len(plan.copies)
        for (_, target), held in zip(plan.copies, copied, strict=True):
            for offset, (group, content, _, writer) in held.items():
                self.slots[target, offset] = (group, content, plan.step - 1, writer)

        drafts = {
            seq: self._guess(seq, count)
            for seq, count in zip(plan.seqs, plan.counts, strict=True)
            if self.states[seq].computed + 1 == len(self.states[seq].tokens) and count > 1
        }
        counts = [
            1 + len(drafts[seq]) if seq in drafts else count
            for seq, count in zip(plan.seqs, plan.counts, strict=True)
        ]
        for seq, count in zip(plan.seqs, counts, strict=True):
            self._write(plan.step, seq, count, drafts.get(seq, []))
        for seq, count in zip(plan.seqs, counts, strict=True):
            self._read(plan.step, seq, count, drafts.get(seq, []))

        seqs: list[int] = []
        tokens: list[int] = []
        failed: dict[int, str] = {}
        logprobs: dict[int, Logprobs] = {}
        for seq, count in zip(plan.seqs, counts, strict=True):
            state = self.states[seq]
            self.computed_tokens += count
            state.computed += 1 if seq in drafts else count
            if state.computed < len(state.tokens):
                continue
            if state.start.sampling.beam and seq not in fail:
                generated = len(state.tokens) - state.start.prompt_len
                found = continuations(state.prints[-1], state.start.sampling, generated)
                logprobs[seq] = found
                seqs.append(seq)
                tokens.append(found.token)
                continue
            for guess in [*drafts.get(seq, []), None]:
                sampling = state.start.sampling
                generated = len(state.tokens) - state.start.prompt_len
                token = sample(state.prints[-1], sampling, generated)
                state.tokens.append(token)
                state.prints.append(hash((state.prints[-1], token)))
                if seq in fail:
                    failed[seq] = "broken on purpose"
                    break
                seqs.append(seq)
                tokens.append(token)
                stops = token in sampling.stop_token_ids and generated >= sampling.min_tokens
                if stops or token != guess:
                    break
                state.computed += 1
        drafted = {seq: len(guesses) for seq, guesses in drafts.items()}
        return StepResult(
            step=plan.step,
            seqs=seqs,
            tokens=tokens,
            logprobs=logprobs,
            failed=failed,
            drafted=drafted,
        )

    def _block(self, block: int) -> dict[int, tuple[int, int, int, int]]:
        """What a block holds, by offset."""
        offsets = range(self.kv.block_size)
        return {at: self.slots[block, at] for at in offsets if (block, at) in self.slots}

    def _guess(self, seq: int, count: int) -> list[int]:
        """Up to `count` - 1 tokens that may or may not be what the sequence goes on with."""
        assert self.luck is not None, "room for drafts on a shard that makes none"
        state = self.states[seq]
        generated = len(state.tokens) - state.start.prompt_len
        last, guesses = state.prints[-1], []
        for ahead in range(self.luck.randrange(count)):
            right = sample(last, state.start.sampling, generated + ahead)
            guesses.append(right if self.luck.random() < 0.7 else (right + 1) % VOCAB)
            last = hash((last, guesses[-1]))
        return guesses

    def _write(self, step: int, seq: int, count: int, drafts: list[int]) -> None:
        state = self.states[seq]
        size = self.kv.block_size
        prints = fingerprints(drafts, state.prints)
        assert count >= 1
        assert state.computed + count <= len(prints), "tokens that are not known yet"
        for position in range(state.computed, state.computed + count):
            for group, table in enumerate(state.tables):
                block = table[position // size]
                assert 0 < block < self.kv.num_blocks
                slot = (block, position % size)
                before = self.slots.get(slot)
                assert before is None or before[2] < step, "two writes to a slot in one step"
                self.slots[slot] = (group, prints[position], step, seq)

    def _read(self, step: int, seq: int, count: int, drafts: list[int]) -> None:
        state = self.states[seq]
        prints = fingerprints(drafts, state.prints)
        size = self.kv.block_size
        for group, (table, window) in enumerate(zip(state.tables, self.kv.windows, strict=True)):
            first = 0 if window is None else max(0, state.computed - window + 1)
            for position in range(first, state.computed + count):
                slot = (table[position // size], position % size)
                held_group, held, written, writer = self.slots[slot]
                where = f"sequence {seq}, group {group}, position {position}, slot {slot}"
                assert (held_group, held) == (group, prints[position]), where
                # A plan must not lean on what another sequence computes in the same plan.
                assert written < step or writer == seq, where
