"""From the frontend's outputs to OpenAI's answers: whole, and as a stream's events."""

from __future__ import annotations

import codecs
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing

import msgspec
from msgspec import UNSET, UnsetType

from tensorray.cluster import openai_api as api
from tensorray.cluster.outputs import (
    CompletionOutput,
    RequestOutput,
    RequestOutputDelta,
    TokenLogprob,
    Usage,
)
from tensorray.cluster.reply import Arguments, CallBegins, Part, Reasoning, Text
from tensorray.cluster.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no minus infinity


class Answer(ABC):
    """One request's answer in the making. A choice's index is prompt * n + sequence."""

    def __init__(self, prefix: str, request: api.GenerateRequest, model: str) -> None:
        options = request.stream_options or api.StreamOptions()
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self._n = request.n or 1
        self._top_prompt_logprobs = request.prompt_logprobs
        self._usage_at_end = options.include_usage
        self._usage_always = options.continuous_usage_stats
        self._tells_tokens = bool(request.return_token_ids)
        self._spells_ids = bool(request.return_tokens_as_token_ids)
        self.prompts: Sequence[Sequence[int]] = ()  # their tokens
        self._counts: dict[int, Usage] = {}  # by prompt, so far

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput]) -> msgspec.Struct:
        """The answer to a request that does not stream; one output a prompt."""

    @abstractmethod
    def chunks(self, index: int, output: CompletionOutput) -> Sequence[msgspec.Struct]:
        """What news of one choice adds to a stream."""

    @abstractmethod
    def last_chunk(self, usage: api.Usage) -> msgspec.Struct:
        """The chunk without choices that tells the usage."""

    async def events(
        self, deltas: AsyncGenerator[tuple[int, RequestOutputDelta], None]
    ) -> AsyncGenerator[bytes, None]:
        """The stream, as server-sent events; `deltas` come with their prompt's number."""
        async with aclosing(deltas):
            async for prompt, delta in deltas:
                self._counts[prompt] = delta.usage
                events = b"".join(
                    [
                        api.to_event(chunk)
                        for output in delta.outputs
                        for chunk in self.chunks(prompt * self._n + output.index, output)
                    ]
                )
                if events:
                    yield events
        if self._usage_at_end:
            yield api.to_event(self.last_chunk(self._usage())) + api.DONE
        else:
            yield api.DONE

    def _chunk_usage(self) -> api.Usage | UnsetType | None:
        if self._usage_always:
            return self._usage()
        return None if self._usage_at_end else UNSET

    def _usage(self, counts: Iterable[Usage] | None = None) -> api.Usage:
        counts = list(self._counts.values() if counts is None else counts)
        prompt = sum(count.prompt_tokens for count in counts)
        completion = sum(count.completion_tokens for count in counts)
        cached = sum(count.cached_tokens for count in counts)
        usage = api.Usage(prompt, completion, prompt + completion, api.PromptTokensDetails(cached))
        reasoning = sum(count.reasoning_tokens for count in counts)
        accepted = sum(count.accepted_prediction_tokens for count in counts)
        rejected = sum(count.rejected_prediction_tokens for count in counts)
        if reasoning or accepted or rejected:
            usage.completion_tokens_details = api.CompletionTokensDetails(
                reasoning, accepted, rejected
            )
        return usage


class CompletionAnswer(Answer):
    """`/v1/completions`."""

    def __init__(self, request: api.CompletionRequest, model: str, tokenizer: Tokenizer) -> None:
        super().__init__("cmpl", request, model)
        self._top = request.logprobs
        self._tokenizer = tokenizer
        hidden = request.skip_special_tokens is not False
        self._hidden = tokenizer.special_ids if hidden else frozenset[int]()
        self._logprobs: dict[int, _Offsets] = {}  # by choice
        self._begun: set[int] = set()  # choices that have told their prompt's tokens

    def whole(self, outputs: Sequence[RequestOutput]) -> api.Completion:
        choices = []
        for prompt, answer in enumerate(outputs):
            for output in answer.outputs:
                choice = self._choice(prompt * self._n + output.index, output)
                if answer.prompt_logprobs is not None:
                    choice.prompt_logprobs = prompt_logprobs(
                        answer.prompt_logprobs, self._top_prompt_logprobs or 0
                    )
                choices.append(choice)
        usage = self._usage(answer.usage for answer in outputs)
        return api.Completion(self.id, self.created, self.model, choices, usage=usage)

    def chunks(self, index: int, output: CompletionOutput) -> Sequence[api.Completion]:
        told = output.token_ids if self._tells_tokens else None
        if not (output.text or output.logprobs or output.finish_reason or told):
            return ()
        choices = [self._choice(index, output)]
        usage = self._chunk_usage()
        return (api.Completion(self.id, self.created, self.model, choices, usage=usage),)

    def last_chunk(self, usage: api.Usage) -> api.Completion:
        return api.Completion(self.id, self.created, self.model, [], usage=usage)

    def _choice(self, index: int, output: CompletionOutput) -> api.CompletionChoice:
        choice = api.CompletionChoice(
            index,
            output.text,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        if self._tells_tokens:
            choice.token_ids = output.token_ids
            if index not in self._begun:
                self._begun.add(index)
                choice.prompt_token_ids = list(self.prompts[index // self._n])
        if self._top is not None and output.logprobs is not None:
            offsets = self._logprobs.setdefault(
                index, _Offsets(self._tokenizer, self._hidden, self._top, self._spells_ids)
            )
            choice.logprobs = offsets.spell(output.token_ids, output.logprobs)
        return choice


class ChatAnswer(Answer):
    """`/v1/chat/completions`."""

    def __init__(self, request: api.ChatRequest, model: str) -> None:
        super().__init__("chatcmpl", request, model)
        self._top = (request.top_logprobs or 0) if request.logprobs else None
        self._tells_reasoning = request.include_reasoning is not False
        self._metadata = request.metadata
        self._opened: set[int] = set()  # choices that have told their role
        self._calls: dict[int, int] = {}  # calls so far, by choice

    def whole(self, outputs: Sequence[RequestOutput]) -> api.ChatCompletion:
        (answer,) = outputs
        choices = [
            api.ChatChoice(
                output.index,
                self._message(output),
                self._spelled(output),
                "tool_calls"
                if output.finish_reason == "stop" and output.reply.tool_calls
                else output.finish_reason,
                output.stop_reason,
                output.token_ids if self._tells_tokens else UNSET,
            )
            for output in answer.outputs
        ]
        whole = api.ChatCompletion(
            self.id, self.created, self.model, choices, self._usage([answer.usage])
        )
        if self._metadata is not None:
            whole.metadata = self._metadata
        if self._tells_tokens:
            whole.prompt_token_ids = answer.prompt_token_ids
        if answer.prompt_logprobs is not None:
            whole.prompt_logprobs = prompt_logprobs(
                answer.prompt_logprobs, self._top_prompt_logprobs or 0
            )
        return whole

    def chunks(self, index: int, output: CompletionOutput) -> Sequence[api.ChatCompletionChunk]:
        parts = output.parts
        if parts is None:
            parts = [Text(output.text)] if output.text else []
        deltas = [delta for part in parts if (delta := self._delta(index, part)) is not None]
        told = output.token_ids if self._tells_tokens else None
        if not deltas:
            if not (output.logprobs or output.finish_reason or told):
                return ()
            deltas = [api.ChatDelta()]
        if index not in self._opened:
            self._opened.add(index)
            deltas[0].role = "assistant"
            if deltas[0].content is UNSET:
                deltas[0].content = ""
        choices = [api.ChatChunkChoice(index, delta) for delta in deltas]
        choices[0].logprobs = self._spelled(output)
        if told is not None:
            choices[0].token_ids = told
        if output.finish_reason is not None:
            called = output.finish_reason == "stop" and index in self._calls
            choices[-1].finish_reason = "tool_calls" if called else output.finish_reason
            choices[-1].stop_reason = output.stop_reason
        usage = self._chunk_usage()
        chunks = [
            api.ChatCompletionChunk(self.id, self.created, self.model, [choice], usage=usage)
            for choice in choices
        ]
        if self._tells_tokens and self.prompts:
            chunks[0].prompt_token_ids = list(self.prompts[0])
            self.prompts = ()
        return chunks

    def last_chunk(self, usage: api.Usage) -> api.ChatCompletionChunk:
        return api.ChatCompletionChunk(self.id, self.created, self.model, [], usage=usage)

    def _message(self, output: CompletionOutput) -> api.ChatMessage:
        reply = output.reply
        message = api.ChatMessage(reply.content if reply.content or not reply.tool_calls else None)
        if reply.reasoning and self._tells_reasoning:
            message.reasoning_content = message.reasoning = reply.reasoning
        if reply.tool_calls:
            message.tool_calls = [
                api.ToolCall(api.CalledFunction(call.arguments, call.name), call.id)
                for call in reply.tool_calls
            ]
        return message

    def _delta(self, index: int, part: Part) -> api.ChatDelta | None:
        delta = api.ChatDelta()
        match part:
            case Text(text):
                delta.content = text
            case Reasoning(text):
                if not self._tells_reasoning:
                    return None
                delta.reasoning_content = delta.reasoning = text
            case CallBegins(name, id):
                number = self._calls.get(index, 0)
                self._calls[index] = number + 1
                function = api.CalledFunction("", name)
                delta.tool_calls = [api.ToolCallDelta(number, function, id, "function")]
            case Arguments(text):
                function = api.CalledFunction(text)
                delta.tool_calls = [api.ToolCallDelta(self._calls[index] - 1, function)]
        return delta

    def _spelled(self, output: CompletionOutput) -> api.ChoiceLogprobs | None:
        if self._top is None or output.logprobs is None:
            return None
        return chat_logprobs(output.logprobs, self._top, self._spells_ids)


# --- log-probabilities, in the three shapes that the API has for them -------------------------


def chat_logprobs(
    entries: Iterable[TokenLogprob | None], top: int, as_ids: bool = False
) -> api.ChoiceLogprobs:
    """Chat's: each token with its `top` likeliest alternatives."""
    return api.ChoiceLogprobs(
        [
            api.TokenLogprob(
                _name(entry, as_ids),
                _finite(entry.logprob),
                list(entry.bytes),
                [
                    api.TopLogprob(_name(other, as_ids), _finite(other.logprob), list(other.bytes))
                    for other in _likeliest(entry, top)
                ],
            )
            for entry in entries
            if entry is not None
        ]
    )


class _Offsets:
    """Completions': parallel lists. Keeps one choice's offsets from chunk to chunk.

    An offset is where the token's text starts in the choice's text, in characters; a token that
    is part of a character starts where that character does, and a hidden one (a special token
    that the text leaves out) takes no room.
    """

    def __init__(
        self, tokenizer: Tokenizer, hidden: frozenset[int], top: int, as_ids: bool = False
    ) -> None:
        self._as_ids = as_ids
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._top = top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def spell(
        self, tokens: Sequence[int], entries: Sequence[TokenLogprob | None]
    ) -> api.CompletionLogprobs:
        shape = api.CompletionLogprobs()
        for token, entry in zip(tokens, entries, strict=True):
            text = _id_name(token) if self._as_ids else self._tokenizer.token_text(token)
            shape.tokens.append(text)
            shape.text_offset.append(self._offset)
            if token not in self._hidden:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes[token]))
            if entry is None:  # an echoed prompt's first token: nothing came before it
                shape.token_logprobs.append(None)
                shape.top_logprobs.append(None)
                continue
            top = {
                _name(other, self._as_ids): _finite(other.logprob)
                for other in reversed(_likeliest(entry, self._top))
            }
            top.setdefault(
                _name(entry, self._as_ids), _finite(entry.logprob)
            )  # OpenAI reports the choice too
            shape.token_logprobs.append(_finite(entry.logprob))
            shape.top_logprobs.append(top)
        return shape


def prompt_logprobs(
    entries: Iterable[TokenLogprob | None], top: int
) -> list[dict[str, api.PromptLogprob] | None]:
    """vLLM's, for prompts: by token id, the prompt's own token and the likeliest `top`."""
    return [
        None
        if entry is None
        else {
            str(each.token_id): api.PromptLogprob(_finite(each.logprob), each.rank, each.text)
            for each in (entry, *_likeliest(entry, top))
        }
        for entry in entries
    ]


def _likeliest(entry: TokenLogprob, top: int) -> tuple[TokenLogprob, ...]:
    """The `top` likeliest tokens at the entry's position; -1: all that were reported."""
    return entry.top if top < 0 else entry.top[:top]


def _name(entry: TokenLogprob, as_id: bool) -> str:
    return _id_name(entry.token_id) if as_id else entry.text


def _id_name(token: int) -> str:
    """A token's name that no other one has; two may have the same text."""
    return f"token_id:{token}"


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
