"""Structured outputs: what an answer's text must be, checked at the edge and made a grammar.

Spelled as vLLM spells it. Grammars are llguidance's
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md); a shard follows them
(`tensorray.actors.guidance`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tensorray.cluster.bad_request import BadRequest

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]

_MAX_CHARACTERS = 1 << 18
_MAX_MESSAGE = 400
# As much as any indentation, not as much as a model that has lost its way would write.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}


class StructuredOutputs(BaseModel):
    """What the whole answer must match; exactly one of the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    json_schema: dict[str, Any] | bool | str | None = Field(
        None, alias="json", description="JSON that is valid under this schema"
    )
    json_object: bool | None = Field(None, description="Any JSON object")
    regex: str | None = Field(None, description="Text that a regular expression matches as a whole")
    choice: list[str] | None = Field(None, min_length=1, description="One of these strings")
    grammar: str | None = Field(None, description="Text of a grammar in Lark's format, or GBNF")

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [name for name, value in self._fields() if value is not None and value is not False]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of json, json_object, regex, choice and grammar "
                f"({', '.join(given) or 'none'} given)"
            )
        return self

    def compiled(self, param: str = "structured_outputs") -> str:
        """The grammar, checked. Raises BadRequest that says what is wrong with it.

        Takes up to a second or so for the largest: what it may cost is bounded by the length of
        the text and by llguidance's own limits.
        """
        kind, value = next(item for item in self._fields() if item[1] not in (None, False))
        if kind == "json_object":
            kind, value = "json", {"type": "object"}
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) > _MAX_CHARACTERS:
            raise BadRequest(
                f"{param}: {len(text)} characters are too many; the limit is {_MAX_CHARACTERS}",
                param=param,
            )
        grammar, fault = _compile(kind, text)
        if fault:
            raise BadRequest(f"{param}: {fault}", param=param)
        return grammar

    def _fields(self) -> list[tuple[str, Any]]:
        return [
            ("json", self.json_schema),
            ("json_object", self.json_object),
            ("regex", self.regex),
            ("choice", self.choice),
            ("grammar", self.grammar),
        ]


def check_grammar(grammar: str, param: str) -> str:
    """A grammar of llguidance's, as it is. Raises BadRequest where it can't be enforced."""
    if fault := _fault(grammar):
        raise BadRequest(f"{param}: {fault}", param=param)
    return grammar


@lru_cache(maxsize=256)
def _fault(grammar: str) -> str:
    from llguidance import LLMatcher

    if len(grammar) > 2 * _MAX_CHARACTERS:
        return f"{len(grammar)} characters of grammar are too many"
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return f"can't be enforced: {_shortened(_lowered(messages[0]))}" if failed else ""


@lru_cache(maxsize=256)
def _compile(kind: str, text: str) -> tuple[str, str]:
    """The grammar, and what is wrong with it, if anything."""
    from llguidance import LLMatcher

    try:
        grammar = _grammar(kind, text)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    except Exception as error:  # the library's converter raises bare Exception
        return "", f"not a valid {_NAMES[kind]}: {_shortened(str(error))}"
    if failed:
        return "", f"not a {_NAMES[kind]} that can be enforced: {_shortened(_lowered(messages[0]))}"
    return grammar, ""


_NAMES = {
    "json": "JSON schema",
    "regex": "regular expression",
    "choice": "choice",
    "grammar": "grammar",
}


def _grammar(kind: str, text: str) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if kind == "json":
        schema = json.loads(text)
        if not isinstance(schema, dict | bool):
            raise ValueError("a schema is an object")
        return LLMatcher.grammar_from_json_schema(
            json.dumps({} if schema is True else schema),
            overrides=JSON_OPTIONS,  # type: ignore[arg-type]
        )
    if kind == "regex":
        return LLMatcher.grammar_from_regex(_unanchored(text))
    if kind == "choice":
        choices = sorted(set(json.loads(text)), key=len)
        if not choices[0]:
            raise ValueError("an empty string can't be chosen")
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, choices)))
    return LLMatcher.grammar_from_lark(any_to_lark(text))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _unanchored(regex: str) -> str:
    """Without the anchors at its ends, as all of it must match anyway."""
    regex = regex.removeprefix("^")
    if regex.endswith("$"):
        body = regex[:-1]
        if (len(body) - len(body.rstrip("\\"))) % 2 == 0:
            return body
    return regex


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def _shortened(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"
