"""What a user gets back: texts, tokens and log-probabilities, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorray.cluster.reply import Part, Reply
from tensorray.cluster.request import FinishReason


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability (natural logarithm) and its rank, 1 being the most likely.

    `text` is the token alone; where it is only part of a character, `text` has U+FFFD and `bytes`
    the truth. `top` are the likeliest tokens at the position, best first, as many as were asked
    for; they have no `top` of their own.
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...] = ()


@dataclass
class CompletionOutput:
    """One generated sequence.

    `token_ids` includes the token that ended it; `text` includes neither that nor the stop string
    unless asked to. `cumulative_logprob` and `logprobs` are None unless log-probabilities were
    asked for. With echo, all three begin with the prompt's, whose first token has None for its
    log-probability. `stop_reason` is the stop string or stop token id that ended the sequence;
    None where the model's own EOS or the length did. `parts` is the text taken apart, in order, for
    chats whose answers have more than text in them.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    parts: list[Part] | None = None

    @property
    def reply(self) -> Reply:
        """What the text says: its content, the reasoning before it, and calls of tools."""
        return Reply(self.text) if self.parts is None else Reply.of(self.parts)


@dataclass(frozen=True)
class Usage:
    """Token counts. `completion_tokens` counts every generated token, best_of's losers too;
    `cached_tokens` are prompt tokens that came from the prefix cache, `reasoning_tokens` generated
    ones that came before the answer proper. Of the tokens that speculative decoding guessed,
    `accepted_prediction_tokens` were right and are part of the answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass
class RequestOutput:
    """A whole answer. `prompt` is None if the request gave token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True
    usage: Usage = field(default_factory=Usage)


@dataclass
class RequestOutputDelta:
    """What an answer gained since the last delta.

    Each output's `text`, `token_ids` and `logprobs` are what is new (`cumulative_logprob` is the
    sum so far); an output whose text is held back has tokens and no text. `usage` is the count so
    far. `prompt_logprobs` come once, when all are known.
    """

    request_id: str
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finished: bool = False
    usage: Usage = field(default_factory=Usage)
