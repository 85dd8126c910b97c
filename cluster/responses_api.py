"""OpenAI's Responses API: what a request may say, as a chat.

Nothing is stored: `previous_response_id` and `store` would have to be answered by whichever
process a request reaches, so a client sends the whole conversation.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.chat_fields import Metadata
from tensorray.cluster.chat_service import ChatLikeRequest, ChatService
from tensorray.cluster.openai_api import ChatRequest
from tensorray.cluster.responses_answer import (
    ModelResponse,
    ResponseAnswer,
    ResponseEvent,
    ResponsesError,
)

_OFF: tuple[object, ...] = (None, False, [], {}, "")
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text")


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponseRequest(ChatLikeRequest):
    """`POST /v1/responses`."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    include: list[str] | None = Field(None, description="reasoning is always told in clear")
    max_tool_calls: int | None = Field(None, description="of built-in tools, of which are none")
    chat_template_kwargs: dict[str, Any] | None = None

    refused: ClassVar[dict[str, tuple[tuple[object, ...], str]]] = {
        "previous_response_id": (_OFF, "answers are not stored; send the whole conversation"),
        "conversation": (_OFF, "conversations are not stored; send the whole one"),
        "store": (_OFF, "answers are not stored; send false"),
        "background": (_OFF, "an answer comes with its request"),
        "prompt": (_OFF, "there are no stored prompts; send input"),
        "truncation": ((None, "disabled"), "shorten the input before sending it"),
        "top_logprobs": ((None, 0), "log-probabilities are told by chat completions"),
        "stream_options": (
            (None, {}, {"include_obfuscation": False}),
            "events have no padding",
        ),
        "service_tier": ((None, "auto", "default"), "there is one tier; leave it out"),
        "prompt_cache_options": ((None, {}, {"mode": "implicit"}), "all prompts are cached alike"),
        "prompt_cache_retention": ((None, "in_memory"), "prompts are cached in memory only"),
        "moderation": (_OFF, "nothing is moderated here"),
        "context_management": (_OFF, "send the context as it should be"),
        "image": (_OFF, "only text can be generated"),
        "access_programs": (_OFF, "there are none"),
        "background_options": (_OFF, "an answer comes with its request"),
    }

    def chat(self) -> ChatRequest:
        for each in self.include or []:
            if each != "reasoning.encrypted_content":
                raise BadRequest(f"include: {each} is not told here", param="include")
        fields: dict[str, Any] = {
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_tool(tool, i) for i, tool in enumerate(self.tools or [])] or None,
            "tool_choice": _choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
            for summary in (self.reasoning.summary, self.reasoning.generate_summary):
                if summary not in (None, "auto"):
                    raise BadRequest(
                        "reasoning.summary: reasoning is told as it is; leave it out",
                        param="reasoning.summary",
                    )
        if self.text is not None:
            if self.text.verbosity not in (None, "medium"):
                raise BadRequest(
                    "text.verbosity: say in the input how long the answer should be",
                    param="text.verbosity",
                )
            fields["response_format"] = _format(self.text.format)
        return ChatRequest.model_validate(
            {name: value for name, value in fields.items() if value is not None}
        )

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        reasoning = ""
        for i, item in enumerate(self.input):
            place = f"input[{i}]"
            match item.get("type", "message"):
                case "message":
                    message = _message(item, place)
                case "function_call":
                    call = {
                        "id": item.get("call_id"),
                        "type": "function",
                        "function": {
                            "name": item.get("name"),
                            "arguments": item.get("arguments", "{}"),
                        },
                    }
                    last = messages[-1] if messages else {}
                    if last.get("role") == "assistant" and not reasoning:
                        last.setdefault("tool_calls", []).append(call)
                        continue
                    message = {"role": "assistant", "content": None, "tool_calls": [call]}
                case "function_call_output":
                    message = {
                        "role": "tool",
                        "tool_call_id": item.get("call_id"),
                        "content": _text(item.get("output"), f"{place}.output"),
                    }
                case "reasoning":
                    reasoning = _text(item.get("content") or [], f"{place}.content")
                    continue
                case other:
                    raise BadRequest(
                        f"{place} is of type {other!r}; messages, reasoning, function calls and "
                        "their outputs are taken",
                        param=place,
                    )
            if reasoning and message["role"] == "assistant":
                message["reasoning_content"] = reasoning
            reasoning = ""
            messages.append(message)
        return messages


def _message(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = item.get("role")
    content = _text(item.get("content"), f"{place}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _text(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{place} must be a string or a list of text parts", param=place)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise BadRequest(
                f"{place}[{i}] is of type {kind!r}; this server takes text only",
                param=f"{place}[{i}]",
            )
    return "\n".join(texts)


def _tool(tool: Mapping[str, Any], number: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise BadRequest(
            f"tools[{number}] is of type {tool.get('type')!r}; there are no built-in tools here, "
            "only functions",
            param=f"tools[{number}]",
        )
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in known if name in tool}}


def _choice(choice: object) -> Any:
    if not isinstance(choice, Mapping):
        return choice  # a string, or refused with the chat
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        tools = [_choice(tool) for tool in listed] if isinstance(listed, list) else listed
        allowed = {"mode": choice.get("mode"), "tools": tools}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    raise BadRequest(
        f"tool_choice is of type {choice.get('type')!r}; there are functions only",
        param="tool_choice",
    )


def _format(format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if format is None or format.get("type") != "json_schema":
        return None if format is None else dict(format)
    inner = {key: value for key, value in format.items() if key != "type"}
    return {"type": "json_schema", "json_schema": inner}


def add_routes(route: Callable[..., None], service: ChatService) -> None:
    """Put the endpoint into an application."""

    async def responses(http: Request) -> Response:
        """OpenAI's responses, without anything stored."""
        return await service.answer(http, ResponseRequest, ResponseAnswer, ResponsesError.of)

    route("POST", "/v1/responses", responses, ResponseRequest, ModelResponse, ResponseEvent)
