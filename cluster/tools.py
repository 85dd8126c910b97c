"""Tools of a chat, as OpenAI's API has them: functions, and what may or must be called.

https://platform.openai.com/docs/guides/function-calling
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.errors import explain
from tensorray.cluster.structured_outputs import JSON_OPTIONS, StructuredOutputs
from tensorray.cluster.tool_parsers.tool_format import Callee

_MOST_TOOLS = 1024


class Function(BaseModel):
    """A function's name, what it is for, and the JSON schema of its arguments."""

    model_config = ConfigDict(strict=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="default: it takes none")
    strict: bool | None = Field(None, description="hold arguments to the schema, also under auto")


class Tool(BaseModel):
    """One of a request's tools."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"]
    function: Function


class _Name(BaseModel):
    name: str


class NamedTool(BaseModel):
    """The tool_choice that is one function."""

    type: Literal["function"]
    function: _Name


class _AllowedTools(BaseModel):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedTools(BaseModel):
    """The tool_choice that leaves some of the functions."""

    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools


ToolChoice = Union[Literal["none", "auto", "required"], NamedTool, AllowedTools]  # noqa: UP007


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools.

    `names` are the functions that may be called: by the model's choice under "auto", and at least
    one of them under "required". With `single` there is at most one call.
    """

    tools: tuple[Tool, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    names: frozenset[str] = frozenset()
    single: bool = False

    @classmethod
    def of(
        cls,
        tools: Sequence[Tool] | None,
        choice: ToolChoice | None = None,
        parallel: bool | None = None,
    ) -> ToolUse:
        """Raises BadRequest where the choice does not go with the tools."""
        tools = tuple(tools or ())
        if len(tools) > _MOST_TOOLS:
            raise BadRequest(
                f"{len(tools)} tools are too many; {_MOST_TOOLS} is the most", param="tools"
            )
        known = [tool.function.name for tool in tools]
        if len(set(known)) < len(known):
            raise BadRequest("tools: two functions have the same name", param="tools")
        if not tools:
            if choice not in (None, "none", "auto"):
                raise BadRequest("tool_choice needs tools; send them", param="tool_choice")
            return cls()
        single = parallel is False
        named: list[str] = []
        mode: Literal["none", "auto", "required"]
        match choice:
            case NamedTool():
                mode, named, single = "required", [choice.function.name], True
            case AllowedTools(allowed_tools=allowed):
                mode, named = allowed.mode, [each.function.name for each in allowed.tools]
            case _:
                mode = choice or "auto"
        if missing := sorted(set(named) - set(known)):
            raise BadRequest(
                f"tool_choice names {missing[0]!r}, which is none of the tools", param="tool_choice"
            )
        if mode == "none":
            return cls()
        return cls(tools, mode, frozenset(named or known), single)

    @classmethod
    def read(
        cls,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: str | Mapping[str, Any] | None = None,
        parallel: bool | None = None,
    ) -> ToolUse:
        """From plain objects, as JSON has them. Raises BadRequest."""
        try:
            checked = _TOOLS.validate_python(list(tools or ()))
            chosen = None if choice is None else _CHOICE.validate_python(choice)
        except ValidationError as error:
            message, param = explain(error)
            raise BadRequest(f"tools: {message}", param=param) from None
        return cls.of(checked, chosen, parallel)

    @property
    def is_strict(self) -> bool:
        """Whether a function that may be called wants its schema kept."""
        return any(tool.function.strict for tool in self.tools if tool.function.name in self.names)

    def for_template(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates take them; None for none."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.function.name,
                    "description": tool.function.description or "",
                    "parameters": tool.function.parameters or _NO_PARAMETERS,
                },
            }
            for tool in self.tools
        ] or None

    def schemas(self) -> dict[str, dict[str, Any]]:
        """The schemas of the arguments of functions that may be called, as they came, by name."""
        functions = (tool.function for tool in self.tools)
        return {each.name: each.parameters or {} for each in functions if each.name in self.names}

    def callees(self) -> list[Callee]:
        """Functions that may be called, with schemas that guided decoding can follow.

        Of a schema that is not strict, keywords that can't be enforced are left out. Raises
        BadRequest for a strict one that has such, or that is no object's.
        """
        found = []
        for i, tool in enumerate(self.tools):
            function = tool.function
            if function.name not in self.names:
                continue
            place = f"tools[{i}].function.parameters"
            schema = function.parameters or {**_NO_PARAMETERS, "additionalProperties": False}
            schema = {"type": "object", **schema}
            if schema["type"] != "object":
                raise BadRequest(f"{place} must be an object's schema", param=place)
            if function.strict:
                StructuredOutputs(json=schema).compiled(place)
            options = {**JSON_OPTIONS, "lenient": not function.strict}
            found.append(Callee(function.name, {**schema, "x-guidance": options}))
        return found


_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_TOOLS: TypeAdapter[list[Tool]] = TypeAdapter(list[Tool])
_CHOICE: TypeAdapter[ToolChoice] = TypeAdapter(ToolChoice)
