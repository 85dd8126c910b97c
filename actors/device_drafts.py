"""Guessed tokens on a GPU: looked up on the host or made on the device (device_drafter.py), run and
chosen there.

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

Of tensor-parallel ranks the one that samples guesses. It alone reads tokens, too, so nobody else
knows how many guesses were right. It tells both, over the host, with the next plan that runs such a
sequence or has room for guesses: one message, whose size everybody knows from the plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tensorray.actors.config import ShardConfig
from tensorray.actors.device import Device
from tensorray.actors.device_draft_model import DeviceDraftModel
from tensorray.actors.device_drafter import TO_COME, DeviceDrafter
from tensorray.actors.device_medusa import DeviceMedusa
from tensorray.actors.device_ranks import DeviceRanks
from tensorray.actors.device_sampler import DeviceSampler, Sampled
from tensorray.actors.drafter import Drafter
from tensorray.actors.forward import Forward
from tensorray.actors.lookup_drafter import LookupDrafter
from tensorray.actors.medusa import open_medusa
from tensorray.actors.protocol import Drafting, KVGroups, Logprobs, StepPlan
from tensorray.actors.speculation import pad, unpad
from tensorray.actors.step_buffers import RunningSequences, Step, StepBuffers
from tensorray.builder.graph import DTypes
from tensorray.builder.load import plan_bytes
from tensorray.builder.model import Model, Weights
from tensorray.builder.precision import numpy_dtype

#: The most drafts of a step: more rows than this together cost what they are.
MAX_DRAFTS = 64

# Costs where steps are not timed; else those of this many rows are compared with those of one.
ROW_COST, WAIT_COST = 0.015, 0.15
_ROWS = 16
_LEAST_ROW_COST = 0.002
# From the end of a step to the start of one that is planned after its result; what each sequence
# adds, whose guess is looked up and whose tokens are passed on; and each round, which was measured.
# The others are estimates: steps that waited took 0.13 to 0.29 ms more in all (NOTES.md).
_TURN_SECONDS, _SEQUENCE_SECONDS, _ROUND_SECONDS = 0.35e-3, 0.04e-3, 0.045e-3
# What a guess made on the device takes besides its logits: a choice and its copy (an estimate).
_GUESS_SECONDS = 0.05e-3

_NO_ROW = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Guesses:
    """What a step guesses, and what it chooses after its guesses."""

    asked: list[int]  # the sequences that had room, but for those whose guesses no step has
    tokens: dict[int, list[int]]  # of those that there were guesses for, falling in number
    queued: list[Sampled] = field(default_factory=list)  # rounds but the first

    @property
    def lengths(self) -> dict[int, int]:
        """How many there are, falling."""
        return {seq: len(tokens) for seq, tokens in self.tokens.items()}

    @property
    def counts(self) -> dict[int, int]:
        """How many there were, for all that had room."""
        return {seq: len(self.tokens.get(seq, ())) for seq in self.asked}

    @property
    def to_come(self) -> bool:
        """Whether the device makes them."""
        return any(TO_COME in tokens for tokens in self.tokens.values())

    @property
    def rounds(self) -> list[list[int]]:
        """The drafts of each round but the first, each for the first so many sequences."""
        most = max(map(len, self.tokens.values()), default=0)
        return [
            [tokens[place] for tokens in self.tokens.values() if len(tokens) > place]
            for place in range(most)
        ]


def check_drafts(config: ShardConfig) -> None:
    """Raise ValueError if a config asks for drafts that can't be had on GPUs."""
    how = config.speculative_config
    if how is None:
        return
    if how.method not in ("ngram", "draft_model", "medusa"):
        raise ValueError(
            f"--speculative-config: method {how.method!r} is for CPUs so far; on GPUs there are "
            "ngram, draft_model and medusa"
        )
    if config.layout.pp_size > 1:
        raise ValueError(
            "--speculative-config: a pipeline of several stages can't speculate; set "
            "--pipeline-parallel-size to 1"
        )


def open_drafts(
    config: ShardConfig,
    device: Device,
    model: Model,
    head: Weights,
    groups: KVGroups,
    dtypes: DTypes,
    *,
    max_model_len: int,
    step_tokens: int,
) -> DeviceDrafts | None:
    """The drafts that a config asks for, for a model with this head, whose cache is to have this
    shape. Raises CheckpointError, ModelConfigError or ValueError saying what does not fit."""
    how = config.speculative_config
    if how is None:
        return None
    drafting = Drafting(
        how.num_speculative_tokens, ROW_COST, 0.0, how.disable_by_batch_size, WAIT_COST
    )
    layout = config.layout
    if layout.rank != layout.sampler:
        return DeviceDrafts(None, drafting)
    if how.method == "ngram":
        lookup = LookupDrafter(how.prompt_lookup_min, how.prompt_lookup_max)
        return DeviceDrafts(lookup, drafting)
    compute = numpy_dtype(dtypes.compute)
    maker: DeviceDrafter
    if how.method == "medusa":
        heads = open_medusa(config.guesser(), model)
        residual = numpy_dtype(dtypes.residual)
        maker = DeviceMedusa(device, heads, model, head, dtype=compute, residual=residual)
    else:
        maker = DeviceDraftModel.load(
            config,
            device,
            groups,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            step_tokens=step_tokens,
        )
    cost = maker.weight_bytes / plan_bytes(model, dtype=compute)
    return DeviceDrafts(maker, msgspec.structs.replace(drafting, round_cost=cost))


class DeviceDrafts:
    """The drafts of a shard's running sequences, whose tokens it follows."""

    def __init__(
        self, drafter: Drafter | None, drafting: Drafting, *, measured: bool = False
    ) -> None:
        """`drafter` is None on a rank that is told of guesses. `drafting` has costs that hold where
        steps are not timed, or were, if `measured`."""
        self._room = drafting.max_tokens
        most = self._room if drafter is None else min(self._room, drafter.most or self._room)
        self.drafting = msgspec.structs.replace(drafting, max_tokens=most)
        self._drafter = drafter
        self._maker = drafter if isinstance(drafter, DeviceDrafter) else None
        self._measured = measured
        self._since: dict[int, int] = {}  # the step in which each that the drafter knows began
        # Of sequences that had room and have not run since: how many guesses were right, where
        # tokens are read.
        self._right: dict[int, int] = {}

    def most(self, max_num_seqs: int) -> int:
        """Drafts that a step has at most, as far as all ranks know."""
        return min(self._room * max_num_seqs, MAX_DRAFTS)

    @property
    def keeps_states(self) -> bool:
        """Whether steps of decodes have to leave their residual stream."""
        return self._maker is not None and self._maker.keeps_states

    @property
    def block_bytes(self) -> int:
        """Bytes of memory that a block of the KV cache takes besides."""
        return 0 if self._maker is None else self._maker.block_bytes

    def prepare(
        self,
        buffers: StepBuffers,
        sampler: DeviceSampler,
        decodes: Sequence[int],
        bodies: Sequence[int],
    ) -> None:
        """Make room for what guesses on the device, whose graphs are to be of so many sequences,
        and of so many tokens."""
        if self._maker is not None:
            few = [size for size in decodes if size <= MAX_DRAFTS]
            self._maker.prepare(buffers, sampler, few, bodies)

    def resize(self, num_blocks: int) -> None:
        """The KV cache has so many blocks from now on. There are no graphs, nor sequences."""
        if self._maker is not None:
            self._maker.resize(num_blocks)

    def record(self, seconds: Mapping[int, float]) -> None:
        """Make graphs of what guesses on the device, and work out costs; `seconds` are what the
        shard's steps of so many rows take."""
        guesses: dict[int, float] = {}
        if self._maker is not None:
            guesses = self._maker.record()
        self.price(seconds, guesses)

    def forget(self) -> None:
        """Let go of these graphs."""
        if self._maker is not None:
            self._maker.forget()

    def price(self, seconds: Mapping[int, float], guesses: Mapping[int, float]) -> None:
        """Work out costs from the seconds that steps of so many rows take, and those that a guess
        on the device takes for so many sequences (none: it is the host that guesses)."""
        if self._measured or not (seconds.keys() >= {1, _ROWS}):
            return
        one = seconds[1]
        round_seconds, draft_seconds = _ROUND_SECONDS, 0.0
        if guesses:
            few, many = min(guesses), max(guesses)
            round_seconds += guesses[few] + _GUESS_SECONDS
            draft_seconds = max(guesses[many] - guesses[few], 0.0) / max(many - few, 1)
        self.drafting = msgspec.structs.replace(
            self.drafting,
            row_cost=max((seconds[_ROWS] / one - 1) / (_ROWS - 1), _LEAST_ROW_COST),
            wait_cost=_TURN_SECONDS / one,
            sequence_cost=_SEQUENCE_SECONDS / one,
            draft_cost=draft_seconds / one,
            round_cost=round_seconds / one,
        )

    def reset(self) -> None:
        """All sequences are gone."""
        for seq in self._since:
            self._end(seq)
        self._since, self._right = {}, {}

    def take(
        self,
        plan: StepPlan,
        running: RunningSequences,
        sampler: DeviceSampler | None,
        ranks: DeviceRanks | None,
    ) -> tuple[StepPlan, Guesses | None]:
        """Take in a plan before `running` does: the plan without room for drafts, and what is
        guessed where it had any (None: it had none).

        `sampler` is None on a rank that does not sample; `ranks`, for one that is alone.
        """
        for seq in plan.ends:
            self._right.pop(seq, None)
            if self._since.pop(seq, None) is not None:
                self._end(seq)
        for start in plan.starts:
            if self._drafter is not None and not (start.sampling.beam or start.pooling):
                self._since[start.seq] = plan.step
                self._drafter.start(start)
        plan, rooms = _without_room(plan, running)
        back = [seq for seq in plan.seqs if seq in self._right] if self._right else []
        if not (rooms or back):
            return plan, None
        right = [self._right.pop(seq) for seq in back]
        self._right |= dict.fromkeys(rooms, 0)
        if sampler is not None:
            guesses = self._guess(rooms, sampler)
            if ranks is not None:
                ranks.tell(_message(right, guesses.tokens, rooms))
        else:
            assert ranks is not None
            message = ranks.hear(len(right) + sum(rooms.values()))
            right, tokens = _understood(message, len(right), rooms)
            guesses = Guesses([*rooms], _falling(tokens))
        for seq, count in zip(back, right, strict=True):
            running.computed[running.rows[seq]] += count
        return plan, guesses if rooms else None

    def _guess(self, rooms: dict[int, int], sampler: DeviceSampler) -> Guesses:
        """Guesses for sequences that have room."""
        assert self._drafter is not None
        asked = [seq for seq in rooms if seq in self._since and not sampler.steers(seq)]
        guesses = self._drafter.draft(asked, [rooms[seq] for seq in asked], [], _on_the_device)
        found = {seq: guess for seq, guess in zip(asked, guesses, strict=True) if guess}
        tokens = fitting(found, rooms)
        tried = [seq for seq in rooms if seq in tokens or seq not in found]
        return Guesses(tried, _falling(tokens))

    def write(
        self,
        guesses: Guesses,
        step: Step,
        running: RunningSequences,
        buffers: StepBuffers,
        ranks: DeviceRanks | None,
    ) -> None:
        """Queue the making of guesses that the device makes, into the step that is uploaded."""
        into = buffers.given(step.tokens - step.drafts, step.drafts)
        if self._maker is not None:
            buffers.update_tables()
            rows = buffers.sample_rows[: len(guesses.tokens)]
            self._maker.enqueue(guesses.lengths, running.rows, rows, into)
        if ranks is not None and guesses.to_come:
            ranks.share(into)

    def enqueue(
        self,
        guesses: Guesses | None,
        step: Step,
        sampler: DeviceSampler,
        buffers: StepBuffers,
        forward: Forward,
        logits: Any,
    ) -> None:
        """Queue all rounds but the first, which is queued; after each, what guesses on the device
        may take in what was chosen by."""
        row, packed = len(step.sampled), step.tokens - step.drafts
        self._keep_states(forward, step, buffers, 0, row)
        if guesses is None:
            return
        for drafts in guesses.rounds:
            count = len(drafts)
            guesses.queued.append(
                sampler.enqueue_next(
                    step.sampled[:count],
                    buffers.sample_rows[row : row + count],
                    buffers.tokens[packed : packed + count],
                    logits[row : row + count],
                )
            )
            self._keep_states(forward, step, buffers, row, row + count)
            row, packed = row + count, packed + count

    def _keep_states(
        self, forward: Forward, step: Step, buffers: StepBuffers, first: int, end: int
    ) -> None:
        if self._maker is not None and self._maker.keeps_states:
            stream = forward.stream(range(step.tokens))
            rows = slice(first, end)
            self._maker.keep_states(stream, buffers.logit_rows[rows], buffers.sample_rows[rows])

    def collect(
        self, guesses: Guesses, sampler: DeviceSampler
    ) -> tuple[list[int], list[int], dict[int, list[Logprobs]]]:
        """Wait for these rounds: whom they brought tokens, the tokens, and those tokens'
        log-probabilities. (Where nothing could be chosen, the next step will find out.)"""
        seqs: list[int] = []
        tokens: list[int] = []
        logprobs: dict[int, list[Logprobs]] = {}
        for sampled in guesses.queued:
            chosen, found, _ = sampler.collect(sampled)
            for seq, token in zip(sampled.seqs, chosen, strict=True):
                if token >= 0:
                    seqs.append(seq)
                    tokens.append(token)
                    if seq in found:
                        logprobs.setdefault(seq, []).append(found[seq])
        return seqs, tokens, logprobs

    def follow(self, step: int, seqs: Sequence[int], tokens: Sequence[int]) -> None:
        """Take in what a step's sequences chose, each in order. What one chose after its first
        token were right drafts, so their keys and values count from now on."""
        assert self._drafter is not None
        gained: dict[int, list[int]] = {}
        for seq, token in zip(seqs, tokens, strict=True):
            if token >= 0 and self._since.get(seq, step + 1) <= step:
                gained.setdefault(seq, []).append(token)
        for seq, new in gained.items():
            if len(new) > 1:
                self._right[seq] = len(new) - 1
            self._drafter.gained(seq, new, _NO_ROW)

    def _end(self, seq: int) -> None:
        assert self._drafter is not None
        self._drafter.end(seq)


def _without_room(plan: StepPlan, running: RunningSequences) -> tuple[StepPlan, dict[int, int]]:
    """A plan that `running` has not taken in, without its room for drafts, and that room."""
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


def _message(
    right: list[int], guesses: dict[int, list[int]], rooms: dict[int, int]
) -> NDArray[np.int32]:
    """What a rank that samples tells: how many guesses were right, and guesses for all rooms."""
    padded = pad([guesses.get(seq, []) for seq in rooms], [*rooms.values()])
    return np.concatenate([np.array(right, np.int32), padded])


def _understood(
    message: NDArray[np.int32], count: int, rooms: dict[int, int]
) -> tuple[list[int], dict[int, list[int]]]:
    """What `_message` was given, with `count` numbers of right guesses."""
    guesses = unpad(message[count:], [*rooms.values()]) if rooms else []
    return message[:count].tolist(), dict(zip(rooms, guesses, strict=True))


def _falling(guesses: dict[int, list[int]]) -> dict[int, list[int]]:
    """Sequences that have guesses, those with most first."""
    seqs = sorted(filter(guesses.get, guesses), key=lambda seq: -len(guesses[seq]))
    return {seq: guesses[seq] for seq in seqs}


def fitting(guesses: dict[int, list[int]], rooms: Mapping[int, int]) -> dict[int, list[int]]:
    """Of sequences' guesses as many as a step runs: all cut to the same length; or, of too many
    sequences, one each of those that have most room, as their guesses were right most often."""
    most = max(map(len, guesses.values()), default=0)
    while most > 1 and sum(min(len(guess), most) for guess in guesses.values()) > MAX_DRAFTS:
        most -= 1
    likeliest = {*sorted(guesses, key=lambda seq: -rooms[seq])[:MAX_DRAFTS]}
    return {seq: guess[:most] for seq, guess in guesses.items() if seq in likeliest}


def with_drafts(step: Step, guesses: Guesses, running: RunningSequences) -> Step:
    """A step that runs its guesses along, behind all else, a round's beside each other. Sequences
    that sample come in the order of the guesses, others after them."""
    if not guesses.tokens:
        return step
    rank = {seq: place for place, seq in enumerate(guesses.tokens)}
    order = sorted(range(len(step.sampled)), key=lambda i: rank.get(step.sampled[i], len(rank)))
    sample_rows = step.sample_rows[order]
    rows, logit_rows, lens = step.rows, step.logit_rows[order], step.lens
    given = np.full(step.tokens, -1, np.int32) if step.given is None else step.given
    if step.is_decode:  # as it is to stay: each row of logits is that of the token beside it
        rows, lens, given, logit_rows = rows[order], lens[order], given[order], step.logit_rows
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


def _on_the_device(seq: int, ahead: int, row: Any) -> int:
    raise AssertionError("the host has no logits to draw from")
