"""What a chat request says beside its messages and how to sample: tools, reasoning, template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.conversation import Conversation
from tensorray.cluster.tools import Tool, ToolChoice, ToolUse

# What a template is given already, or what would be another feature.
_RESERVED = {
    "self",
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
}

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16, description="comes back with the answer"),
]


class TemplateFields(BaseModel):
    """What the chat template is told."""

    tools: list[Tool] | None = Field(None, description="functions that the model may call")
    tool_choice: ToolChoice | None = Field(None, description="default: auto, if there are tools")
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    reasoning_effort: ReasoningEffort | None = None
    enable_thinking: bool | None = Field(None, description="where the template can do without")
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = Field(
        False, description="go on from the last message's text; add_generation_prompt is off then"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="variables of the chat template (vLLM)"
    )

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> Conversation:
        """Raises BadRequest for fields that contradict each other."""
        arguments = self.chat_template_kwargs or {}
        if reserved := _RESERVED & arguments.keys():
            raise BadRequest(
                f"chat_template_kwargs: {min(reserved)} is not the request's to set there; "
                "leave it out",
                param="chat_template_kwargs",
            )
        asked = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and asked:
            raise BadRequest(
                "continue_final_message and add_generation_prompt can't both be true: the answer "
                "goes on from the last message, or is a new one",
                param="continue_final_message",
            )
        return Conversation(
            messages,
            ToolUse.of(self.tools, self.tool_choice, self.parallel_tool_calls),
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            reasoning_effort=self.reasoning_effort,
            enable_thinking=self.enable_thinking,
            arguments=arguments,
        )


class ChatFields(TemplateFields):
    """The same, and what is OpenAI's about an answer."""

    include_reasoning: bool | None = Field(True, description="tell what the model thinks (vLLM)")
    metadata: Metadata | None = None
    safety_identifier: str | None = Field(None, description="the end user, as `user` is")
    prompt_cache_key: str | None = Field(
        None, description="a hint; equal beginnings of prompts share the cache without it"
    )
