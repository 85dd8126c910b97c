"""Guessed tokens on a GPU: made on the host, run and chosen on the device.

A draft runs as a sequence of one token beside the one it is for, with the same block table, at the
position after it. So a step of decodes and drafts is one of decodes alone for all kernels but
attention, which has to find all of the step's keys appended before any query reads them.

What comes next is chosen in *rounds*: for all sequences, then, where that was the first draft, by
the first draft's logits, and so on. Each round is a step of the sampler's, on the state that the
round before left, so that penalties, seeds and log-probabilities are those of plain decoding. A
sequence whose draft was wrong is left out of the rounds that follow, by the device; the host need
not wait for it. A sequence that is steered by its own tokens on the host (a grammar, rules of its
output, logits processors) has no drafts.

Keys and values of wrong drafts lie behind what the sequence has computed, and are written over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from tensorray.actors.device_sampler import DeviceSampler, Sampled
from tensorray.actors.drafter import Drafter
from tensorray.actors.protocol import Drafting, Logprobs, StepPlan
from tensorray.actors.step_buffers import RunningSequences, Step, StepBuffers

#: The most drafts of a step: more rows than this together cost what they are.
MAX_DRAFTS = 64

_NO_ROW = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Guesses:
    """What a step guesses."""

    asked: list[int]  # the sequences that had room
    tokens: dict[int, list[int]]  # of those that there were guesses for, falling in number

    @property
    def rounds(self) -> list[list[int]]:
        """The drafts of each round but the first, each for the first so many sequences."""
        most = max(map(len, self.tokens.values()), default=0)
        return [
            [tokens[place] for tokens in self.tokens.values() if len(tokens) > place]
            for place in range(most)
        ]


class DeviceDrafts:
    """The drafts of a shard's running sequences, whose tokens it follows."""

    def __init__(self, drafting: Drafting, drafter: Drafter) -> None:
        self.drafting = drafting
        self._drafter = drafter
        self._since: dict[int, int] = {}  # the step in which each that the drafter knows began

    def reset(self) -> None:
        """All sequences are gone."""
        for seq in self._since:
            self._drafter.end(seq)
        self._since = {}

    def take(self, plan: StepPlan, running: RunningSequences) -> tuple[StepPlan, dict[int, int]]:
        """Take in who ends and starts, before `running` does; the plan without room for drafts,
        and that room."""
        for seq in plan.ends:
            if self._since.pop(seq, None) is not None:
                self._drafter.end(seq)
        for start in plan.starts:
            if not (start.sampling.beam or start.pooling):
                self._since[start.seq] = plan.step
                self._drafter.start(start)
        if sum(plan.counts) == len(plan.seqs):
            return plan, {}
        prefilling = running.prefill.keys() | {start.seq for start in plan.starts}
        rooms = {
            seq: count - 1
            for seq, count in zip(plan.seqs, plan.counts, strict=True)
            if count > 1 and seq not in prefilling
        }
        counts = [
            1 if seq in rooms else count for seq, count in zip(plan.seqs, plan.counts, strict=True)
        ]
        return msgspec.structs.replace(plan, counts=counts), rooms

    def guess(self, rooms: dict[int, int], sampler: DeviceSampler) -> Guesses:
        """Guesses for sequences that have room."""
        asked = [seq for seq in rooms if seq in self._since and not sampler.steers(seq)]
        guesses = self._drafter.draft(asked, [rooms[seq] for seq in asked], [], _by_no_model)
        tokens = {}
        left = MAX_DRAFTS
        for seq, guess in zip(asked, guesses, strict=True):
            if guess and left:
                tokens[seq] = guess[:left]
                left -= len(tokens[seq])
        falling = sorted(tokens, key=lambda seq: -len(tokens[seq]))
        return Guesses([*rooms], {seq: tokens[seq] for seq in falling})

    def enqueue(
        self,
        guesses: Guesses,
        step: Step,
        sampler: DeviceSampler,
        buffers: StepBuffers,
        logits: Any,
    ) -> list[Sampled]:
        """Queue all rounds but the first, which is queued."""
        row, packed = len(step.sampled), step.tokens - step.drafts
        rounds = []
        for drafts in guesses.rounds:
            count = len(drafts)
            rounds.append(
                sampler.enqueue_next(
                    step.sampled[:count],
                    buffers.sample_rows[row : row + count],
                    buffers.tokens[packed : packed + count],
                    logits[row : row + count],
                )
            )
            row, packed = row + count, packed + count
        return rounds

    def collect(
        self, rounds: Sequence[Sampled], sampler: DeviceSampler
    ) -> tuple[list[int], list[int], dict[int, list[Logprobs]]]:
        """Wait for these rounds: the tokens they brought, with their sequences, and those tokens'
        log-probabilities. (Where nothing could be chosen, the next step will find out.)"""
        seqs: list[int] = []
        tokens: list[int] = []
        logprobs: dict[int, list[Logprobs]] = {}
        for sampled in rounds:
            chosen, found, _ = sampler.collect(sampled)
            for seq, token in zip(sampled.seqs, chosen, strict=True):
                if token >= 0:
                    seqs.append(seq)
                    tokens.append(token)
                    if seq in found:
                        logprobs.setdefault(seq, []).append(found[seq])
        return seqs, tokens, logprobs

    def follow(
        self, step: int, seqs: Sequence[int], tokens: Sequence[int], running: RunningSequences
    ) -> None:
        """Take in what a step's sequences chose, each in order. What one chose after its first
        token were right drafts, so their keys and values count from now on."""
        gained: dict[int, list[int]] = {}
        for seq, token in zip(seqs, tokens, strict=True):
            if token >= 0 and self._since.get(seq, step + 1) <= step:
                gained.setdefault(seq, []).append(token)
        for seq, new in gained.items():
            running.computed[running.rows[seq]] += len(new) - 1
            self._drafter.gained(seq, new, _NO_ROW)


def with_drafts(step: Step, guesses: Guesses, running: RunningSequences) -> Step:
    """A step that runs its guesses along, behind all else, a round's beside each other. Sequences
    that sample come in the order of the guesses, others after them."""
    rank = {seq: place for place, seq in enumerate(guesses.tokens)}
    order = sorted(range(len(step.sampled)), key=lambda i: rank.get(step.sampled[i], len(rank)))
    sample_rows = step.sample_rows[order]
    rows, logit_rows, given = step.rows, step.logit_rows[order], step.given
    lens = step.lens
    if step.is_decode:  # as it is to stay: each row of logits is that of the token beside it
        rows, lens, logit_rows = rows[order], lens[order], step.logit_rows
    if given is None:
        given = np.full(step.tokens, -1, np.int32)
    rounds = guesses.rounds
    drafts = np.array([token for tokens in rounds for token in tokens], np.int32)
    count = len(drafts)
    owners = np.concatenate([sample_rows[: len(tokens)] for tokens in rounds])
    ahead = np.repeat(np.arange(1, len(rounds) + 1), [len(tokens) for tokens in rounds])
    packed = np.arange(step.tokens, step.tokens + count, dtype=np.int32)
    return replace(
        step,
        tokens=step.tokens + count,
        sequences=step.sequences + count,
        rows=np.concatenate([rows, owners]),
        counts=np.concatenate([step.counts, np.ones(count, np.int32)]),
        lens=np.concatenate([lens, (running.computed[owners] + ahead).astype(np.int32)]),
        given=np.concatenate([given, drafts]),
        sampled=[step.sampled[i] for i in order],
        logit_rows=np.concatenate([logit_rows, packed]),
        sample_rows=np.concatenate([sample_rows, owners]),
        drafts=count,
    )


def _by_no_model(seq: int, ahead: int, row: Any) -> int:
    raise AssertionError("prompt lookup has no logits to draw from")
