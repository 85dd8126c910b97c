"""How a model writes calls of tools: what each format says of itself, and what they share."""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.json_scanner import JsonScanner
from tensorray.cluster.reply import Arguments, CallBegins
from tensorray.cluster.text_source import Reading, Source

# What may stand in a call's object before its arguments.
_BEFORE = ("name", "type", "id")

Schema = dict[str, Any]
Spell = Callable[[str], str]


# What a function's schema may have at its top where a call has its arguments one by one.
_AT_TOP = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_AT_TOP |= {"title", "description", "$schema", "x-guidance"}


@dataclass(frozen=True)
class Parameter:
    """One of a function's arguments: its name, and a schema that stands on its own."""

    name: str
    schema: Schema | bool
    required: bool


@dataclass(frozen=True)
class Callee:
    """A function that may be called: its name, and the JSON schema of its arguments."""

    name: str
    schema: Schema

    def parameters(self) -> list[Parameter]:
        """Its arguments one by one. Raises BadRequest for a schema that says more of them."""
        schema = self.schema
        if other := sorted(schema.keys() - _AT_TOP):
            raise BadRequest(
                f"{self.name}'s parameters have {', '.join(other)} at their top, which calls in "
                "this model's format can't be held to",
                param="tools",
            )
        shared: Schema = {
            key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema
        }
        required = schema.get("required", [])
        return [
            Parameter(
                name, {**inner, **shared} if isinstance(inner, dict) else inner, name in required
            )
            for name, inner in schema.get("properties", {}).items()
        ]


class ToolFormat(ABC):
    """One way of writing calls. `template` is the chat template, which may show a variant.

    `name` is vLLM's for the same format; `markers` what may be a special token of the model and
    must not be left out of the text.
    """

    name: ClassVar[str]
    markers: ClassVar[Sequence[str]] = ()

    def __init__(self, template: str = "") -> None:
        self.template = template

    @staticmethod
    @abstractmethod
    def is_shown_in(template: str) -> bool:
        """Whether a chat template writes calls, or asks for them, in this format."""

    @abstractmethod
    def read(self, source: Source, functions: Mapping[str, Schema]) -> Reading[None]:
        """Read an answer to its end. Calls are those of these functions, whose schemas of arguments
        are given by name; what looks like a call and is none is text."""

    @abstractmethod
    def calls(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        """Lark rules, `calls` first of them, for one call or, unless `single`, more, and nothing
        else. `spell` is how the grammar spells a marker."""

    @abstractmethod
    def mixed(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        """The same, `mixed` first of them, where calls are the model's choice."""

    def new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    # --- for formats ---

    def begin(self, source: Source, name: str) -> None:
        source.add(CallBegins(name, self.new_id()))

    def read_object(
        self, source: Source, names: Collection[str], arguments: Collection[str]
    ) -> Reading[bool]:
        """Read `{"name": ..., "arguments": {...}}`, whose second key is one of `arguments`.

        False: it is no call, and the reader has to go back. Where a call goes wrong after its
        arguments began, the rest is text.
        """
        if not (yield from source.literal("{")):
            return False
        name: str | None = None
        early: str | None = None  # arguments that came before the name
        begun = False
        first = True
        while True:
            start = source.at
            key = yield from self._key(source, first=first)
            first = False
            if key == "}":
                return begun
            if key is None or not (begun or key in _BEFORE or key in arguments):
                source.at = start
                return begun
            named = name if key in arguments and not begun else None
            if named is not None and (yield from source.peek()) == "{":
                begun = True
                self.begin(source, named)
                if not (yield from self.read_arguments(source)):
                    return True
                continue
            text = yield from source.json_value()
            if text is None:
                source.at = start
                return begun
            if begun:
                continue
            if key == "name":
                name = json.loads(text) if text.startswith('"') else None
                if name is None or name not in names:
                    return False
            elif key in arguments:
                early = _as_object(text)
                if early is None:
                    return False
            if name is not None and early is not None:
                begun = True
                self.begin(source, name)
                source.add(Arguments(early))

    def _key(self, source: Source, *, first: bool) -> Reading[str | None]:
        """An object's next key, with the colon behind it; `}` at its end, None if neither."""
        yield from source.space()
        if (yield from source.literal("}")):
            return "}"
        if not first:
            if not (yield from source.literal(",")):
                return None
            yield from source.space()
        if (yield from source.peek()) != '"':
            return None
        text = yield from source.json_value()
        if text is None:
            return None
        yield from source.space()
        if not (yield from source.literal(":")):
            return None
        yield from source.space()
        key: str = json.loads(text)
        return None if key == "}" else key

    def read_arguments(self, source: Source) -> Reading[bool]:
        """Pass a JSON object on as it comes; False: it ends where no object could."""
        scanner = JsonScanner()
        while True:
            start = source.at
            source.at = scanner.scan(source.text, start)
            if source.at > start:
                source.add(Arguments(source.text[start : source.at]))
            source.drop()
            if scanner.done or scanner.failed or source.ended:
                return scanner.done
            yield


class MarkedFormat(ToolFormat):
    """A format whose calls follow a marker, anywhere in the answer."""

    marker: ClassVar[str]

    def read(self, source: Source, functions: Mapping[str, Schema]) -> Reading[None]:
        while (yield from source.write_until(self.marker)):
            source.at += len(self.marker)
            if not (yield from self.read_marked(source, functions)):
                source.at = 0
                source.write(self.marker)
                source.at = len(self.marker)

    @abstractmethod
    def read_marked(self, source: Source, functions: Mapping[str, Schema]) -> Reading[bool]:
        """Read what follows a marker. False: it is no call; the reader goes back."""

    @abstractmethod
    def marked(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        """Lark rules, `marked` first of them: what follows a marker."""

    def calls(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        marker = spell(self.marker)
        more = "" if single else f' ("\\n"? {marker} marked)*'
        return f"calls: {marker} marked{more}\n" + self.marked(functions, spell, single=single)

    def mixed(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        marker = spell(self.marker)
        if marker.startswith("<["):  # a special token, which text never holds
            head = f"head: text {marker}\n"
        else:
            head = f"head[lazy]: /(?s:.*)/ {marker}\n"
        rule = "mixed: head marked | text\n" if single else "mixed: (head marked)* text\n"
        text = "text: /(?s:.*)/\n"
        return rule + head + text + self.marked(functions, spell, single=single)


def literal(text: str) -> str:
    """A string as Lark spells it."""
    return json.dumps(text, ensure_ascii=False)


def object_rules(functions: Sequence[Callee], key: str) -> str:
    """Lark rules, `object` first of them: `{"name": ..., key: {...}}` of one of the functions."""
    rules = ["object: " + " | ".join(f"object_{i}" for i in range(len(functions)))]
    for i, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function.name)}, "{key}": '
        rules.append(f'object_{i}: {literal(head)} arguments_{i} "}}"')
    return "\n".join([*rules, arguments_rules(functions)])


def arguments_rules(functions: Sequence[Callee]) -> str:
    """Lark rules `arguments_0`, …: JSON under each function's schema."""
    return "".join(
        f"arguments_{i}: %json {json.dumps(function.schema)}\n"
        for i, function in enumerate(functions)
    )


def _as_object(text: str) -> str | None:
    """Arguments as the text of an object: some models write that text as a string, or null."""
    try:
        value = json.loads(text)
        if isinstance(value, str):
            text = value
            text.encode()  # an escape may stand for half a character
            value = json.loads(text)
    except (ValueError, RecursionError):  # a number may have more digits than Python reads
        return None
    if value is None:
        return "{}"
    return text if isinstance(value, dict) else None
