"""Llama 3's format: the answer is `{"name": ..., "parameters": {...}}`, several by `;`.

https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tensorray.cluster.text_source import Reading, Source
from tensorray.cluster.tool_parsers.tool_format import Callee, Spell, ToolFormat, object_rules

_TAG = "<|python_tag|>"


class Llama3Json(ToolFormat):
    name = "llama3_json"
    markers = (_TAG,)

    @staticmethod
    def is_shown_in(template: str) -> bool:
        return _TAG in template or '{"name": function name, "parameters":' in template

    def read(self, source: Source, names: Collection[str]) -> Reading[None]:
        # Without a tag, calls are all of the answer: JSON in its midst is an example of something.
        while True:
            if (yield from self._calls(source, names)):
                source.at = source.text.index(_TAG) + len(_TAG)
                source.write(source.text[: source.at])
            if not (yield from source.write_until(_TAG)):
                return

    def _calls(self, source: Source, names: Collection[str]) -> Reading[bool]:
        """Read calls, as many as there are. What comes then is none; whether it has a tag."""
        separators: tuple[str, ...] = ()
        while True:
            source.drop()
            yield from source.space()
            for separator in separators:
                if (yield from source.literal(separator)):
                    yield from source.space()
                    break
            tagged = yield from source.literal(_TAG)
            yield from source.space()
            if not (yield from self.read_object(source, names, ("parameters", "arguments"))):
                source.at = 0
                return tagged
            separators = (";", ",")

    def calls(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        more = "" if single else ' ("; " object)*'
        return f"calls: object{more}\n" + object_rules(functions, "parameters")

    def mixed(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        """Text that begins with a brace is a call."""
        calls = self.calls(functions, spell, single=single)
        return "mixed: calls | text\ntext: /(?s:[^{\\s].*)?/\n" + calls
