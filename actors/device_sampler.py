"""Sampling where the logits are: `Sampler`'s choices, without the host waiting for them.

`enqueue` queues the kernels that choose a step's tokens (kernels/batch_sampling.py) and the copy of
what they chose; `collect`, later, waits for the copy. What the choices depend on, the number of
tokens generated included, is kept on the device, so that step n + 1 may be queued before step n is
collected. What steers a sequence by its own tokens (a grammar, rules of its output, the user's
logits processors) is the exception: it is followed on the host, so where a sequence has any,
`enqueue` waits for the tokens of the step before, while the device computes this step's logits, and
sends a mask of the tokens that may come next. A logits processor that runs on the host has this
step's logits brought to it besides.

Beams (`Sampling.beam`) choose nothing: what may follow them is scored like any log-probabilities.
Where something edits a beam's logits, they are brought to the host and scored by a `Sampler`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tensorray.actors.device import Device, Mark
from tensorray.actors.guidance import Guidance, Guide
from tensorray.actors.logits_processors import ProcessorError, Registry
from tensorray.actors.protocol import Logprobs, Sampling, SequenceStart
from tensorray.actors.sampler import (
    ALL_EXCLUDED,
    NONE_LEFT,
    NOT_FINITE,
    OVERFLOW,
    Sampler,
    SamplingError,
    Steering,
    check_best,
    score_token,
)
from tensorray.kernels import batch_sampling as kernels
from tensorray.kernels.rows import gather_rows

_SEED_MASK = 2**64 - 1
_MIN_BIASES = 64  # room for the logit bias of a slot, which grows
_SLOTS = 256  # that there is room for at once; more grow by as many
_MIN_PINNED = 1024  # bytes
_UPLOADS_UNDER_WAY = 64

PROCESSED = (
    "the model's logits, or what logits processors ({names}) made of them on the device, hold NaN, "
    "infinity or no token to choose"
)


@dataclass(frozen=True)
class RowStart:
    """What a sequence's start changes on the device; its slot is yet to be found."""

    record: NDArray[Any]  # ROW [1], without its slot
    edits_always: bool  # whether its logits are edited beyond the minimum length as well
    fill: np.uint32 | None  # what its slot's words start as; None: it needs no slot
    tokens: NDArray[np.uint32]  # whose words are edited …
    edits: NDArray[np.uint32]  # … and how, as `edit_words` takes it
    bias_tokens: NDArray[np.int32]  # rising
    biases: NDArray[np.float32]


def row_start(start: SequenceStart, vocab_size: int) -> RowStart:
    """A sequence's parameters and tokens, as the kernels read them."""
    sampling = start.sampling
    stops = sampling.stop_token_ids
    min_tokens = sampling.min_tokens if stops else 0
    outputs = len(start.tokens) - start.prompt_len
    record = np.zeros(1, kernels.ROW)
    record["repetition"] = sampling.repetition_penalty
    record["frequency"] = sampling.frequency_penalty
    record["presence"] = sampling.presence_penalty
    record["temperature"] = sampling.temperature
    record["top_p"] = sampling.top_p
    record["min_p"] = sampling.min_p
    record["seed"] = sampling.seed & _SEED_MASK
    record["top_k"] = sampling.top_k if sampling.top_k < vocab_size else 0
    record["min_tokens"] = min(min_tokens, np.iinfo(np.int32).max)
    record["outputs"] = outputs
    record["slot"] = -1
    record["biased"] = len(sampling.logit_bias)

    tokens: list[NDArray[np.uint32]] = []
    edits: list[NDArray[np.uint32]] = []

    def edit(ids: Sequence[int] | set[int], by: np.uint32 | int) -> None:
        if ids:
            tokens.append(np.fromiter(ids, np.uint32, len(ids)))
            edits.append(np.full(len(ids), by, np.uint32))

    fill = np.uint32(0)
    if sampling.allowed_token_ids is None:
        edit(sampling.banned_token_ids, kernels.BANNED)
    else:
        fill = kernels.BANNED
        edit({*sampling.allowed_token_ids} - {*sampling.banned_token_ids}, kernels.ALLOW)
    if outputs < min_tokens:
        edit(stops, kernels.STOP)
    edit([*sampling.logit_bias], kernels.BIASED)
    repetition = sampling.repetition_penalty != 1.0
    penalizes = repetition or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    if repetition:
        edit({*start.tokens[: start.prompt_len]}, kernels.SEEN)
    if penalizes:
        edit(start.tokens[start.prompt_len :], 1)
    biases = sorted(sampling.logit_bias.items())
    allowed = sampling.allowed_token_ids is not None
    return RowStart(
        record=record,
        edits_always=bool(allowed or sampling.banned_token_ids or biases or penalizes),
        fill=fill if tokens or fill or penalizes else None,
        tokens=np.concatenate([np.empty(0, np.uint32), *tokens]),
        edits=np.concatenate([np.empty(0, np.uint32), *edits]),
        bias_tokens=np.array([token for token, _ in biases], np.int32),
        biases=np.array([bias for _, bias in biases], np.float32),
    )


@dataclass(eq=False)
class _Sequence:
    """What the host keeps of a sequence."""

    sampling: Sampling
    edits: bool  # its logits, whatever its length
    min_tokens: int
    outputs: int  # generated, as far as the host has read
    steering: Steering
    plain: bool = False  # its next token is just the best one
    beam: Sampler | None = None  # which scores it on the host

    def __post_init__(self) -> None:
        self.update()

    def update(self) -> None:
        greedy = self.sampling.temperature == 0 and self.sampling.logprobs is None
        greedy = greedy and not self.steering.follows
        self.plain = greedy and not self.edits and self.outputs >= self.min_tokens


@dataclass(eq=False)
class Sampled:
    """A step's tokens on their way to the host; for `DeviceSampler.collect`, once."""

    seqs: list[int]
    states: list[_Sequence]
    mark: Mark | None = None  # None: nothing was queued
    results: NDArray[np.int32] = field(default_factory=lambda: np.empty((2, 0), np.int32))
    scored: list[int] = field(default_factory=list)  # places in `seqs`
    scores: NDArray[np.int32] | None = None  # of these, as `score_rows` writes them
    whole: dict[int, NDArray[Any]] = field(default_factory=dict)  # place -> logits [vocab]
    stuck: dict[int, str] = field(default_factory=dict)  # seq -> why it can't go on
    pinned: list[NDArray[np.uint8]] = field(default_factory=list)  # what all of it lies in


@dataclass(eq=False)
class PromptScores:
    """Scores of prompt tokens on their way; for `collect_prompt_logprobs`, once."""

    tokens: list[int]
    top: int
    mark: Mark | None = None  # None: nothing was queued
    scores: NDArray[np.int32] | None = None
    whole: NDArray[Any] | None = None  # logits [R, vocab]
    pinned: list[NDArray[np.uint8]] = field(default_factory=list)


@dataclass(eq=False)
class HostRows:
    """Rows on their way to the host; for `collect_rows`, once."""

    mark: Mark | None = None
    rows: NDArray[Any] = field(default_factory=lambda: np.empty((0, 0)))
    pinned: list[NDArray[np.uint8]] = field(default_factory=list)


class DeviceSampler:
    """`Sampler` on a device: the same choices (equal as tests/helpers/equality.py says) and errors.

    Each sequence has a row in 0 .. max_num_seqs - 1 while it runs. All calls belong inside
    `device.current()`, one at a time. After `enqueue`, in stream order, `last_tokens[row]` is the
    sequence's new token, or what it was if none could be chosen.

    A sequence that edits its logits (bias, allowed or banned tokens, min_tokens, penalties) takes a
    slot, a word a token of the vocabulary. Slots for up to 256 are allocated at the start, so that
    device memory does not grow while serving; more come as they are needed.
    """

    def __init__(
        self,
        device: Device,
        vocab_size: int,
        max_num_seqs: int,
        last_tokens: Any = None,
        guidance: Guidance | None = None,
        processors: Registry | None = None,
    ) -> None:
        """`last_tokens`: int32 [max_num_seqs] on the device, to write to; None: its own. Without
        `guidance` sequences that have a grammar fail; `processors` are the logits processors that
        sequences may name."""
        xp = device.xp
        self.vocab_size = vocab_size
        self._device = device
        self._guidance = guidance
        self._processors = processors or {}
        self._unheard: deque[Sampled] = deque()  # whose tokens the steered wait for
        self._sequences: dict[int, _Sequence] = {}
        self._starts: dict[int, tuple[int, RowStart]] = {}  # not yet on the device
        self._slots: dict[int, int] = {}
        self._free_slots: list[int] = []
        self._out = xp.zeros(2 * max_num_seqs, np.int32)
        self._pinned = _PinnedPool(device)
        self._scored_on_device: tuple[list[int], Any] = ([], None)
        self._state = kernels.RowState(
            rows=xp.zeros((max_num_seqs, kernels.ROW.itemsize), np.uint8),
            last_tokens=xp.zeros(max_num_seqs, np.int32) if last_tokens is None else last_tokens,
            words=xp.zeros((0, vocab_size), np.uint32),
            bias_tokens=xp.zeros((0, _MIN_BIASES), np.int32),
            biases=xp.zeros((0, _MIN_BIASES), np.float32),
        )
        self._add_slots()

    def prepare(self, dtype: Any, scored: int) -> None:
        """Compile the kernels for logits of a dtype, and take the memory that they need for as many
        sequences as there may be, or so many scored rows at once, so that no step need do so."""
        kernels.prepare(self._state, dtype, scored)

    @property
    def state(self) -> kernels.RowState:
        """The sequences' state on the device, which is not to be written to."""
        return self._state

    @property
    def last_tokens(self) -> Any:
        """int32 [max_num_seqs] on the device: each row's newest token."""
        return self._state.last_tokens

    def start(self, start: SequenceStart, row: int) -> None:
        """A sequence enters, or re-enters, in a row that no other running sequence has.

        `start.tokens` after the prompt count as its output. Queues nothing: what starts goes to
        the device together, with the next `enqueue`.
        """
        self.end(start.seq)
        beam = None
        if start.sampling.beam:
            start, beam = self._beam(start)
        found = row_start(start, self.vocab_size)
        self._starts[start.seq] = row, found
        self._sequences[start.seq] = _Sequence(
            sampling=start.sampling,
            edits=found.edits_always,
            min_tokens=int(found.record["min_tokens"][0]),
            outputs=int(found.record["outputs"][0]),
            steering=Steering(start, self._guidance, self._processors),
            beam=beam,
        )

    def _beam(self, start: SequenceStart) -> tuple[SequenceStart, Sampler | None]:
        """A beam's start without what edits its logits, and what scores it if anything does."""
        sampler = Sampler(self.vocab_size, self._guidance, self._processors)
        sampler.start(start)
        plain = Sampling(temperature=0.0, logprobs=start.sampling.logprobs, beam=True)
        edited = sampler if sampler.edits(start.seq) else None
        return msgspec.structs.replace(start, sampling=plain), edited

    def end(self, seq: int) -> None:
        """Forgets a sequence; one that is not known is fine. Its row is free at once."""
        self._sequences.pop(seq, None)
        self._starts.pop(seq, None)
        if (slot := self._slots.pop(seq, None)) is not None:
            self._free_slots.append(slot)

    def enqueue(
        self,
        seqs: Sequence[int],
        rows: Any,
        logits: Any,
        *,
        masks: Any = None,
        mask_rows: Any = None,
    ) -> Sampled:
        """Queue the choice of one token for each of n distinct sequences.

        Does not wait, unless a sequence is steered: then for the steps before.

        rows: int32 [>= n] on the device, the sequences' rows in the order of `seqs`. logits:
        [>= n, vocab] on the device, float32, float16 or bfloat16, the last axis dense; left as
        they are. masks uint32 [m, ceil(vocab / 32)] and mask_rows int32 [>= n], on the device:
        sequence i may choose only tokens whose bit (token % 32 of word token // 32, low bits first)
        is set in masks[mask_rows[i]]; -1: any token. Where sequences are steered, the masks are
        theirs. Raises KeyError for an unknown sequence, ValueError for logits of a wrong
        shape or type.
        """
        states = [self._sequences[seq] for seq in seqs]
        count = len(states)
        self._check(logits, count)
        sampled = Sampled(list(seqs), states)
        if not states:
            return sampled
        self._send_starts()
        if logits.shape[0] > count:
            logits = logits[:count]
        edited = logits
        steered = any(state.steering.follows for state in states)
        if steered:
            while self._unheard:
                self._hear()
            masks, mask_rows = self._masks(sampled)
            edited = self._processed(sampled, logits)
        rows = rows[:count]
        out = self._out[: 2 * count].reshape(2, count)
        if masks is None and all(state.plain for state in states):
            kernels.greedy_rows(logits, rows, self._state, out)
        else:
            kernels.sample_rows(edited, rows, self._state, out, masks, mask_rows)
            self._score(sampled, logits, out[0])
        sampled.results = self._fetch(out, sampled.pinned)
        sampled.mark = self._device.mark()
        if steered:
            self._unheard.append(sampled)
        return sampled

    def steers(self, seq: int) -> bool:
        """Whether a sequence's tokens steer, on the host, which may come next."""
        return self._sequences[seq].steering.follows

    def draws(self, seq: int) -> bool:
        """Whether a sequence draws its tokens, rather than taking the likeliest."""
        return self._sequences[seq].sampling.temperature > 0

    def enqueue_next(self, seqs: Sequence[int], rows: Any, drafts: Any, logits: Any) -> Sampled:
        """Queue the choice of one token more, for those that chose their drafts when last queued.

        `seqs` are the first ones of those, none of them steered; drafts int32 [n] on the device.
        `rows`, which is written to, and logits are as `enqueue` takes them. The others' tokens are
        -1, and their state is left as it is.
        """
        kernels.keep_right(rows, self._out[: len(seqs)], drafts)
        return self.enqueue(seqs, rows, logits)

    def collect(self, sampled: Sampled) -> tuple[list[int], dict[int, Logprobs], dict[int, str]]:
        """Wait for a step's tokens: what `Sampler.sample` returns, in the order of its sequences.

        Steps are collected in the order they were queued, each once.
        """
        if sampled.mark is None:
            return [], {}, {}
        sampled.mark.wait()
        while sampled in self._unheard:
            self._hear()
        tokens: list[int] = sampled.results[0].tolist()
        failed: dict[int, str] = {}
        for place in sampled.results[1].nonzero()[0].tolist():
            state, status = sampled.states[place], int(sampled.results[1, place])
            failed[sampled.seqs[place]] = _reason(status, state.sampling, state.steering)
        failed |= sampled.stuck
        tokens = [
            -1 if seq in sampled.stuck else token
            for seq, token in zip(sampled.seqs, tokens, strict=True)
        ]
        for token, state in zip(tokens, sampled.states, strict=True):
            if state.outputs < state.min_tokens and token >= 0:
                state.outputs += 1
                state.update()
        logprobs: dict[int, Logprobs] = {}
        if sampled.scores is not None:
            chosen = [tokens[place] for place in sampled.scored]
            tops = [sampled.states[place].sampling.logprobs or 0 for place in sampled.scored]
            entries = _logprobs(chosen, sampled.scores, tops)
            for place, entry in zip(sampled.scored, entries, strict=True):
                if sampled.seqs[place] not in failed:
                    logprobs[sampled.seqs[place]] = entry
        for place, row in sampled.whole.items():
            seq, top = sampled.seqs[place], sampled.states[place].sampling.logprobs or 0
            if seq in failed:
                continue
            if (beam := sampled.states[place].beam) is not None:
                _, found, stuck = beam.sample([seq], row.astype(np.float32)[None])
                logprobs |= found
                failed |= stuck
            else:
                logprobs[seq] = score_token(row.astype(np.float32), tokens[place], top)
        self._pinned.give(sampled.pinned)
        return tokens, logprobs, failed

    def enqueue_prompt_logprobs(self, tokens: Sequence[int], logits: Any, top: int) -> PromptScores:
        """Queue the scoring of a prompt: row i of logits [>= R, vocab] scores `tokens[i]`.

        `top` best tokens are reported a row, -1 for the whole vocabulary. Logits are as `enqueue`
        takes them. Raises ValueError for those of a wrong shape or type.
        """
        count = len(tokens)
        self._check(logits, count)
        prompt = PromptScores(list(tokens), top)
        if not count:
            return prompt
        logits = logits[:count]
        if 0 <= top <= kernels.MAX_TOP:
            numbers = np.array([range(count), tokens], np.int32)
            index, targets = self._upload(numbers.reshape(-1)).reshape(2, count)
            found = self._device.xp.empty((count, kernels.SCORE_HEADER + 2 * top), np.int32)
            kernels.score_rows(logits, index, targets, found)
            prompt.scores = self._fetch(found, prompt.pinned)
        else:
            prompt.whole = self._fetch(logits, prompt.pinned)
        prompt.mark = self._device.mark()
        return prompt

    def collect_prompt_logprobs(self, prompt: PromptScores) -> list[Logprobs]:
        """Wait for a prompt's scores: what `Sampler.prompt_logprobs` returns.

        Raises SamplingError for logits that hold NaN or infinity.
        """
        if prompt.mark is None:
            return []
        prompt.mark.wait()
        entries = []
        if prompt.whole is not None:
            for token, logits in zip(prompt.tokens, prompt.whole, strict=True):
                row = logits.astype(np.float32)
                check_best(row.max())
                entries.append(score_token(row, token, prompt.top))
        if prompt.scores is not None:
            if bad := [status for status in prompt.scores[:, 5].tolist() if status]:
                raise SamplingError(_reason(bad[0]))
            entries = _logprobs(prompt.tokens, prompt.scores, [prompt.top] * len(prompt.tokens))
        self._pinned.give(prompt.pinned)
        return entries

    def prompt_logprobs(self, tokens: Sequence[int], logits: Any, top: int) -> list[Logprobs]:
        """Both of the above at once: `Sampler.prompt_logprobs`."""
        return self.collect_prompt_logprobs(self.enqueue_prompt_logprobs(tokens, logits, top))

    def enqueue_rows(self, rows: Any) -> HostRows:
        """Queue a copy of rows on the device to the host, after which they may change."""
        found = HostRows()
        found.rows = self._fetch(rows, found.pinned)
        found.mark = self._device.mark()
        return found

    def collect_rows(self, found: HostRows) -> NDArray[np.float32]:
        """Wait for the rows, as float32; once."""
        assert found.mark is not None
        found.mark.wait()
        rows = found.rows.astype(np.float32)
        self._pinned.give(found.pinned)
        return rows

    def _masks(self, sampled: Sampled) -> tuple[Any, Any]:
        """Masks for the sequences that have grammars or rules, and each sequence's row of them, on
        the device: uint32 [m, words], int32 [n]. None where any token may come next."""
        guides: list[Guide] = []
        guided: list[int] = []
        rows = np.full(len(sampled.seqs), -1, np.int32)
        ruled = 0
        for place, (seq, state) in enumerate(zip(sampled.seqs, sampled.states, strict=True)):
            steering = state.steering
            if reason := steering.fault:
                sampled.stuck[seq] = reason
            elif steering.guide is not None:
                guided.append(place)
                guides.append(steering.guide)
            elif steering.rules is not None:
                rows[place] = ruled
                ruled += 1
        rows[guided] = np.arange(ruled, ruled + len(guided))
        masks = np.full((ruled, -(-self.vocab_size // 32)), -1, np.int32)
        if guides and self._guidance is not None:
            masks = np.concatenate([masks, self._guidance.masks(guides)])
        if not len(masks):
            return None, None
        for row, state in zip(rows.tolist(), sampled.states, strict=True):
            if row >= 0 and state.steering.rules is not None:
                state.steering.rules.restrict(masks[row])
        sent = self._upload(np.concatenate([rows, masks.reshape(-1)]))
        count = len(rows)
        return sent[count:].view(np.uint32).reshape(masks.shape), sent[:count]

    def _processed(self, sampled: Sampled, logits: Any) -> Any:
        """The logits as the sequences' processors leave them: a float32 copy where there are any.

        Rows of processors that run on the host are brought there, which waits for them.
        """
        places = [
            place
            for place, (seq, state) in enumerate(zip(sampled.seqs, sampled.states, strict=True))
            if state.steering.processes and seq not in sampled.stuck
        ]
        if not places:
            return logits
        index = self._upload(np.arange(len(sampled.seqs), dtype=np.int32))
        edited = gather_rows(self._device.xp.ascontiguousarray(logits), index, dtype=np.float32)
        here: dict[int, NDArray[Any]] = {}
        pinned: list[NDArray[np.uint8]] = []
        for place in places:
            chain = sampled.states[place].steering.chain
            assert chain is not None
            if not chain.on_device:
                here[place] = self._fetch(edited[place], pinned)
                continue
            try:
                chain.queue(edited[place])
            except ProcessorError as error:
                sampled.stuck[sampled.seqs[place]] = str(error)
        if here:
            self._device.mark().wait()
        for place, row in here.items():
            if not np.isfinite(row.max()):
                continue  # the model's own fault, which the choice will find
            try:
                changed = sampled.states[place].steering.processed(row.copy())
            except SamplingError as error:
                sampled.stuck[sampled.seqs[place]] = str(error)
            else:
                edited[place] = self._upload(changed.view(np.int32)).view(np.float32)
        self._pinned.give(pinned)
        return edited

    def _hear(self) -> None:
        """Tell the steered the tokens of the oldest step they have not heard of."""
        sampled = self._unheard.popleft()
        assert sampled.mark is not None
        sampled.mark.wait()
        tokens, failed = sampled.results.tolist()
        for state, token, status in zip(sampled.states, tokens, failed, strict=True):
            if state.steering.follows and not status:
                state.steering.advance(token)
                state.update()

    def _check(self, logits: Any, rows: int) -> None:
        typed = logits.dtype.name in ("float32", "float16", "bfloat16")
        shaped = logits.ndim == 2 and logits.shape[0] >= rows and logits.shape[1] == self.vocab_size
        if not (typed and shaped):
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}, "
                f"not float32, float16 or bfloat16 {[rows, self.vocab_size]}"
            )

    def _send_starts(self) -> None:
        """Queue what the sequences that started since the last step change on the device."""
        if not self._starts:
            return
        index, edited = [], [np.empty(0, np.uint32)]
        edits = [np.empty(0, np.uint32)]
        biased: list[tuple[int, RowStart]] = []
        for seq, (row, found) in self._starts.items():
            index.append(row)
            if found.fill is None:
                continue
            slot = self._slot(seq)
            found.record["slot"] = slot
            self._state.words[slot].fill(found.fill)
            edited.append(found.tokens + np.uint32(slot * self.vocab_size))
            edits.append(found.edits)
            if len(found.biases):
                biased.append((slot, found))
        records = np.concatenate([found.record for _, found in self._starts.values()])
        self._starts = {}
        places = np.concatenate(edited)
        sections = [
            np.array(index, np.int32),
            records.view(np.int32),
            places.view(np.int32),
            np.concatenate(edits).view(np.int32),
            *(section for _, found in biased for section in (found.bias_tokens, found.biases)),
        ]
        sent = self._upload(np.concatenate([section.view(np.int32) for section in sections]))
        ends = np.cumsum([len(section) for section in sections]).tolist()
        parts = [
            sent[end - len(section) : end] for section, end in zip(sections, ends, strict=True)
        ]
        kernels.set_rows(self._state, parts[0], parts[1].reshape(len(index), -1).view(np.uint8))
        if len(places):
            kernels.edit_words(self._state, parts[2].view(np.uint32), parts[3].view(np.uint32))
        if longest := max((len(found.biases) for _, found in biased), default=0):
            self._grow_biases(longest)
        for (slot, found), tokens, biases in zip(biased, parts[4::2], parts[5::2], strict=True):
            self._state.bias_tokens[slot, : len(found.biases)] = tokens
            self._state.biases[slot, : len(found.biases)] = biases.view(np.float32)

    def _slot(self, seq: int) -> int:
        """A free slot, now this sequence's."""
        if not self._free_slots:
            self._add_slots()
        slot = self._slots[seq] = self._free_slots.pop()
        return slot

    def _add_slots(self) -> None:
        xp, state = self._device.xp, self._state
        have = len(state.words)
        more = min(_SLOTS, max(len(state.rows) - have, 1))
        state.words = _grown(xp, state.words, have + more, self.vocab_size)
        width = state.biases.shape[1]
        state.bias_tokens = _grown(xp, state.bias_tokens, have + more, width)
        state.biases = _grown(xp, state.biases, have + more, width)
        self._free_slots = list(range(have + more - 1, have - 1, -1))

    def _grow_biases(self, width: int) -> None:
        state, slots = self._state, len(self._state.words)
        if width > state.biases.shape[1]:
            width = 1 << (width - 1).bit_length()
            state.bias_tokens = _grown(self._device.xp, state.bias_tokens, slots, width)
            state.biases = _grown(self._device.xp, state.biases, slots, width)

    def _score(self, sampled: Sampled, logits: Any, tokens: Any) -> None:
        """Queue the log-probabilities of the sequences that asked for them."""
        tops = [state.sampling.logprobs for state in sampled.states]
        scored = [i for i, top in enumerate(tops) if top is not None]
        if not scored:
            return
        whole = [
            i
            for i in scored
            if not 0 <= (tops[i] or 0) <= kernels.MAX_TOP or sampled.states[i].beam is not None
        ]
        for place in whole:
            sampled.whole[place] = self._fetch(logits[place], sampled.pinned)
        sampled.scored = [i for i in scored if i not in sampled.whole]
        if not sampled.scored:
            return
        if sampled.scored != self._scored_on_device[0]:
            places = np.array(sampled.scored, np.int32)
            self._scored_on_device = sampled.scored, self._upload(places)
        top = max(tops[i] or 0 for i in sampled.scored)
        shape = (len(sampled.scored), kernels.SCORE_HEADER + 2 * top)
        found = self._device.xp.empty(shape, np.int32)
        kernels.score_rows(logits, self._scored_on_device[1], tokens, found)
        sampled.scores = self._fetch(found, sampled.pinned)

    def _fetch(self, source: Any, pinned: list[NDArray[np.uint8]]) -> NDArray[Any]:
        """Queue a copy to the host; what it will be, in memory that is added to `pinned`."""
        source = self._device.xp.ascontiguousarray(source)
        memory = self._pinned.take(source.nbytes)
        pinned.append(memory)
        target: NDArray[Any] = memory[: source.nbytes].view(source.dtype).reshape(source.shape)
        self._device.download(source, target)
        return target

    def _upload(self, numbers: NDArray[np.int32]) -> Any:
        """int32 [n] on the device."""
        target = self._device.xp.empty(len(numbers), np.int32)
        memory = self._pinned.take(numbers.nbytes)
        source = memory[: numbers.nbytes].view(np.int32)
        source[:] = numbers
        self._device.upload(source, target)
        self._pinned.give_after([memory], self._device.mark())
        return target


class _PinnedPool:
    """Pinned host memory, taken and given back in pieces of a power of two."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._later: deque[tuple[Mark, list[NDArray[np.uint8]]]] = deque()

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """At least so many bytes."""
        size = max(_MIN_PINNED, 1 << (nbytes - 1).bit_length())
        free = self._free.setdefault(size, [])
        return free.pop() if free else self._device.pinned(size)

    def give(self, pieces: list[NDArray[np.uint8]]) -> None:
        for piece in pieces:
            self._free[len(piece)].append(piece)

    def give_after(self, pieces: list[NDArray[np.uint8]], mark: Mark) -> None:
        """Give back what the device reads until it comes to `mark`."""
        self._later.append((mark, pieces))
        if len(self._later) > _UPLOADS_UNDER_WAY:
            mark, pieces = self._later.popleft()
            mark.wait()
            self.give(pieces)


def _grown(xp: Any, array: Any, rows: int, width: int) -> Any:
    """A larger array that begins with what the given one holds."""
    grown = xp.zeros((rows, width), array.dtype)
    grown[: array.shape[0], : array.shape[1]] = array
    return grown


def _reason(status: int, sampling: Sampling | None = None, steering: Steering | None = None) -> str:
    """Why a row has no token, in the words of `Sampler`."""
    chain = None if steering is None else steering.chain
    if (
        chain is not None
        and chain.on_device
        and status in (kernels.NOT_FINITE, kernels.ALL_EXCLUDED)
    ):
        return PROCESSED.format(names=chain.label)
    if status == kernels.OVERFLOW and sampling is not None:
        return OVERFLOW.format(repetition=sampling.repetition_penalty)
    return {
        kernels.NOT_FINITE: NOT_FINITE,
        kernels.ALL_EXCLUDED: ALL_EXCLUDED,
        kernels.NONE_LEFT: NONE_LEFT,
    }[status]


def _logprobs(
    tokens: Sequence[int], found: NDArray[np.int32], tops: Sequence[int]
) -> list[Logprobs]:
    """What `score_rows` found, of row i at most `tops[i]` best tokens.

    A row without a score gives numbers that mean nothing.
    """
    first = kernels.SCORE_HEADER
    room = (found.shape[1] - first) // 2
    normalizers = np.ascontiguousarray(found[:, :2]).view(np.float64)[:, 0]
    scores = np.ascontiguousarray(found[:, [2, *range(first + room, first + 2 * room)]])
    with np.errstate(invalid="ignore"):  # words that were not written
        logprobs = scores.view(np.float32).astype(np.float64) - normalizers[:, None]
    counts = np.minimum(found[:, 4], tops)
    return [
        Logprobs(token, own[0], rank, best[:count], own[1 : count + 1])
        for token, own, rank, best, count in zip(
            tokens,
            logprobs.tolist(),
            found[:, 3].tolist(),
            found[:, first : first + room].tolist(),
            counts.tolist(),
            strict=True,
        )
    ]
