"""OpenAI's Responses API: the answer's items, whole and as typed events.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from tensorray.cluster.chat_service import ReplyWriter, to_event
from tensorray.cluster.errors import ApiError
from tensorray.cluster.outputs import CompletionOutput, Usage
from tensorray.cluster.reply import Arguments, CallBegins, Part, Reasoning, Text

if TYPE_CHECKING:
    from tensorray.cluster.responses_api import ResponseRequest

Item = dict[str, Any]
Events = list[msgspec.Struct | dict[str, Any]]


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ModelResponse(msgspec.Struct, kw_only=True):
    """The answer: what was asked, and `output`: reasoning, messages and function calls."""

    id: str
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    output: list[Item]
    object: Literal["response"] = "response"
    completed_at: int | None = None
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, str | None]
    safety_identifier: str | None = None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float | None = None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float | None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class ResponseEvent(msgspec.Struct):
    """One event of a stream; each type has fields of its own."""

    type: str
    sequence_number: int


class ResponsesError(ApiError):
    """An error that comes as an event where a stream has begun."""

    @classmethod
    def of(cls, error: ApiError) -> ResponsesError:
        return cls(
            error.status,
            error.message,
            type=error.type,
            param=error.param,
            code=error.code,
            headers=error.headers,
        )

    def event(self) -> bytes:
        told = {"code": self.code or self.type, "message": self.message, "param": self.param}
        return to_event({"type": "error", "sequence_number": 0, **told})


class ResponseAnswer(ReplyWriter):
    """One answer in the making. An item is open until a part of another kind comes."""

    def __init__(self, request: ResponseRequest, model: str) -> None:
        self.id = _new_id("resp")
        options = request.reasoning
        format = request.text.format if request.text is not None else None
        self._response = ModelResponse(
            id=self.id,
            created_at=int(time.time()),
            model=model,
            status="in_progress",
            output=[],
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning={"effort": options.effort if options else None, "summary": None},
            safety_identifier=request.safety_identifier,
            temperature=request.temperature,
            text={"format": format or {"type": "text"}},
            tool_choice=request.tool_choice or "auto",
            tools=request.tools or [],
            top_p=request.top_p,
            user=request.user,
        )
        self._open: Item | None = None
        self._number = 0

    def begin(self, usage: Usage) -> Events:
        return [
            self._event(f"response.{name}", response=msgspec.to_builtins(self._response))
            for name in ("created", "in_progress")
        ]

    def add(self, part: Part) -> Events:
        match part:
            case Text(text):
                events = self._opened("message")
                self._content["text"] += text
                delta = {"content_index": 0, "delta": text, "logprobs": []}
                return [*events, self._of_item("output_text.delta", **delta)]
            case Reasoning(text):
                events = self._opened("reasoning")
                self._content["text"] += text
                delta = {"content_index": 0, "delta": text}
                return [*events, self._of_item("reasoning_text.delta", **delta)]
            case CallBegins(name, id):
                return [*self._close(), *self._open_item(_call_item(name, id))]
            case Arguments(text):
                assert self._open is not None
                self._open["arguments"] += text
                return [self._of_item("function_call_arguments.delta", delta=text)]

    def end(self, output: CompletionOutput, usage: Usage) -> Events:
        response = self._response
        response.status = "incomplete" if output.finish_reason == "length" else "completed"
        if response.status == "incomplete":
            response.incomplete_details = {"reason": "max_output_tokens"}
        events = self._close(response.status)
        response.completed_at = int(time.time())
        response.usage = ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(usage.reasoning_tokens),
            usage.total_tokens,
        )
        last = self._event(f"response.{response.status}", response=msgspec.to_builtins(response))
        return [*events, last]

    def whole(self) -> ModelResponse:
        return self._response

    # --- items ---

    @property
    def _content(self) -> Item:
        """The text that is open."""
        assert self._open is not None
        content: Item = self._open["content"][0]
        return content

    def _opened(self, kind: str) -> Events:
        """Have a text item of this kind open."""
        if self._open is not None and self._open["type"] == kind:
            return []
        item: Item = {"id": _new_id("msg"), "type": kind, "status": "in_progress"}
        part: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if kind == "reasoning":
            item = {**item, "id": _new_id("rs"), "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item["role"] = "assistant"
        events = [*self._close(), *self._open_item({**item, "content": []})]
        assert self._open is not None
        self._open["content"].append(part)
        return [*events, self._of_item("content_part.added", content_index=0, part={**part})]

    def _open_item(self, item: Item) -> Events:
        self._open = item
        self._response.output.append(item)
        return [self._of_item("output_item.added", item=_copy(item))]

    def _close(self, status: str = "completed") -> Events:
        """End the item that is open, if one is."""
        item = self._open
        if item is None:
            return []
        item["status"] = status
        events: Events = []
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._of_item("function_call_arguments.done", **done))
        else:
            part = self._content
            text: Item = {"content_index": 0, "text": part["text"]}
            if item["type"] == "message":
                events.append(self._of_item("output_text.done", **text, logprobs=[]))
            else:
                events.append(self._of_item("reasoning_text.done", **text))
            events.append(self._of_item("content_part.done", content_index=0, part={**part}))
        events.append(self._of_item("output_item.done", item=_copy(item)))
        self._open = None
        return events

    # --- events ---

    def _of_item(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event about the item that is open."""
        assert self._open is not None
        place: dict[str, Any] = {"output_index": len(self._response.output) - 1}
        if "item" not in fields:
            place["item_id"] = self._open["id"]
        return self._event(f"response.{kind}", **place, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number = self._number
        self._number += 1
        return {"type": kind, "sequence_number": number, **fields}


def _call_item(name: str, id: str) -> Item:
    return {
        "id": _new_id("fc"),
        "type": "function_call",
        "status": "in_progress",
        "call_id": id,
        "name": name,
        "arguments": "",
    }


def _copy(item: Item) -> Item:
    return (
        {**item, "content": [{**part} for part in item["content"]]}
        if "content" in item
        else {**item}
    )


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
