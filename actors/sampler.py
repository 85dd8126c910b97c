"""Per-sequence sampling state on a shard: logits in, tokens out, one call a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.guidance import NO_VOCABULARY, Guidance, Guide
from tensorray.actors.logits_processors import ProcessorChain, ProcessorError, Registry, chain_of
from tensorray.actors.output_rules import OutputRules, rules_of
from tensorray.actors.protocol import Logprobs, SequenceStart
from tensorray.kernels import sampling as kernels
from tensorray.kernels.philox import uniform

_SEED_MASK = 2**64 - 1
_DRAWS_AHEAD = 64  # draws computed at once: a Philox call costs the same for 1 and for 64


# Why no token could be chosen.
NOT_FINITE = "the model's logits hold NaN or infinity"
ALL_EXCLUDED = "the model put every token at probability zero (all logits are -inf)"
NONE_LEFT = (
    "no token is left to choose: allowed_token_ids, banned_token_ids, bad_words, "
    "no_repeat_ngram_size, forced_prefix, min_tokens and the structured output's grammar together "
    "exclude every one"
)
STUCK = "the structured output's grammar can't be followed any further: {reason}"
OVERFLOW = (
    "penalties drove a logit beyond float32: bring repetition_penalty ({repetition}) closer to 1"
)


# Those of them that a request brings about by what it asks for, as far as they are always the same.
_OF_THE_REQUEST = tuple(reason.partition("{")[0] for reason in (NONE_LEFT, STUCK, OVERFLOW))


def refused(failed: Mapping[int, str]) -> list[int]:
    """Of sequences that failed, with their reasons, those whose requests are to blame for it."""
    return [seq for seq, reason in failed.items() if reason.startswith(_OF_THE_REQUEST)]


class SamplingError(ValueError):
    """A row of logits from which no token can be chosen; the message says why."""


class Sampler:
    """Chooses the next token of every sequence it was told about.

    A sequence's choice depends on its own logits, its own tokens and its own seed: never on its
    batch mates, on their order, or on a preemption in between.
    """

    def __init__(
        self,
        vocab_size: int,
        guidance: Guidance | None = None,
        processors: Registry | None = None,
    ) -> None:
        """Without `guidance` sequences that have a grammar fail; `processors` are the logits
        processors that sequences may name."""
        self.vocab_size = vocab_size
        self._guidance = guidance
        self._processors = processors or {}
        self._sequences: dict[int, _Sequence] = {}

    def start(self, start: SequenceStart) -> None:
        """A sequence enters, or re-enters: `start.tokens` after the prompt count as its output."""
        steering = Steering(start, self._guidance, self._processors)
        self._sequences[start.seq] = _Sequence(start, steering)

    def end(self, seq: int) -> None:
        """Forgets a sequence; one that is not known is fine."""
        self._sequences.pop(seq, None)

    def edits(self, seq: int) -> bool:
        """Whether anything changes a sequence's logits before its next token is chosen."""
        return self._sequences[seq].edits

    def sample(
        self, seqs: Sequence[int], logits: NDArray[np.float32]
    ) -> tuple[list[int], dict[int, Logprobs], dict[int, str]]:
        """One token for each of R distinct sequences, from float32 logits [R, vocab].

        Returns the tokens in the order of `seqs`; log-probabilities of those that asked; and, with
        the reason, those for which no token could be chosen: their token is -1 and their state
        as it was. `logits` are left as they are. Raises KeyError for an unknown sequence.
        """
        self._check(logits, len(seqs))
        states = [self._sequences[seq] for seq in seqs]
        if not states:
            return [], {}, {}
        tokens: list[int]
        logprobs: dict[int, Logprobs] = {}
        failed: dict[int, str] = {}
        if all(state.plain for state in states):
            chosen, best = kernels.greedy(logits)
            if np.isfinite(best).all():
                tokens = chosen.tolist()
                for state in states:
                    state.outputs += 1
                return tokens, logprobs, failed
        tokens = []
        masks = self._masks(states)
        for seq, state, row in zip(seqs, states, logits, strict=True):
            try:
                token, entry = state.choose_and_score(row, masks.get(state))
                if entry is not None:
                    logprobs[seq] = entry
            except SamplingError as error:
                token = -1
                failed[seq] = str(error)
            else:
                if not state.sampling.beam:  # which starts anew with the token it is given
                    state.append(token)
            tokens.append(token)
        return tokens, logprobs, failed

    def verify(
        self,
        seqs: Sequence[int],
        drafts: Sequence[Sequence[int]],
        logits: NDArray[np.float32],
    ) -> tuple[list[list[int]], dict[int, list[Logprobs]], dict[int, str]]:
        """As many tokens for each of R distinct sequences as its drafts were right, and one more.

        float32 logits [R + number of drafts, vocab]: for each sequence, those of its next token and
        of the one after each of its drafts, as if that were true. Each token is chosen as `sample`
        would choose it, one after the other, and the first that differs from the draft is the last,
        as is one that ends the sequence. So with any drafts the tokens are those of `sample`.

        Returns the tokens, and log-probabilities of all of them for the sequences that asked. None
        came for sequences that failed, whose reasons are the third. (Where tokens came before what
        can't be chosen, the next step will find out.)
        """
        self._check(logits, len(seqs) + sum(map(len, drafts)))
        states = [self._sequences[seq] for seq in seqs]
        greedy: list[int] | None = None
        if all(state.plain for state in states):
            best_tokens, best = kernels.greedy(logits)
            greedy = best_tokens.tolist() if np.isfinite(best).all() else None
        chosen: list[list[int]] = []
        logprobs: dict[int, list[Logprobs]] = {}
        failed: dict[int, str] = {}
        first = 0
        for seq, state, draft in zip(seqs, states, drafts, strict=True):
            tokens: list[int] = []
            for at, guess in enumerate([*draft, None], first):
                try:
                    if greedy is None:
                        guided = state.steering.guide is not None
                        mask = self._masks([state]).get(state) if guided else None
                        token, entry = state.choose_and_score(logits[at], mask)
                        if entry is not None:
                            logprobs.setdefault(seq, []).append(entry)
                    else:
                        token = greedy[at]
                except SamplingError as error:
                    if not tokens:
                        failed[seq] = str(error)
                    break
                if not state.sampling.beam:
                    state.append(token)
                tokens.append(token)
                if token != guess or state.may_end(token):
                    break
            chosen.append(tokens)
            first += 1 + len(draft)
        return chosen, logprobs, failed

    def guess(self, seq: int, ahead: int, row: NDArray[np.float32]) -> int:
        """What a sequence would choose from float32 logits [vocab] of a draft's, as the token
        `ahead` places after its next one: by the same draw, but without any edits."""
        return self._sequences[seq].guess(row, ahead)

    def _masks(self, states: Sequence[_Sequence]) -> dict[_Sequence, NDArray[np.int32]]:
        """The tokens that may come next in the guided ones of these sequences."""
        guides = {
            state: state.steering.guide for state in states if state.steering.guide is not None
        }
        if not guides or self._guidance is None:
            return {}
        return dict(zip(guides, self._guidance.masks(list(guides.values())), strict=True))

    def prompt_logprobs(
        self, tokens: Sequence[int], logits: NDArray[np.float32], top: int
    ) -> list[Logprobs]:
        """How likely the prompt was: row i of float32 logits [R, vocab] scores `tokens[i]`.

        So `tokens[i]` is the prompt token that follows the one row i was computed at. `top` best
        tokens are reported a row, -1 for the whole vocabulary. Raises SamplingError for logits
        that hold NaN or infinity.
        """
        self._check(logits, len(tokens))
        scores = []
        for token, row in zip(tokens, logits, strict=True):
            check_best(row.max())
            scores.append(score_token(row, token, top))
        return scores

    def _check(self, logits: NDArray[np.float32], rows: int) -> None:
        if logits.shape != (rows, self.vocab_size) or logits.dtype != np.float32:
            raise ValueError(
                f"logits are {logits.dtype} {list(logits.shape)}, "
                f"not float32 {[rows, self.vocab_size]}"
            )


class _Sequence:
    """One sequence: what it asked for, as arrays, and what its own tokens contribute."""

    def __init__(self, start: SequenceStart, steering: Steering) -> None:
        sampling = self.sampling = start.sampling
        self.steering = steering
        self.outputs = len(start.tokens) - start.prompt_len  # generated so far
        self._draws: list[float] = []  # of the coming positions, the next one last
        self._bias_tokens = np.array(list(sampling.logit_bias), np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)
        allowed = sampling.allowed_token_ids
        self._allowed = None if allowed is None else np.array(allowed, np.int64)
        self._banned = np.array(sampling.banned_token_ids, np.int64)
        self._stops = np.array(sampling.stop_token_ids, np.int64)
        self._min_tokens = sampling.min_tokens if sampling.stop_token_ids else 0
        self._seen = _seen_tokens(start)
        self._always_edits = (
            len(self._bias) > 0
            or self._allowed is not None
            or len(self._banned) > 0
            or self._seen is not None
        )
        self.plain = self._is_plain()

    def choose(self, row: NDArray[np.float32], mask: NDArray[np.int32] | None = None) -> int:
        """The next token, from float32 logits [vocab], which stay as they are.

        `mask`, int32 [ceil(vocab / 32)], has the bits of the tokens that its grammar allows.
        """
        row = self._final(row, mask)
        if self.sampling.temperature == 0:
            return int(row.argmax())
        return kernels.draw(
            row,
            self._uniform(),
            self.sampling.temperature,
            self.sampling.top_k,
            self.sampling.top_p,
            self.sampling.min_p,
        )

    def choose_and_score(
        self, row: NDArray[np.float32], mask: NDArray[np.int32] | None
    ) -> tuple[int, Logprobs | None]:
        """The next token as `choose` has it, and its log-probability if that is asked for.

        A beam's are its best continuations, the first of which nobody has chosen yet.
        """
        top = self.sampling.logprobs
        if self.sampling.beam:
            found = self._continuations(row, mask, top or 0)
            return found.token, found
        token = self.choose(row, mask)
        return token, None if top is None else score_token(row, token, top)

    def _continuations(
        self, row: NDArray[np.float32], mask: NDArray[np.int32] | None, count: int
    ) -> Logprobs:
        check_best(row.max())
        scores = self._final(row - np.float32(kernels.log_normalizer(row)), mask)
        tokens = kernels.largest(scores, count)
        logprobs: list[float] = scores[tokens].tolist()
        return Logprobs(int(tokens[0]), logprobs[0], 1, tokens.tolist(), logprobs)

    def guess(self, row: NDArray[np.float32], ahead: int) -> int:
        sampling = self.sampling
        if sampling.temperature == 0 or not np.isfinite(row.max()):
            return int(row.argmax())
        return kernels.draw(
            row,
            self._uniform(ahead),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
        )

    def may_end(self, token: int) -> bool:
        """Whether the sequence ends with this token, now its last one."""
        sampling = self.sampling
        return token in sampling.stop_token_ids and self.outputs > sampling.min_tokens

    def append(self, token: int) -> None:
        """The chosen token becomes the sequence's last one."""
        self.outputs += 1
        if self.steering.follows:
            self.steering.advance(token)
            self.plain = self._is_plain()
        if self._draws:
            self._draws.pop()
        if self._seen is not None:
            self._seen.add(token)
        if self.outputs == self._min_tokens:
            self.plain = self._is_plain()

    def _is_plain(self) -> bool:
        """Whether the next token is just the row's best one."""
        greedy = self.sampling.temperature == 0 and self.sampling.logprobs is None
        return greedy and not self.steering.follows and not self._edits()

    @property
    def edits(self) -> bool:
        return self.steering.follows or self._edits()

    def _edits(self) -> bool:
        return self._always_edits or self.outputs < self._min_tokens

    def _final(
        self, row: NDArray[np.float32], mask: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        """The row, or if it has to be edited a copy that is."""
        check_best(row.max())
        steering = self.steering
        if fault := steering.fault:
            raise SamplingError(fault)
        if steering.processes:
            row = steering.processed(row.copy())
        if mask is not None or steering.rules is not None or self._edits():
            row = self._edited(row, mask)
        return row

    def _edited(
        self, row: NDArray[np.float32], mask: NDArray[np.int32] | None
    ) -> NDArray[np.float32]:
        row = row.copy() if mask is None else kernels.keep_masked(row, mask)
        if (rules := self.steering.rules) is not None:
            if (forced := rules.forced) is None:
                kernels.ban(row, np.array(rules.banned, np.int64))
            else:
                kernels.keep_only(row, np.array([forced]))
        if len(self._bias):
            kernels.add_bias(row, self._bias_tokens, self._bias)
        if self._allowed is not None:
            kernels.keep_only(row, self._allowed)
        kernels.ban(row, self._banned)
        if self.outputs < self._min_tokens:
            kernels.ban(row, self._stops)
        if self._seen is not None:
            kernels.penalize(
                row,
                self._seen.tokens,
                self._seen.generated,
                self.sampling.repetition_penalty,
                self.sampling.frequency_penalty,
                self.sampling.presence_penalty,
            )
        best = row.max()
        if best == -np.inf:
            raise SamplingError(NONE_LEFT)
        if not np.isfinite(best):
            raise SamplingError(OVERFLOW.format(repetition=self.sampling.repetition_penalty))
        return row

    def _uniform(self, ahead: int = 0) -> float:
        """The draw of the next position, or of one so many after it."""
        if len(self._draws) <= ahead:
            positions = range(self.outputs, self.outputs + ahead + _DRAWS_AHEAD)
            seeds = [self.sampling.seed & _SEED_MASK] * len(positions)
            self._draws = uniform(seeds, positions)[::-1].tolist()
        return self._draws[-1 - ahead]


class _SeenTokens:
    """The distinct tokens of a sequence and how often each was generated.

    Arrays with room to grow: a step costs one update however long the sequence is, and dense counts
    would take a vocabulary's worth of memory a sequence.
    """

    def __init__(self, prompt: Sequence[int], outputs: Sequence[int]) -> None:
        distinct = list(dict.fromkeys([*prompt, *outputs]))
        self._index = {token: i for i, token in enumerate(distinct)}
        self._tokens = np.array(distinct, np.int64)
        counts = Counter(outputs)
        self._generated = np.array([counts[token] for token in distinct], np.int64)

    def add(self, token: int) -> None:
        """`token` was generated once more."""
        index = self._index.setdefault(token, len(self._index))
        if index == len(self._tokens):
            room = np.zeros(max(index, 64), np.int64)
            self._tokens = np.concatenate([self._tokens, room])
            self._generated = np.concatenate([self._generated, room])
        self._tokens[index] = token
        self._generated[index] += 1

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: len(self._index)]

    @property
    def generated(self) -> NDArray[np.int64]:
        return self._generated[: len(self._index)]


def _seen_tokens(start: SequenceStart) -> _SeenTokens | None:
    """What the penalties need to know; only the repetition penalty looks at the prompt."""
    sampling = start.sampling
    prompt, outputs = start.tokens[: start.prompt_len], start.tokens[start.prompt_len :]
    if sampling.repetition_penalty != 1.0:
        return _SeenTokens(prompt, outputs)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        return _SeenTokens([], outputs)
    return None


class Steering:
    """What of a sequence's choices hangs on the tokens before, and so is followed on the host: its
    grammar, the rules of its output, and its logits processors."""

    def __init__(self, start: SequenceStart, guidance: Guidance | None, registry: Registry) -> None:
        self._grammar = bool(start.sampling.grammar)
        self.guide: Guide | None = None
        if guidance is not None and self._grammar:
            self.guide = guidance.guide(start.sampling.grammar, start.tokens[start.prompt_len :])
        self.rules: OutputRules | None = rules_of(start)
        self.chain: ProcessorChain | None = None
        self._broken = ""
        try:
            self.chain = chain_of(start, registry)
        except ProcessorError as error:
            self._broken = str(error)
        #: Whether there is anything: then the next choice waits for the last token.
        self.follows = bool(
            self._grammar or self._broken or self.chain is not None or self.rules is not None
        )

    @property
    def processes(self) -> bool:
        """Whether logits processors have a say in the next token."""
        return self.chain is not None and (self.rules is None or self.rules.forced is None)

    @property
    def fault(self) -> str:
        """Why the sequence can't go on; empty if it can."""
        if self._broken or not self._grammar:
            return self._broken
        if self.guide is None:
            return NO_VOCABULARY
        reason = self.guide.error
        return STUCK.format(reason=reason) if reason else ""

    def processed(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """A row of logits [vocab], which may change, as the logits processors leave it.

        Raises SamplingError for one that fails.
        """
        assert self.chain is not None
        try:
            return self.chain.apply(row)
        except ProcessorError as error:
            raise SamplingError(str(error)) from error

    def advance(self, token: int) -> None:
        """`token` was chosen."""
        if self.guide is not None:
            self.guide.advance(token)
        if self.chain is not None:
            self.chain.append(token)
        if self.rules is not None:
            self.rules.append(token)
            if self.rules.done:
                self.rules = None
                self.follows = self._grammar or self.chain is not None


def check_best(best: np.float32) -> None:
    """Refuses a row by its largest logit: NaN if any is, +inf if any is, -inf if all are."""
    if not np.isfinite(best):
        raise SamplingError(ALL_EXCLUDED if best == -np.inf else NOT_FINITE)


def score_token(row: NDArray[np.float32], token: int, top: int) -> Logprobs:
    """How likely a row of logits [vocab] makes `token`, and its `top` best tokens (-1: all)."""
    scored = kernels.score(row, token, top)
    return Logprobs(
        token=token,
        logprob=scored.logprob,
        rank=scored.rank,
        top_tokens=scored.top_tokens,
        top_logprobs=scored.top_logprobs,
    )
