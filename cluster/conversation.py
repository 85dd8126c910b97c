"""A conversation that a model is to go on with: messages, tools, and how it should think."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorray.cluster.tools import ToolUse


@dataclass(frozen=True)
class Conversation:
    """`arguments` are variables of the chat template; `reasoning_effort` and `enable_thinking`
    become such where the template knows them."""

    messages: Sequence[Mapping[str, Any]]
    tools: ToolUse = ToolUse()  # noqa: RUF009  # it is frozen
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # instead: the answer goes on from the last message
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
