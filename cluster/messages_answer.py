"""Anthropic's Messages API: the answer's blocks, whole and as events.

https://docs.anthropic.com/en/api/messages-streaming
"""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from tensorray.cluster.chat_service import ReplyWriter
from tensorray.cluster.outputs import CompletionOutput, Usage
from tensorray.cluster.reply import Arguments, CallBegins, Part, Reasoning, Text

if TYPE_CHECKING:
    from tensorray.cluster.messages_api import MessagesRequest

Events = list[msgspec.Struct | dict[str, Any]]


class MessageUsage(msgspec.Struct):
    """`input_tokens` are those that no cache had."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class Message(msgspec.Struct):
    """The answer; `content` is blocks of thinking, text and tool use."""

    id: str
    model: str
    content: list[dict[str, Any]]
    usage: MessageUsage
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None = None
    stop_sequence: str | None = None


class MessageEvent(msgspec.Struct):
    """One event of a stream; each type has fields of its own."""

    type: str


class MessageAnswer(ReplyWriter):
    """One answer in the making. A block is open until a part of another kind comes."""

    def __init__(self, request: MessagesRequest, model: str) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._message = Message(self.id, model, [], MessageUsage(0, 0))
        self._open: dict[str, Any] | None = None
        self._arguments = ""

    def begin(self, usage: Usage) -> Events:
        self._message.usage = _usage(usage)
        self._message.usage.output_tokens = 0
        return [
            {"type": "message_start", "message": msgspec.to_builtins(self._message)},
            {"type": "ping"},
        ]

    def add(self, part: Part) -> Events:
        match part:
            case Text(text):
                events = self._opened({"type": "text", "text": ""})
                assert self._open is not None
                self._open["text"] += text
                return [*events, self._delta({"type": "text_delta", "text": text})]
            case Reasoning(text):
                events = self._opened({"type": "thinking", "thinking": "", "signature": ""})
                assert self._open is not None
                self._open["thinking"] += text
                return [*events, self._delta({"type": "thinking_delta", "thinking": text})]
            case CallBegins(name, id):
                block = {"type": "tool_use", "id": id, "name": name, "input": {}}
                return [*self._close(), *self._opened(block)]
            case Arguments(text):
                self._arguments += text
                return [self._delta({"type": "input_json_delta", "partial_json": text})]

    def end(self, output: CompletionOutput, usage: Usage) -> Events:
        message = self._message
        events = self._close()
        called = any(block["type"] == "tool_use" for block in message.content)
        if output.finish_reason == "length":
            message.stop_reason = "max_tokens"
        elif isinstance(output.stop_reason, str):
            message.stop_reason = "stop_sequence"
            message.stop_sequence = output.stop_reason
        else:
            message.stop_reason = "tool_use" if called else "end_turn"
        message.usage = _usage(usage)
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        told = msgspec.to_builtins(message.usage)
        return [
            *events,
            {"type": "message_delta", "delta": delta, "usage": told},
            {"type": "message_stop"},
        ]

    def whole(self) -> Message:
        return self._message

    def _opened(self, block: dict[str, Any]) -> Events:
        """Have a block of this type open."""
        if self._open is not None and self._open["type"] == block["type"]:
            return []
        events = self._close()
        self._open = block
        self._message.content.append(block)
        start = {"type": "content_block_start", "index": self._index, "content_block": {**block}}
        return [*events, start]

    def _close(self) -> Events:
        block, self._open = self._open, None
        if block is None:
            return []
        events: Events = []
        if block["type"] == "tool_use":
            block["input"] = _parsed(self._arguments)
            self._arguments = ""
        elif block["type"] == "thinking":
            events.append(self._delta({"type": "signature_delta", "signature": ""}))
        return [*events, {"type": "content_block_stop", "index": self._index}]

    @property
    def _index(self) -> int:
        return len(self._message.content) - 1

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _usage(usage: Usage) -> MessageUsage:
    return MessageUsage(
        usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens, usage.cached_tokens
    )


def _parsed(arguments: str) -> dict[str, Any]:
    """A call's arguments; none of those that were cut short."""
    try:
        value = json.loads(arguments or "{}")
        # An escape may stand for half a character, which no text can hold.
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
