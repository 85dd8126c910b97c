"""Jinja for templates that came with a model: sandboxed, and bounded in time and memory.

A template is a program from whoever published the model. Jinja's sandbox keeps it from the
process it runs in; this environment also keeps it from hanging that process. Bounded are:

- time: `CPU_SECONDS` of this thread's CPU, looked at in every loop, call and operator;
- memory: no operator, filter or call may make a string, or a list of strings, of more than
  `MAX_SIZE` characters or items in all;
- numbers: none above `MAX_SIZE` may come out of an operator or go into a filter or call (as
  widths, counts, powers); `range` has the sandbox's own limit of 100,000.

It renders as Hugging Face's `apply_chat_template` does: the same whitespace rules, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that escapes nothing, and `{% generation %}` blocks.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

CPU_SECONDS = 1.0
MAX_SIZE = 8_000_000

_deadline: ContextVar[float] = ContextVar("template_deadline", default=float("inf"))
_LONG_NUMBER = re.compile(r"\d{7,}")


class TemplateLimit(TemplateError):
    """A template tried to use more time or memory than it may."""


class TemplateRefusal(TemplateError):
    """A template called `raise_exception`: what it was given is not what it is for."""


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates with `from_string`; run them with `render`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def render(self, template: Template, variables: dict[str, Any]) -> str:
        """The template's output. Raises jinja2's TemplateError, or whatever the template's own
        operations raise (TypeError, KeyError, …)."""
        before = _deadline.set(time.thread_time() + CPU_SECONDS)
        try:
            pieces, size = [], 0
            for piece in template.generate(variables):
                size += len(piece)
                if size > MAX_SIZE:
                    raise TemplateLimit(f"the output exceeds {MAX_SIZE} characters")
                pieces.append(piece)
            return "".join(pieces)
        finally:
            _deadline.reset(before)

    def tick(self) -> str:
        """Called in every turn of a loop."""
        _check_time()
        return ""

    def join_bounded(self, *values: object) -> object:
        """The operator `~`."""
        return _bounded("".join(map(str, values)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_time()
        if operator == "*":
            _check_size(_size(left) * max(right, 0) if isinstance(right, int) else 0)
            _check_size(_size(right) * max(left, 0) if isinstance(left, int) else 0)
        elif operator == "**":
            _check_number(left)
            if isinstance(right, int) and right > 64:
                raise TemplateLimit(f"a power of {right}")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_arguments("%", list(right) if isinstance(right, tuple) else [right])
        return _bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        _check_arguments(
            getattr(method, "__name__", ""),
            [getattr(method, "__self__", None), *args, *kwargs.values()],
        )
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree


class _Instrument(NodeTransformer):
    """Puts `tick` into every loop and `join_bounded` for `~`, out of a template's reach."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [])).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_bounded", node.nodes).set_lineno(node.lineno)


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is just text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at the time, its arguments and its result."""

    @wraps(function)  # keeps the marks by which Jinja passes the environment or context
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        _check_arguments(name, [*args, *kwargs.values()])
        return _bounded(function(*args, **kwargs))

    return guarded


def _check_time() -> None:
    if time.thread_time() > _deadline.get():
        raise TemplateLimit(f"it ran for more than {CPU_SECONDS:g} seconds")


def _check_arguments(name: str, values: list[Any]) -> None:
    for value in values:
        _check_number(value)
    if name in ("join", "replace"):
        size = 1
        for value in values:
            size *= max(1, _size(value))
        _check_size(size // 100)
    elif name in ("format", "format_map"):
        for value in values:
            _check_format(value)


def _check_format(value: object) -> None:
    if isinstance(value, str) and _LONG_NUMBER.search(value):
        raise TemplateLimit("a format string with a number of seven or more digits")


def _check_number(value: object) -> None:
    if isinstance(value, int) and abs(value) > MAX_SIZE:
        raise TemplateLimit(f"a number above {MAX_SIZE}")


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise TemplateLimit(f"a value of more than {MAX_SIZE} characters")


def _bounded(value: Any) -> Any:
    _check_size(_size(value))
    _check_number(value)
    return value


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return len(value) + sum(len(item) for item in value if isinstance(item, str | list | tuple))
    return 0


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
