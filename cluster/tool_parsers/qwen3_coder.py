"""Qwen3-Coder's format, tags of its own around plain values:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

A value is text as it stands if the function's schema wants a string there, else JSON, or text again
if there may be strings and none of what that JSON is. A string of certain letters or lengths is
JSON, too, where a grammar has to see to them.
https://huggingface.co/Qwen/Qwen3-Coder-480B-A35B-Instruct/blob/main/chat_template.jinja
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tensorray.cluster.reply import Arguments
from tensorray.cluster.text_source import Reading, Source
from tensorray.cluster.tool_parsers.tool_format import (
    Callee,
    MarkedFormat,
    Parameter,
    Schema,
    Spell,
    literal,
)

_CALL_END = "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_LONGEST_NAME = 256
# What plain text can't be held to in a grammar.
_OF_LETTERS = ("pattern", "format", "minLength", "maxLength")


class Qwen3Coder(MarkedFormat):
    name = "qwen3_coder"
    marker = "<tool_call>"
    markers = (marker, _CALL_END)

    @staticmethod
    def is_shown_in(template: str) -> bool:
        return _FUNCTION in template and _PARAMETER in template

    def read_marked(self, source: Source, functions: Mapping[str, Schema]) -> Reading[bool]:
        yield from source.space()
        name = yield from _named(source, _FUNCTION)
        if name is None or name not in functions:
            return False
        self.begin(source, name)
        source.add(Arguments("{"))
        properties = functions[name].get("properties")
        if not isinstance(properties, dict):
            properties = {}
        before = ""
        while True:
            source.drop()
            yield from source.space()
            if (yield from source.literal(_FUNCTION_END)):
                source.add(Arguments("}"))
                break
            key = yield from _named(source, _PARAMETER)
            text = None if key is None else (yield from _until(source, _PARAMETER_END))
            if key is None or text is None:
                source.at = 0
                return True
            value = _as_json(text, properties.get(key, {}))
            source.add(Arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {value}"))
            before = ", "
        source.drop()
        yield from source.space()
        if not (yield from source.literal(_CALL_END)):
            source.at = 0
        return True

    def marked(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        rules = [f'marked: "\\n" function "\\n" {spell(_CALL_END)}']
        rules.append("function: " + " | ".join(f"function_{i}" for i in range(len(functions))))
        for i, function in enumerate(functions):
            parts = []
            for j, parameter in enumerate(function.parameters()):
                head = literal(f"{_PARAMETER}{parameter.name}>\n")
                rules.append(f"parameter_{i}_{j}: {head} value_{i}_{j}")
                rules.append(_value_rule(f"value_{i}_{j}", parameter))
                parts.append(f"parameter_{i}_{j}" + ("" if parameter.required else "?"))
            begin = literal(f"{_FUNCTION}{function.name}>\n")
            rules.append(f"function_{i}: {begin} {' '.join(parts)} {literal(_FUNCTION_END)}")
        return "\n".join(rules) + "\n"


def _named(source: Source, tag: str) -> Reading[str | None]:
    """Skip `<tag=name>`, and return the name; None if something else comes."""
    if not (yield from source.literal(tag)):
        return None
    name = yield from source.run_of(lambda c: c not in "<>\n", _LONGEST_NAME)
    return name if (yield from source.literal(">")) else None


def _until(source: Source, tag: str) -> Reading[str | None]:
    """Skip a value and the tag that ends it, and return the value; None if it has no end."""
    searched = source.at
    while True:
        end = source.text.find(tag, searched)
        if end >= 0:
            text = source.text[source.at : end]
            source.at = end + len(tag)
            # The lines of the tags are not the value's.
            return text.removeprefix("\n").removesuffix("\n")
        if source.ended:
            return None
        searched = max(source.at, len(source.text) - len(tag) + 1)
        yield


def _is_text(schema: Any) -> bool:
    """Whether a value is a string, so that it stands there as it is."""
    if not isinstance(schema, dict) or not schema:
        return True
    if options := _options(schema):
        return all(isinstance(option, str) for option in options)
    return schema.get("type") == "string"


def _has_rules_of_letters(schema: Any) -> bool:
    return isinstance(schema, dict) and any(key in schema for key in _OF_LETTERS)


def _options(schema: Schema) -> list[Any]:
    """All that a value may be, if a schema lists it."""
    options = [schema["const"]] if "const" in schema else schema.get("enum")
    return options if isinstance(options, list) else []


def _as_json(text: str, schema: Any) -> str:
    """A value as JSON; what is none, nor a literal of Python, is a string."""
    is_text = _is_text(schema)
    if not is_text or _has_rules_of_letters(schema):
        try:
            if _fits(json.loads(text, parse_constant=_refuse), schema):
                return text.strip()
        except (ValueError, RecursionError):  # a number may have more digits than Python reads
            pass
    if not is_text:
        try:
            value = ast.literal_eval(text.strip())
            if _fits(value, schema):
                return json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
    return json.dumps(text, ensure_ascii=False)


def _fits(value: Any, schema: Any) -> bool:
    """False where the schema has room for strings and for none of the value's type: a postal code
    that may be missing is text or null, and no number."""
    types = _types(schema)
    return types is None or "string" not in types or bool(types & _types_of(value))


def _types(schema: Any) -> set[str] | None:
    """The JSON types that a value may have; None if that is not plain to see."""
    if not isinstance(schema, dict):
        return None
    if options := _options(schema):
        return set().union(*map(_types_of, options))
    types = schema.get("type")
    if types is not None:
        listed = types if isinstance(types, list) else [types]
        return {each for each in listed if isinstance(each, str)}
    found: set[str] = set()
    alternatives = schema.get("anyOf", schema.get("oneOf"))
    for each in alternatives if isinstance(alternatives, list) else [None]:
        if (types := _types(each)) is None:
            return None
        found |= types
    return found


def _types_of(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"integer", "number"} if value.is_integer() else {"number"}
        case str():
            return {"string"}
        case list() | tuple():
            return {"array"}
        case dict():
            return {"object"}
    return set()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _value_rule(rule: str, parameter: Parameter) -> str:
    """A value and the tag after it."""
    schema = parameter.schema
    end = f"{_PARAMETER_END}\n"
    if not _is_text(schema) or _has_rules_of_letters(schema):
        after = literal("\n" + end)
        return f"{rule}: %json {json.dumps(schema)} {after}"
    if isinstance(schema, dict) and (options := _options(schema)):
        spelled = " | ".join(literal(f"{option}\n{end}") for option in options)
        return f"{rule}: {spelled}"
    return f"{rule}[suffix={literal(end)}]: /(?s:.*)/"
