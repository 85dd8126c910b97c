"""Llama 4's format: a Python list of calls, `[f(a="x", b=1), g()]`.

https://www.llama.com/docs/model-cards-and-prompt-formats/llama4/
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import Any

from tensorray.cluster.reply import Arguments
from tensorray.cluster.text_source import Reading, Source
from tensorray.cluster.tool_parsers.tool_format import Callee, Spell, ToolFormat, literal

_START, _END = "<|python_start|>", "<|python_end|>"
_LONGEST_NAME = 64


class Pythonic(ToolFormat):
    name = "pythonic"
    markers = (_START, _END)

    @staticmethod
    def is_shown_in(template: str) -> bool:
        return "[func_name1(params_name1=params_value1" in template or _START in template

    def read(self, source: Source, names: Collection[str]) -> Reading[None]:
        # Calls are all of the answer; arguments can't be told before all calls are there.
        yield from source.space()
        yield from source.literal(_START)
        calls = yield from self._list(source, names)
        if calls:
            for name, arguments in calls:
                self.begin(source, name)
                source.add(Arguments(arguments))
            source.drop()
            yield from source.literal(_END)
        else:
            source.at = 0
        yield from source.rest()

    def _list(self, source: Source, names: Collection[str]) -> Reading[list[tuple[str, str]]]:
        """Skip a list of calls, and return it; empty if it is none."""
        start = source.at
        if not (yield from source.literal("[")):
            return []
        yield from source.space()
        name = yield from source.run_of(lambda c: c.isalnum() or c in "_-.", _LONGEST_NAME)
        if name not in names or not (yield from source.literal("(")):
            return []
        depth, quote = 2, ""
        while depth:
            character = yield from source.peek()
            if not character:
                return []
            source.at += 1
            if quote:
                if character == "\\" and (yield from source.peek()):
                    source.at += 1
                elif character == quote:
                    quote = ""
            elif character in "\"'":
                quote = character
            elif character in "([{":
                depth += 1
            elif character in ")]}":
                depth -= 1
        return _parsed(source.text[start : source.at], names)

    def calls(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        more = "" if single else ' (", " call)*'
        rules = [f'calls: "[" call{more} "]"']
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
        for i, function in enumerate(functions):
            rules += _call_rules(i, function)
        return "\n".join(rules) + "\n"

    def mixed(self, functions: Sequence[Callee], spell: Spell, *, single: bool) -> str:
        """Text that begins with a bracket is a list of calls."""
        calls = self.calls(functions, spell, single=single)
        return "mixed: calls | text\ntext: /(?s:[^\\[\\s].*)?/\n" + calls


def _parsed(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """Names and arguments, as JSON; empty if these are no calls."""
    try:
        tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        calls = []
        segment = _segments(text)
        for call in tree.elts:
            if not isinstance(call, ast.Call) or call.args:
                return []
            if any(each.arg is None for each in call.keywords):  # f(**{...})
                return []
            name = ast.unparse(call.func)
            if name not in names:
                return []
            arguments = {
                each.arg: _value(segment(each.value), each.value) for each in call.keywords
            }
            calls.append((name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)))
            calls[-1][1].encode()  # an escape may stand for half a character
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []
    return calls


def _segments(text: str) -> Callable[[ast.expr], str]:
    """What gives an expression's own text: `ast.get_source_segment`, but that one looks through the
    whole text each time."""
    data = text.encode()
    starts = [0, *accumulate(len(line) for line in data.splitlines(keepends=True))]

    def segment(node: ast.expr) -> str:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        return data[begin:end].decode()

    return segment


def _value(text: str, node: ast.expr) -> Any:
    """A literal of JSON or, where it is none, of Python."""
    try:
        return json.loads(text)
    except ValueError:
        value = ast.literal_eval(node)
        json.dumps(value)  # sets and bytes are no arguments: a TypeError
        return value


def _call_rules(number: int, function: Callee) -> list[str]:
    """Lark rules for a call with JSON values, in the schema's order."""
    parameters = function.parameters()
    rules = []
    # tail: what may follow an argument; head: the same with nothing before it.
    for i in reversed(range(len(parameters) + 1)):
        head, tail = f"head_{number}_{i}", f"tail_{number}_{i}"
        if i == len(parameters):
            rules += [f'{head}: ""', f'{tail}: ""']
            continue
        value = json.dumps(parameters[i].schema)
        rest = f"{number}_{i + 1}"
        rules.append(f"value_{number}_{i}: {literal(parameters[i].name + '=')} %json {value}")
        skip = not parameters[i].required
        rules.append(
            f"{head}: value_{number}_{i} tail_{rest}" + (f" | head_{rest}" if skip else "")
        )
        rules.append(
            f'{tail}: ", " value_{number}_{i} tail_{rest}' + (f" | tail_{rest}" if skip else "")
        )
    rules.append(f'call_{number}: {literal(function.name + "(")} head_{number}_0 ")"')
    return rules
