"""Anthropic's Messages API: what a request may say, as a chat.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import msgspec
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.chat_service import ChatLikeRequest, ChatService
from tensorray.cluster.messages_answer import Message, MessageAnswer, MessageEvent
from tensorray.cluster.messages_errors import MessageErrorAnswer, MessagesError
from tensorray.cluster.openai_api import ChatRequest
from tensorray.cluster.responses import json_response

VERSIONS = ("2023-06-01", "2026-10-21")  # that have these shapes

_OFF: tuple[object, ...] = (None, False, [], {}, "")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Thinking(_Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, description="max_tokens is the only limit there is")
    display: Literal["summarized"] | None = Field(None, description="thinking is told as it is")


class MessagesToolChoice(_Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ClientMetadata(_Strict):
    user_id: str | None = None


class OutputConfig(_Strict):
    effort: str | None = None
    format: dict[str, Any] | None = None


class CountTokensRequest(ChatLikeRequest):
    """`POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = Field(None, description="every prompt is cached")

    refused: ClassVar[dict[str, tuple[tuple[object, ...], str]]] = {
        "container": (_OFF, "there are no containers here"),
        "mcp_servers": (_OFF, "connect to them from the client"),
        "service_tier": ((None, "auto", "standard_only"), "there is one tier; leave it out"),
        "speed": ((None, "standard"), "there is one speed; leave it out"),
        "inference_geo": (_OFF, "the model runs where the server is"),
        "context_management": (_OFF, "send the context as it should be"),
    }

    def chat(self) -> ChatRequest:
        return ChatRequest.model_validate(
            {name: value for name, value in self._fields().items() if value is not None}
        )

    def _fields(self) -> dict[str, Any]:
        choice = self.tool_choice
        config = self.output_config
        fields: dict[str, Any] = {
            "messages": self._chat_messages(),
            "tools": [_tool(tool, i) for i, tool in enumerate(self.tools or [])] or None,
            # Who says nothing of thinking expects none.
            "enable_thinking": {"enabled": True, "adaptive": None}.get(self.thinking.type, False)
            if self.thinking is not None
            else False,
        }
        if fields["messages"][-1]["role"] == "assistant":  # what the answer begins with
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        if choice is not None:
            named = {"type": "function", "function": {"name": choice.name or ""}}
            fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if config is not None and config.effort is not None:
            fields["reasoning_effort"] = config.effort
        if config is not None and config.format is not None:
            schema = {"name": "output", "schema": config.format.get("schema")}
            fields["response_format"] = {"type": config.format.get("type"), "json_schema": schema}
        return fields

    def _chat_messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        turn: list[str] = []  # texts of the user's turn that is last in `found`
        if self.system is not None:
            found.append({"role": "system", "content": _text(self.system, "system")})
        for i, message in enumerate(self.messages):
            place = f"messages[{i}]"
            role, content = message.get("role"), message.get("content")
            if role not in ("user", "assistant"):
                raise BadRequest(
                    f"{place}.role must be 'user' or 'assistant', not {role!r}; "
                    "what the system says goes into system",
                    param=f"{place}.role",
                )
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(blocks, list) or not all(isinstance(each, dict) for each in blocks):
                raise BadRequest(
                    f"{place}.content must be a string or a list of blocks",
                    param=f"{place}.content",
                )
            if role == "user" and not blocks:
                raise BadRequest(
                    f"{place}.content has no blocks; leave the message out",
                    param=f"{place}.content",
                )
            read = _assistant if role == "assistant" else _user
            for each in read(blocks, f"{place}.content"):
                if each["role"] != "user":
                    found.append(each)
                elif found and found[-1]["role"] == "user":
                    turn.append(each["content"])  # one turn in two messages
                else:
                    turn = [each["content"]]
                    found.append({"role": "user", "content": turn})
        for each in found:
            if each["role"] == "user":
                each["content"] = "\n".join(each["content"])
        return found


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None
    metadata: ClientMetadata | None = None

    def _fields(self) -> dict[str, Any]:
        return {
            **super()._fields(),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "user": self.metadata.user_id if self.metadata is not None else None,
        }


class TokenCount(msgspec.Struct):
    """Answer of /v1/messages/count_tokens."""

    input_tokens: int


def _user(blocks: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """A user's message, after the results of tools that are in it."""
    results, texts = [], []
    for i, block in enumerate(blocks):
        if block.get("type") == "tool_result":
            results.append(
                {
                    "role": "tool",
                    "tool_call_id": block.get("tool_use_id"),
                    "content": _text(block.get("content") or "", f"{place}[{i}].content"),
                }
            )
        else:
            texts.append(_block_text(block, f"{place}[{i}]"))
    return [*results, *([{"role": "user", "content": "\n".join(texts)}] if texts else [])]


def _assistant(blocks: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        match block.get("type"):
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "tool_use":
                arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
                function = {"name": block.get("name"), "arguments": arguments}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case _:
                texts.append(_block_text(block, f"{place}[{i}]"))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) or None}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    else:
        message["content"] = "\n".join(texts)
    return [message]


def _text(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{place} must be a string or a list of text blocks", param=place)
    return "\n".join(_block_text(block, f"{place}[{i}]") for i, block in enumerate(content))


def _block_text(block: object, place: str) -> str:
    kind = block.get("type") if isinstance(block, Mapping) else None
    text = block.get("text") if isinstance(block, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise BadRequest(f"{place} is of type {kind!r}; this server takes text only", param=place)
    return text


def _tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise BadRequest(
            f"tools[{number}] is of type {tool['type']!r}; there are no built-in tools here, only "
            "functions of your own",
            param=f"tools[{number}]",
        )
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
        "strict": tool.get("strict"),
    }
    return {
        "type": "function",
        "function": {name: value for name, value in function.items() if value is not None},
    }


def add_routes(route: Callable[..., None], service: ChatService) -> None:
    """Put the endpoints into an application."""

    async def messages(http: Request) -> Response:
        """Anthropic's messages."""
        _check_version(http)
        return await service.answer(http, MessagesRequest, MessageAnswer, MessagesError.of)

    async def count_tokens(http: Request) -> Response:
        """How many tokens a request for messages has."""
        _check_version(http)
        request, headers, _ = await service.read(http, CountTokensRequest)
        service.chosen(request.model)

        def count() -> int:
            chat = request.chat()
            return len(service.frontend.render(chat.conversation(chat.messages)))

        answer = TokenCount(await asyncio.to_thread(count))
        return json_response(msgspec.json.encode(answer), headers=headers)

    shape = {"error": MessageErrorAnswer}
    route("POST", "/v1/messages", messages, MessagesRequest, Message, MessageEvent, **shape)
    path = "/v1/messages/count_tokens"
    route("POST", path, count_tokens, CountTokensRequest, TokenCount, **shape)


def _check_version(http: Request) -> None:
    if http.headers.get("anthropic-version", VERSIONS[0]) not in VERSIONS:
        raise BadRequest(f"anthropic-version: this server speaks {' and '.join(VERSIONS)}")
