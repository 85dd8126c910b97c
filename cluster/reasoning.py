"""How reasoning models mark what they think, and what their templates let a request say of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.tokenizer import Tokenizer

_TAIL = 16  # tokens at a prompt's end that may say whether reasoning has begun


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands first in an answer, between `begin` and `end`. With `implied` the answer
    begins inside of it, unless the prompt has ended it already."""

    name: str
    begin: str
    end: str
    implied: bool = False

    def state(
        self, tokenizer: Tokenizer, prompt: Sequence[int], *, continues: bool = False
    ) -> bool | None:
        """Whether an answer to the prompt begins inside reasoning; None: there will be none.

        `continues` says that the prompt ends in the midst of an answer.
        """
        text = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()
        if text.endswith(self.end):
            return None
        if continues:
            return True if text.endswith(self.begin) else None
        return self.implied or text.endswith(self.begin)


#: By vLLM's names for the same.
FORMATS = {
    each.name: each
    for each in (
        ReasoningFormat("qwen3", "<think>", "</think>"),
        ReasoningFormat("deepseek_r1", "<think>", "</think>", implied=True),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    )
}


def format_of(template: str) -> ReasoningFormat | None:
    """The format that a chat template shows."""
    for name in ("qwen3", "mistral"):
        if FORMATS[name].end in template:
            return FORMATS[name]
    return None


def template_arguments(
    template: str, effort: str | None, enable_thinking: bool | None
) -> dict[str, Any]:
    """What `reasoning_effort` and `enable_thinking` are for a template.

    Raises BadRequest where they ask for what the template does not have.
    """
    found: dict[str, Any] = {}
    if effort is not None:
        if _mentions(template, "reasoning_effort"):
            found["reasoning_effort"] = effort
        if _mentions(template, "enable_thinking"):
            found["enable_thinking"] = effort != "none"
        if not found and effort != "none":
            raise _unknown("reasoning_effort")
    if enable_thinking is not None:
        if _mentions(template, "enable_thinking"):
            found["enable_thinking"] = enable_thinking
        elif enable_thinking and format_of(template) is None:
            raise _unknown("enable_thinking")
    return found


def _mentions(template: str, variable: str) -> bool:
    return re.search(rf"\b{variable}\b", template) is not None


def _unknown(parameter: str) -> BadRequest:
    return BadRequest(
        f"{parameter}: this model's chat template has no such thing; leave it out", param=parameter
    )
