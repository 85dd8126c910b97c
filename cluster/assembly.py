"""From the engine's deltas to what the user asked for: one assembler a request.

The engine speaks tokens; this adds text, ends sequences at stop strings, echoes the prompt, and
spells out log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from tensorray.actors.protocol import Logprobs
from tensorray.cluster.detokenizer import OutputText
from tensorray.cluster.outputs import (
    CompletionOutput,
    RequestOutput,
    RequestOutputDelta,
    TokenLogprob,
    Usage,
)
from tensorray.cluster.reply import joined
from tensorray.cluster.reply_format import ReplyFormat, ReplyReader
from tensorray.cluster.request import Delta, GenerationRequest, RequestRefused
from tensorray.cluster.sampling_params import SamplingParams
from tensorray.cluster.tokenizer import Tokenizer


class GenerationFailed(RuntimeError):
    """The engine gave a sequence up; carries its reason."""


@dataclass(frozen=True)
class PreparedRequest:
    """A request to the engine, and what its answer needs besides.

    `prompt` is the prompt's text, None if it came as token ids; `reply` how a chat's answer is
    taken apart, None where it is text alone.
    """

    request: GenerationRequest
    params: SamplingParams
    prompt: str | None = None
    echo: bool = False
    only_echo: bool = False  # and nothing of what is generated after it
    reply: ReplyFormat | None = None

    @property
    def ranks(self) -> bool:
        """Whether more sequences run than are returned, the best being chosen at the end."""
        return self.request.n > self.params.n


class Assembler:
    """Takes one request's deltas in order and says what each adds to the answer."""

    def __init__(self, tokenizer: Tokenizer, prepared: PreparedRequest) -> None:
        self._tokenizer = tokenizer
        self._prepared = prepared
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}  # by sequence index
        self._prompt_logprobs_sent = False
        self._cached_tokens = 0
        self._drafts: dict[int, tuple[int, int]] = {}  # by sequence: guessed, of these right
        self._sequences = [_Sequence(tokenizer, prepared, i) for i in range(prepared.request.n)]

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        # Asked with each token, and a list takes half the time that a generator does.
        return all([sequence.finished for sequence in self._sequences])  # noqa: C419

    def add(self, deltas: Sequence[Delta]) -> tuple[RequestOutputDelta, list[int]]:
        """What these deltas add, and the sequences that a stop string has ended just now.

        The engine does not know about the latter yet. Raises GenerationFailed for a delta that
        reports an error, RequestRefused if it is of the request's own making.
        """
        outputs, stopped = [], []
        for delta in deltas:
            if delta.refused:
                raise RequestRefused(delta.error)
            if delta.finish_reason == "error":
                raise GenerationFailed(delta.error or "the engine failed on this request")
            self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
            if delta.drafted:
                self._drafts[delta.index] = delta.drafted, delta.accepted
            if delta.prompt_logprobs:
                known = self._prompt_logprobs.setdefault(delta.index, [None])
                known += [self._spell(entry) for entry in delta.prompt_logprobs]
            sequence = self._sequences[delta.index]
            if sequence.finished:
                continue  # tokens that were under way when a stop string ended it
            output = sequence.add(delta, self._known_prompt_logprobs())
            if output is None:
                continue
            outputs.append(output)
            if output.finish_reason is not None and delta.finish_reason is None:
                stopped.append(delta.index)
        return (
            RequestOutputDelta(
                request_id=self._prepared.request.request_id,
                outputs=outputs,
                prompt_logprobs=self._new_prompt_logprobs(),
                finished=self.finished,
                usage=self._usage(),
            ),
            stopped,
        )

    def result(self, deltas: Sequence[RequestOutputDelta]) -> RequestOutput:
        """The whole answer from all its deltas; of more sequences than asked for, the best."""
        prepared = self._prepared
        parts: list[list[CompletionOutput]] = [[] for _ in range(prepared.request.n)]
        for delta in deltas:
            for output in delta.outputs:
                parts[output.index].append(output)
        merged = [_merge(i, each) for i, each in enumerate(parts)]
        if prepared.ranks:
            echoed = len(prepared.request.prompt) if prepared.echo else 0
            merged.sort(key=lambda output: _mean_logprob(output, echoed), reverse=True)
            merged = merged[: prepared.params.n]
            for index, output in enumerate(merged):
                output.index = index
                if prepared.params.logprobs is None:
                    output.logprobs = output.cumulative_logprob = None
        if prepared.request.beams is not None:  # a grammar may have fewer answers than asked for
            found = [output for output in merged if self._sequences[output.index].generated]
            merged = found or merged
        return RequestOutput(
            request_id=prepared.request.request_id,
            prompt=prepared.prompt,
            prompt_token_ids=prepared.request.prompt,
            outputs=merged,
            prompt_logprobs=next(
                (d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None
            ),
            num_cached_tokens=self._cached_tokens,
            finished=self.finished,
            usage=self._usage(),
        )

    def _usage(self) -> Usage:
        generated = reasoning = right = wrong = 0
        for sequence in self._sequences:  # once a token, so there are no generators to sum
            generated += sequence.generated
            reasoning += sequence.reasoning_tokens
        for guessed, accepted in self._drafts.values():
            right += accepted
            wrong += guessed - accepted
        prompt = len(self._prepared.request.prompt)
        return Usage(prompt, generated, self._cached_tokens, reasoning, right, wrong)

    def _known_prompt_logprobs(self) -> list[TokenLogprob | None]:
        """The longest list: sequences share the prompt, and not each need report it."""
        return max(self._prompt_logprobs.values(), key=len, default=[None])

    def _new_prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        if self._prompt_logprobs_sent or self._prepared.params.prompt_logprobs is None:
            return None
        known = self._known_prompt_logprobs()
        if len(known) < len(self._prepared.request.prompt):
            return None
        self._prompt_logprobs_sent = True
        return known

    def _spell(self, entry: Logprobs) -> TokenLogprob:
        return spell_logprob(self._tokenizer, entry)


class _Sequence:
    """One sequence of the request."""

    def __init__(self, tokenizer: Tokenizer, prepared: PreparedRequest, index: int) -> None:
        params = prepared.params
        self._tokenizer = tokenizer
        self._prepared = prepared
        self._index = index
        self._stop_ids = set(params.stop_token_ids)
        self._echo = prepared.echo
        self._wants_logprobs = params.logprobs is not None or prepared.ranks
        self._sums_logprobs = self._wants_logprobs or prepared.request.beams is not None
        self._cumulative = 0.0
        self._text = (
            OutputText(
                tokenizer,
                prompt=prepared.request.prompt,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                shown=prepared.reply.shown if prepared.reply is not None else frozenset(),
                min_tokens=params.min_tokens,
            )
            if params.detokenize
            else None
        )
        self._reply = ReplyReader(prepared.reply, tokenizer) if prepared.reply else None
        self.generated = 0
        self.finished = False

    @property
    def reasoning_tokens(self) -> int:
        return self._reply.reasoning_tokens if self._reply is not None else 0

    def add(
        self, delta: Delta, prompt_logprobs: list[TokenLogprob | None]
    ) -> CompletionOutput | None:
        if self._prepared.only_echo:
            delta = _without_tokens(delta)
        reason = delta.finish_reason
        stop_reason: str | int | None = None
        if delta.stop_token is not None and delta.stop_token in self._stop_ids:
            stop_reason = delta.stop_token
        tokens = delta.tokens
        text = ""
        if self._text is not None:
            # The token that ends a sequence is not part of its text.
            unseen = delta.stop_token is not None and not self._shows_stop
            text = self._text.push(tokens[:-1] if unseen else tokens)
            stopped = self._text.stopped()
            if stopped is not None:
                reason, stop_reason = "stop", stopped
                tokens = tokens[: self._text.taken]
            elif reason is not None:
                text += self._text.finish()
        self.generated += len(tokens)
        self.finished = reason is not None
        if not tokens and not text and not self.finished:
            return None
        output = CompletionOutput(
            index=self._index,
            text=text,
            token_ids=tokens,
            finish_reason=reason,
            stop_reason=stop_reason,
        )
        if self._reply is not None:
            output.parts = self._reply.push(text, tokens)
            if self.finished:
                output.parts += self._reply.finish()
        if self._sums_logprobs:
            entries = delta.logprobs[: len(tokens)]
            self._cumulative += sum(entry.logprob for entry in entries)
            output.cumulative_logprob = self._cumulative
            if self._wants_logprobs:
                output.logprobs = [spell_logprob(self._tokenizer, entry) for entry in entries]
        if self._echo:
            self._echo = False
            self._put_prompt_before(output, prompt_logprobs)
        return output

    @property
    def _shows_stop(self) -> bool:
        return self._prepared.params.include_stop_str_in_output

    def _put_prompt_before(
        self, output: CompletionOutput, prompt_logprobs: list[TokenLogprob | None]
    ) -> None:
        prepared = self._prepared
        tokens = prepared.request.prompt
        output.token_ids = [*tokens, *output.token_ids]
        if self._text is not None:
            prompt = prepared.prompt
            if prompt is None:
                prompt = self._tokenizer.decode(
                    tokens, skip_special_tokens=prepared.params.skip_special_tokens
                )
            output.text = prompt + output.text
        if output.logprobs is not None:
            unknown = [None] * (len(tokens) - len(prompt_logprobs))
            output.logprobs = [*prompt_logprobs, *unknown, *output.logprobs]


def _without_tokens(delta: Delta) -> Delta:
    reason = "length" if delta.finish_reason == "stop" else delta.finish_reason
    return msgspec.structs.replace(
        delta, tokens=[], logprobs=[], stop_token=None, finish_reason=reason
    )


def spell_logprob(tokenizer: Tokenizer, entry: Logprobs) -> TokenLogprob:
    """A shard's log-probabilities with tokens as text."""

    def one(
        token: int, logprob: float, rank: int, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        data = tokenizer.token_bytes[token]
        return TokenLogprob(token, data.decode("utf-8", "replace"), data, logprob, rank, top)

    top = tuple(
        one(token, logprob, rank)
        for rank, (token, logprob) in enumerate(
            zip(entry.top_tokens, entry.top_logprobs, strict=True), 1
        )
    )
    return one(entry.token, entry.logprob, entry.rank, top)


def _merge(index: int, parts: Sequence[CompletionOutput]) -> CompletionOutput:
    """A sequence's whole output from its deltas."""
    whole = CompletionOutput(
        index=index,
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
    )
    if parts:
        last = parts[-1]
        whole.cumulative_logprob = last.cumulative_logprob
        whole.finish_reason, whole.stop_reason = last.finish_reason, last.stop_reason
        if last.parts is not None:
            whole.parts = joined([each for part in parts for each in part.parts or []])
        if last.logprobs is not None:
            whole.logprobs = [entry for part in parts for entry in part.logprobs or []]
    return whole


def _mean_logprob(output: CompletionOutput, echoed: int) -> float:
    """Log-probability per generated token, OpenAI's measure for best_of.

    The first `echoed` tokens are the prompt's, which `cumulative_logprob` does not count.
    """
    generated = len(output.token_ids) - echoed
    if generated < 1 or output.cumulative_logprob is None:
        return float("-inf")
    return output.cumulative_logprob / generated
