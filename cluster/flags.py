"""Command-line flags made from a pydantic model: a field is a flag, under the field's name.

A model declares name, type, default, help and limits once; pydantic converts and checks what the
command line says, so a value is read the same way from a flag, a YAML file and JSON.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tensorray.cluster.command_lines import ALIASES
from tensorray.cluster.usage_error import UsageError

# The flags that were on the command line, by field name.
Given = dict[str, Any]


def with_flags(**models: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per field of each model.

    `models` names parameters of the command; each receives a dict of the flags that were given
    (`Given`), so that a default can still come from somewhere else. A field whose name an earlier
    model or the command itself has taken gets no flag. A model's `topics` are the parts of its
    flags' help, by the first field of each.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = _hints(command)
        parameters = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name not in models
        ]
        owner: dict[str, str] = {}
        taken = {parameter.name for parameter in parameters}
        for group, model in models.items():
            topics: Mapping[str, str] = getattr(model, "topics", {})
            topic = None
            for name, field in model.model_fields.items():
                topic = topics.get(name, topic)
                if name not in taken:
                    taken.add(name)
                    owner[name] = group
                    parameters.append(_parameter(name, field, topic))

        @functools.wraps(command)
        def call(**values: Any) -> None:
            given: dict[str, Given] = {group: {} for group in models}
            for name, group in owner.items():
                if (value := values.pop(name)) not in (None, []):
                    model = models[group]
                    given[group][name] = _parse(name, model.model_fields[name], value)
            command(**values, **given)

        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        del call.__dict__["__wrapped__"]  # typer would look through it at the bare command
        return call

    return decorate


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def explain(error: ValidationError) -> str:
    """A ValidationError as one line a problem, each naming the flag it is about."""
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        if problem["loc"]:  # else it is about several fields, and says which
            name, *place = map(str, problem["loc"])
            where = flag(name) + (f" ({'.'.join(place)})" if place else "")
            value = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
            message = f"{where}: {message}{value}"
        lines.append(message)
    return "\n".join(lines)


def _hints(command: Callable[..., None]) -> dict[str, Any]:
    """The parameters' annotations, each Annotated where the command says so.

    Python 3.10 wraps those that default to None in an Optional, which hides them.
    """
    hints = get_type_hints(command, include_extras=True)
    for name, hint in hints.items():
        inside = [part for part in get_args(hint) if get_origin(part) is Annotated]
        if get_origin(hint) is Union and inside:
            hints[name] = inside[0]
    return hints


def _parameter(name: str, field: FieldInfo, topic: str | None) -> inspect.Parameter:
    kind, metavar = _kind(field.annotation)
    is_switch = kind == bool | None
    names = flag(name) + (f"/--no-{name.replace('_', '-')}" if is_switch else "")
    others = ALIASES.get(name, ())
    text = field.description or ""
    if field.default not in (None, PydanticUndefined) and not (is_switch and not field.default):
        text += f" [default: {str(field.default).lower() if is_switch else field.default}]"
    option = typer.Option(
        *others,
        names,
        help=text.strip(),
        metavar=metavar,
        show_default=False,
        rich_help_panel=topic,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind, option],
    )


def _kind(annotation: Any) -> tuple[Any, str | None]:
    """The type the command line parser should use (pydantic does the rest), and a metavar."""
    annotation = _bare(annotation)
    origin = get_origin(annotation)
    if annotation is bool:
        return bool | None, None
    if origin is list:
        return list[str] | None, _kind(get_args(annotation)[0])[1]
    if origin is dict:
        return str | None, "JSON"
    if origin is Literal:
        return str | None, "|".join(str(choice) for choice in get_args(annotation))
    return str | None, {int: "INTEGER", float: "NUMBER"}.get(annotation, "TEXT")


def _bare(annotation: Any) -> Any:
    """A type without its `| None` and without its Annotated metadata."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, UnionType):
            annotation = next(part for part in get_args(annotation) if part is not NoneType)
        else:
            return annotation


def _parse(name: str, field: FieldInfo, value: Any) -> Any:
    kind = _bare(field.annotation)
    if get_origin(kind) is list and len(value) == 1 and value[0].startswith("["):
        return _json(name, value[0], list)
    if get_origin(kind) is dict:
        return _json(name, value, dict)
    return _whole(value) if kind is int else value


def _json(name: str, text: str, kind: type) -> Any:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{flag(name)}: not JSON: {error} (got {text!r})") from None
    if not isinstance(parsed, kind):
        raise UsageError(f"{flag(name)}: must be a JSON object (got {text!r})")
    return parsed


def _whole(text: str) -> str:
    """A number with a letter of vLLM's, as the number: 8k is 8000, 8K is 8192."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT])", text)
    if found is None:
        return text
    number, letter = found.groups()
    base = 1000 if letter.islower() else 1024
    return str(int(Decimal(number) * base ** ("kmgt".index(letter.lower()) + 1)))
