"""Hermes' and Qwen's format: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

https://github.com/NousResearch/Hermes-Function-Calling
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tensorray.cluster.text_source import Reading, Source
from tensorray.cluster.tool_parsers.tool_format import Callee, MarkedFormat, Spell, object_rules

_END = "</tool_call>"


class Hermes(MarkedFormat):
    name = "hermes"
    marker = "<tool_call>"
    markers = (marker, _END)

    @staticmethod
    def is_shown_in(template: str) -> bool:
        # Qwen3-Coder has the same tags around XML.
        return "<tool_call>" in template and "<function=" not in template

    def read_marked(self, source: Source, names: Collection[str]) -> Reading[bool]:
        yield from source.space()
        if not (yield from self.read_object(source, names, ("arguments", "parameters"))):
            return False
        start = source.at
        yield from source.space()
        if not (yield from source.literal(_END)):
            source.at = start
        return True

    def marked(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        return f'marked: "\\n" object "\\n" {spell(_END)}\n' + object_rules(functions, "arguments")
