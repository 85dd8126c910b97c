"""Other APIs' ways to ask for a chat: each makes a ChatRequest of its own request, and its own
answer of the parts of the reply."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

import msgspec
from fastapi import Request
from starlette.responses import Response

from tensorray.cluster.errors import ApiError
from tensorray.cluster.frontend import EngineClient, Frontend, PreparedRequest
from tensorray.cluster.openai_api import ApiRequest, ChatRequest
from tensorray.cluster.outputs import CompletionOutput, RequestOutput, RequestOutputDelta, Usage
from tensorray.cluster.reply import Part, Reasoning, Text
from tensorray.cluster.responses import EventStream, WholeResponse

Explain = Callable[[Exception], Awaitable[ApiError]]


class ChatLikeRequest(ApiRequest, ABC):
    """A request that is a chat by another name."""

    stream: bool | None = False

    @abstractmethod
    def chat(self) -> ChatRequest:
        """The same as OpenAI's chat has it. Raises BadRequest or ApiError."""

    @property
    def takes_long(self) -> bool:
        return True  # it is translated, and may bring schemas


Q = TypeVar("Q", bound=ChatLikeRequest)


class ReplyWriter(ABC):
    """Writes one answer in an API's own shapes, from the parts of a reply as they come."""

    id: str

    @abstractmethod
    def begin(self, usage: Usage) -> list[msgspec.Struct | dict[str, Any]]:
        """The events before the first part."""

    @abstractmethod
    def add(self, part: Part) -> list[msgspec.Struct | dict[str, Any]]:
        """The events of one part."""

    @abstractmethod
    def end(self, output: CompletionOutput, usage: Usage) -> list[msgspec.Struct | dict[str, Any]]:
        """The events after the last part; `output` tells why it is the last."""

    @abstractmethod
    def whole(self) -> msgspec.Struct | dict[str, Any]:
        """The whole answer, once it has ended."""


Event = msgspec.Struct | dict[str, Any]


class ChatService:
    """Answers such requests, over a frontend and a client of its engine."""

    def __init__(
        self,
        frontend: Frontend,
        client: EngineClient,
        read: Callable[..., Awaitable[Any]],
        chosen: Callable[[str | None], tuple[str, str]],
        explain: Explain,
    ) -> None:
        """`read` reads a request, `chosen` finds the model it names, `explain` tells an error."""
        self.frontend = frontend
        self.read = read
        self.chosen = chosen
        self._client = client
        self._explain = explain

    async def answer(
        self,
        http: Request,
        kind: type[Q],
        writer: Callable[[Q, str], ReplyWriter],
        shaped: Callable[[ApiError], ApiError],
    ) -> Response:
        """`writer` makes an answer to a request under a model's name; `shaped` puts errors into
        the API's shape."""
        request, headers, large = await self.read(http, kind)
        name, lora = self.chosen(request.model)
        answer = writer(request, name)

        def prepare() -> PreparedRequest:
            chat = request.chat()
            return self.frontend.converse(
                chat.conversation(chat.messages),
                self.frontend.params(**chat.sampling()),
                request_id=answer.id,
                priority=chat.priority or 0,
                user=chat.user or chat.safety_identifier or "",
                cache_salt=chat.cache_salt or "",
                lora=lora,
            )

        async def explain(error: Exception) -> ApiError:
            return shaped(await self._explain(error))

        prepared = await asyncio.to_thread(prepare) if large else prepare()
        if request.stream:
            deltas = self.frontend.stream(self._client, prepared)
            return EventStream(_events(answer, deltas), explain, headers)

        async def whole() -> bytes:
            output = await self.frontend.collect(self._client, prepared)
            return _whole(answer, output)

        return WholeResponse(whole(), explain, headers)


def parts_of(output: CompletionOutput) -> Sequence[Part]:
    if output.parts is not None:
        return output.parts
    return [Text(output.text)] if output.text else []


def is_text(part: Part) -> bool:
    return isinstance(part, Text | Reasoning)


def _whole(answer: ReplyWriter, output: RequestOutput) -> bytes:
    (only,) = output.outputs
    answer.begin(output.usage)
    for part in parts_of(only):
        answer.add(part)
    answer.end(only, output.usage)
    return msgspec.json.encode(answer.whole())


async def _events(
    answer: ReplyWriter, deltas: AsyncIterator[RequestOutputDelta]
) -> AsyncGenerator[bytes, None]:
    begun = False
    async with aclosing(cast(AsyncGenerator[RequestOutputDelta, None], deltas)) as items:
        async for delta in items:
            found: list[Event] = []
            if not begun:
                begun = True
                found += answer.begin(delta.usage)
            for output in delta.outputs:
                for part in parts_of(output):
                    found += answer.add(part)
                if output.finish_reason is not None:
                    found += answer.end(output, delta.usage)
            if found:
                yield b"".join(map(to_event, found))


def to_event(event: Event) -> bytes:
    """One server-sent event, named by its type."""
    data = msgspec.json.encode(event)
    name = (
        msgspec.to_builtins(event)["type"] if isinstance(event, msgspec.Struct) else event["type"]
    )
    return b"event: " + str(name).encode() + b"\ndata: " + data + b"\n\n"
