"""The grammar of a whole answer: reasoning, then calls of tools or what the text must be.

In llguidance's Lark (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
from typing import Any

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.reasoning import ReasoningFormat
from tensorray.cluster.structured_outputs import check_grammar
from tensorray.cluster.tool_parsers.tool_format import MarkedFormat, Spell, ToolFormat
from tensorray.cluster.tools import ToolUse


def reply_grammar(
    reasoning: ReasoningFormat | None,
    inside: bool,
    tools: ToolFormat | None,
    use: ToolUse,
    answer: str,
    spell: Spell,
) -> str:
    """The grammar, checked; empty where anything goes.

    `answer` is the grammar of the text, or empty. Calls are held to their schemas where a call is
    required, a function is strict, or anything else has to be enforced. Raises BadRequest.
    """
    rules = ""
    body = ""
    if tools is not None and use.mode == "required":
        body, answer = "calls", ""
        rules = tools.calls(use.callees(), spell, single=use.single)
    elif tools is not None and (use.is_strict or use.single or answer):
        if not answer:
            body = "mixed"
            rules = tools.mixed(use.callees(), spell, single=use.single)
        elif isinstance(tools, MarkedFormat):
            body = "calls | @answer"
            rules = tools.calls(use.callees(), spell, single=use.single)
        else:
            raise BadRequest(
                "this model's calls can't be told from structured text; send tools or what the "
                "text must be, not both, or a tool_choice other than 'auto'",
                param="response_format",
            )
    elif answer:
        body = "@answer"
    if not body:
        return ""
    if reasoning is None:
        if body == "@answer":
            return answer
        lark = f"start: {body}\n{rules}"
    else:
        lark = f"start: {_prefix(reasoning, inside, spell)} /\\s*/ reply\nreply: {body}\n{rules}"
        lark += _thought(reasoning, spell)
    grammars: list[dict[str, Any]] = [{"name": "reply", "lark_grammar": lark}]
    if answer:
        grammars.append({**_named(answer), "name": "answer"})
    return check_grammar(
        json.dumps({"grammars": grammars}), "tools" if rules else "response_format"
    )


def _prefix(reasoning: ReasoningFormat, inside: bool, spell: Spell) -> str:
    return "thought" if inside else f"(/\\s*/ {spell(reasoning.begin)} thought)?"


def _thought(reasoning: ReasoningFormat, spell: Spell) -> str:
    """Lark rules for all up to the end of reasoning, and that."""
    end = spell(reasoning.end)
    if end.startswith("<["):
        return f"thought: thinking {end}\nthinking: /(?s:.*)/\n"
    return f"thought[suffix={end}]: /(?s:.*)/\n"


def _named(grammar: str) -> dict[str, Any]:
    """A grammar as one of several."""
    if grammar.lstrip().startswith("{"):
        only: dict[str, Any] = json.loads(grammar)["grammars"][0]
        return {key: value for key, value in only.items() if value is not None}
    return {"lark_grammar": grammar}
