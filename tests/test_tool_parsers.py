"""Parsers of tool calls: right for any cut of the text, and nothing of it lost."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tensorray.cluster.json_scanner import JsonScanner
from tensorray.cluster.reply import CallBegins, Part, Reply, Text, joined
from tensorray.cluster.text_source import Source
from tensorray.cluster.tool_parsers import FORMATS, format_of

STRING: dict[str, Any] = {"type": "string"}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "get_weather": {"type": "object", "properties": {"city": STRING}},
    "add": {"type": "object", "properties": {"a": {"type": "array"}, "c": {"type": "number"}}},
    "x.y": {
        "type": "object",
        "properties": {
            "a": {"type": ["boolean", "null"]},
            "date": {"type": "string", "format": "date"},
            "unit": {"enum": ["3", "4"]},
            "code": {"anyOf": [STRING, {"type": "null"}]},
            "size": {"type": ["string", "number"]},
            "some": {"anyOf": [STRING, {"$ref": "#/$defs/some"}]},
        },
    },
}


def read(kind: str, pieces: list[str]) -> list[Part]:
    source = Source()
    reader = FORMATS[kind]("").read(source, FUNCTIONS)
    found: list[Part] = []
    for piece in [*pieces, None]:
        if piece is None:
            source.ended = True
        else:
            source.text += piece
        next(reader, None)
        found += source.take()
    source.finish()
    found += source.take()
    return joined([CallBegins(p.name, "") if isinstance(p, CallBegins) else p for p in found])


def reply(kind: str, text: str) -> tuple[str, list[tuple[str, Any]]]:
    whole = Reply.of(read(kind, [text]))
    return whole.content, [(call.name, json.loads(call.arguments)) for call in whole.tool_calls]


PARIS = ("get_weather", {"city": 'Paris, {"}\\ é'})
ARGUMENTS = json.dumps(PARIS[1], ensure_ascii=False)
OBJECT = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
SUM = '{"name": "add", "parameters": {"a": [1, {"b": null}], "c": -1.5e3}}'
ADDED = ("add", {"a": [1, {"b": None}], "c": -1500.0})
DIGITS = "1" * 5000  # more than Python reads


def tagged(function: str, **values: str) -> str:
    """A call as Qwen3-Coder writes it."""
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={function}>\n{''.join(lines)}</function>\n</tool_call>"


TAGGED = tagged("get_weather", city=PARIS[1]["city"])
TAGGED_SUM = tagged("add", a='[1, {"b": null}]', c="-1.5e3")
CALLS = {
    "hermes": [
        (f"<tool_call>\n{OBJECT}\n</tool_call>", "", [PARIS]),
        (f"Let me see.\n\n<tool_call>{OBJECT}</tool_call>\n", "Let me see.", [PARIS]),
        (f"<tool_call>{OBJECT}</tool_call>\n<tool_call>\n{SUM}\n</tool_call>", "", [PARIS, ADDED]),
        (f"<tool_call>{OBJECT}", "", [PARIS]),  # no end
        ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", {"a": 1})]),
        ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", {})]),
        ('<tool_call>{"name":"add","arguments":"{}"}</tool_call>', "", [("add", {})]),
        (f"<tool_call>{OBJECT}</tool_call> and so on", "and so on", [PARIS]),
    ],
    "mistral": [
        (f"[TOOL_CALLS][{OBJECT}]", "", [PARIS]),
        (f"[TOOL_CALLS] [{OBJECT}, {SUM}]", "", [PARIS, ADDED]),
        (f"I look.[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}", "I look.", [PARIS]),
        (f"[TOOL_CALLS]get_weather{ARGUMENTS}[TOOL_CALLS]add{{}}", "", [PARIS, ("add", {})]),
        ('[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{"a": 1}', "", [("add", {"a": 1})]),
    ],
    "llama3_json": [
        (SUM, "", [ADDED]),
        (f"<|python_tag|>{SUM}", "", [ADDED]),
        (f"{SUM}; {OBJECT}", "", [ADDED, PARIS]),
        (f"\n{SUM}\n{SUM}\n", "", [ADDED, ADDED]),
        (f'I call: {SUM}', f"I call: {SUM}", []),
        (f"{SUM}; {{no", "; {no", [ADDED]),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        (f"So: <|python_tag|>{SUM}", "So:", [ADDED]),
    ],
    "pythonic": [
        ('[get_weather(city="Paris, {\\"}\\\\ é")]', "", [PARIS]),
        ("[add(a=[1, {'b': None}], c=-1.5e3), add()]", "", [ADDED, ("add", {})]),
        ("<|python_start|>[x.y(a=true)]<|python_end|>", "", [("x.y", {"a": True})]),
        ("[add(a=b)]", "[add(a=b)]", []),
        ("[1, 2]", "[1, 2]", []),
        ("[add(1)] is text", "[add(1)] is text", []),
    ],
    "qwen3_coder": [
        (TAGGED, "", [PARIS]),
        (f"I look.\n{TAGGED}\n{TAGGED_SUM}", "I look.", [PARIS, ADDED]),
        (f"{TAGGED} and so on", "and so on", [PARIS]),
        (TAGGED.removesuffix("\n</tool_call>"), "", [PARIS]),
        (tagged("add"), "", [("add", {})]),
        (tagged("x.y", a="True"), "", [("x.y", {"a": True})]),  # as Python has it
        (tagged("x.y", a="null"), "", [("x.y", {"a": None})]),
        (tagged("x.y", a="maybe"), "", [("x.y", {"a": "maybe"})]),
        (tagged("x.y", date="2024"), "", [("x.y", {"date": "2024"})]),
        (tagged("x.y", date='"2024-01-01"'), "", [("x.y", {"date": "2024-01-01"})]),
        (tagged("x.y", unit="3"), "", [("x.y", {"unit": "3"})]),
        (tagged("x.y", code="10115"), "", [("x.y", {"code": "10115"})]),
        (tagged("x.y", code="(1, 2)"), "", [("x.y", {"code": "(1, 2)"})]),
        (tagged("x.y", code="None"), "", [("x.y", {"code": None})]),
        (tagged("x.y", code='"a"'), "", [("x.y", {"code": "a"})]),
        (tagged("x.y", size="1.5"), "", [("x.y", {"size": 1.5})]),
        (tagged("x.y", size="true"), "", [("x.y", {"size": "true"})]),
        (tagged("x.y", some='{"a": 1}'), "", [("x.y", {"some": {"a": 1}})]),
        (tagged("x.y", b="7"), "", [("x.y", {"b": "7"})]),  # of no schema
        (tagged("get_weather", city="null"), "", [("get_weather", {"city": "null"})]),
        (tagged("get_weather", city="\n a\n\n"), "", [("get_weather", {"city": "\n a\n\n"})]),
        (tagged("add", c=DIGITS), "", [("add", {"c": DIGITS})]),
        (tagged("add", c="NaN"), "", [("add", {"c": "NaN"})]),
    ],
}  # fmt: skip
EXAMPLES = [(kind, *case) for kind, cases in CALLS.items() for case in cases]


@pytest.mark.parametrize(("kind", "text", "content", "calls"), EXAMPLES)
def test_calls_are_found(
    kind: str, text: str, content: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    assert reply(kind, text) == (content, calls)


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize(
    "text",
    [
        "",
        " plain\ntext ",
        '{"name": "get_weather"',
        '{"name": "nobody", "parameters": {}}',
        "<tool_call>{}</tool_call>",
        "<tool_call",
        '<tool_call>\n{"name": "nobody", "arguments": {"a": 1}}\n</tool_call> x',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "no"}',
        "<tool_call>\n<function=nobody>\n</function>\n</tool_call>",
        "<tool_call>\n<function=add",
        "<tool_call>\n<function=add\n>",
        "[TOOL_CALLS]",
        "[TOOL_CALLS][]",
        "[TOOL_CALLS] [{]",
        "[TOOL_CALLS]nobody{}",
        "[TOOL_CALLS][TOOL",
        '{"city": "Paris"}',
        "[add(a=",
        '[add(a="\\ud800")]',
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\ud800\\"}"}',
    ],
)
def test_what_is_no_call_is_text(kind: str, text: str) -> None:
    assert read(kind, [text]) == ([Text(text)] if text else [])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hermes", f'<tool_call>{{"name": {DIGITS}}}</tool_call>'),
        ("hermes", f'<tool_call>{{"arguments": {{"a": {DIGITS}}}, "name": "add"}}</tool_call>'),
        ("pythonic", f"[add(a={DIGITS})]"),
        ("pythonic", "[add(a=NaN)]"),
        ("pythonic", "[add(a=1e999)]"),
        ("pythonic", '[add(**{"a": 1})]'),
    ],
)
def test_what_json_can_not_say_is_text(kind: str, text: str) -> None:
    assert reply(kind, text) == (text, [])


def test_many_arguments_on_many_lines_are_each_their_own() -> None:
    arguments = {f"a{i}": {"é": [f"“{i}”\n", None, i]} for i in range(2000)}
    pairs = (f"{name}={json.dumps(each, ensure_ascii=False)}" for name, each in arguments.items())
    text = "[add(" + ",\r\n ".join(pairs) + ")]"
    assert reply("pythonic", text) == ("", [("add", arguments)])


def test_arguments_come_as_they_are_written() -> None:
    source = Source()
    reader = FORMATS["hermes"]("").read(source, FUNCTIONS)
    found = []
    for piece in ['<tool_call>{"name": "add", "argu', 'ments": {"a"', ': "so ', "far"]:
        source.text += piece
        next(reader)
        found.append(
            [part if isinstance(part, CallBegins) else part.text for part in source.take()]
        )
    assert found[0] == []
    assert isinstance(found[1][0], CallBegins)
    assert found[1][1:] == ['{"a"']
    assert found[2:] == [[': "so '], ["far"]]


def test_arguments_that_go_wrong_end_there() -> None:
    parts = read("hermes", ['<tool_call>{"name": "add", "arguments": {"a": nope}}</tool_call>!'])
    whole = Reply.of(parts)
    assert whole.tool_calls[0].arguments + whole.content == '{"a": nope}}</tool_call>!'


_piece = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[", "]", ";",
        OBJECT, SUM, ARGUMENTS, "\n", " ", "get_weather", "add(a=1)", '{"name": "add", ', "text",
        ",", '"arguments": {"a": 1', "}", "é", "<", "tool", '"', "\\", "<function=add>",
        "</function>", "<parameter=a>", "</parameter>", TAGGED_SUM,
    ]
)  # fmt: skip
_texts = st.lists(_piece, max_size=12).map("".join)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), _texts, st.data())
def test_every_cut_of_a_text_gives_the_same(kind: str, text: str, data: st.DataObject) -> None:
    whole = read(kind, [text])
    cuts = data.draw(st.sets(st.integers(0, len(text)), max_size=12))
    edges = [0, *sorted(cuts), len(text)]
    assert read(kind, [text[a:b] for a, b in pairwise(edges)]) == whole
    assert read(kind, list(text)) == whole


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), _texts)
def test_nothing_of_a_text_without_calls_is_lost(kind: str, text: str) -> None:
    parts = read(kind, [text])
    if not any(isinstance(part, CallBegins) for part in parts):
        assert Reply.of(parts).content == text


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(_json, st.booleans(), st.sampled_from(["", " ", ",", "}", "x"]), st.integers(0, 50))
@example(12, False, "", 0)
def test_a_scanner_finds_the_end_of_json(value: Any, spaced: bool, rest: str, cut: int) -> None:
    text = json.dumps(value, indent=2 if spaced else None, ensure_ascii=spaced)
    if rest == "x" and not text.endswith(('"', "]", "}")):
        rest = " x"
    scanner = JsonScanner()
    end = 0
    for piece_end in (min(cut, len(text + rest)), len(text + rest)):
        end = scanner.scan((text + rest)[:piece_end], end)
    if not rest:
        scanner.finish()
    assert scanner.done
    assert not scanner.failed
    assert end == len(text)


@settings(max_examples=100, deadline=None)
@given(st.text('{}[]",:\\u0a1.-etruefalsn ', max_size=12))
def test_a_scanner_takes_what_python_takes(text: str) -> None:
    try:
        json.loads(text)
        valid = bool(text.strip())
    except ValueError:
        valid = False
    scanner = JsonScanner()
    end = scanner.scan(text)
    if not scanner.done:
        scanner.finish()
    assert (scanner.done and not text[end:].strip(" \n\r\t")) == valid


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("...<tool_call>\\n{...}\\n</tool_call>", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("use [func_name1(params_name1=params_value1)]", "pythonic"),
        ("<tool_call><function=f>", None),
        ("<tool_call>\\n<function=' ~ name ~ '>\\n<parameter=' ~ key ~ '>", "qwen3_coder"),
        ("{{ messages }}", None),
    ],
)
def test_the_template_shows_the_format(template: str, name: str | None) -> None:
    found = format_of(template)
    assert (found.name if found else None) == name
