"""Mistral's formats: `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` and, since its
tokenizer 11, `[TOOL_CALLS]name[ARGS]{...}` a call.

https://github.com/mistralai/mistral-common
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection, Sequence

from tensorray.cluster.reply import CallBegins
from tensorray.cluster.text_source import Reading, Source
from tensorray.cluster.tool_parsers.tool_format import (
    Callee,
    MarkedFormat,
    Spell,
    arguments_rules,
    literal,
    object_rules,
)

_ID = "[CALL_ID]"
_ARGUMENTS = "[ARGS]"
_KEYS = ("arguments", "parameters")
_LONGEST_NAME = 64


class Mistral(MarkedFormat):
    name = "mistral"
    marker = "[TOOL_CALLS]"
    markers = (marker, _ID, _ARGUMENTS)

    @staticmethod
    def is_shown_in(template: str) -> bool:
        return "[TOOL_CALLS]" in template

    def new_id(self) -> str:
        """Its templates take nothing but nine letters and digits."""
        letters = string.ascii_letters + string.digits
        return "".join(secrets.choice(letters) for _ in range(9))

    def read_marked(self, source: Source, names: Collection[str]) -> Reading[bool]:
        yield from source.space()
        if (yield from source.literal("[")):
            return (yield from self._list(source, names))
        if (yield from source.peek()) == "{":
            return (yield from self.read_object(source, names, _KEYS))
        return (yield from self._named(source, names))

    def _list(self, source: Source, names: Collection[str]) -> Reading[bool]:
        found = False
        while True:
            start = source.at
            yield from source.space()
            if found:
                if (yield from source.literal("]")):
                    return True
                if not (yield from source.literal(",")):
                    source.at = start
                    return True
                yield from source.space()
            if not (yield from self.read_object(source, names, _KEYS)):
                source.at = start
                return found
            found = True
            source.drop()

    def _named(self, source: Source, names: Collection[str]) -> Reading[bool]:
        name = yield from source.run_of(lambda c: c.isalnum() or c in "_-.", _LONGEST_NAME)
        yield from source.space()
        id = self.new_id()
        if (yield from source.literal(_ID)):
            id = yield from source.run_of(str.isalnum, _LONGEST_NAME)
        yield from source.literal(_ARGUMENTS)
        yield from source.space()
        if name not in names or (yield from source.peek()) != "{":
            return False
        source.add(CallBegins(name, id or self.new_id()))
        yield from self.read_arguments(source)
        return True

    def marked(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        if _ARGUMENTS in self.template:
            options = " | ".join(f"named_{i}" for i in range(len(functions)))
            return f"marked: {options}\n{arguments_rules(functions)}" + "".join(
                f"named_{i}: {literal(function.name)} {spell(_ARGUMENTS)} arguments_{i}\n"
                for i, function in enumerate(functions)
            )
        more = "" if single else ' (", " object)*'
        return f'marked: " "? "[" object{more} "]"\n' + object_rules(functions, "arguments")

    def calls(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        if _ARGUMENTS in self.template:
            return super().calls(functions, spell, single=single)
        return f"calls: {spell(self.marker)} marked\n" + self.marked(
            functions, spell, single=single
        )
