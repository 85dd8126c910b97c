"""What a chat model's answer is made of: reasoning, text for the user, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(frozen=True)
class Reasoning:
    """Some of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Text:
    """Some of the answer itself."""

    text: str


@dataclass(frozen=True)
class CallBegins:
    """A call of a function; its arguments follow, up to the next part of another kind."""

    name: str
    id: str


@dataclass(frozen=True)
class Arguments:
    """Some of the JSON text of a call's arguments."""

    text: str


Part = Reasoning | Text | CallBegins | Arguments


@dataclass
class ToolCall:
    """A whole call; `arguments` is JSON text, which is cut short where the answer was."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Reply:
    """A whole answer. Without any text, `content` is empty."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable[Part]) -> Reply:
        reply = cls()
        for part in parts:
            match part:
                case Text(text):
                    reply.content += text
                case Reasoning(text):
                    reply.reasoning += text
                case CallBegins(name, id):
                    reply.tool_calls.append(ToolCall(id, name))
                case Arguments(text):
                    reply.tool_calls[-1].arguments += text
        return reply


def joined(parts: Sequence[Part]) -> list[Part]:
    """The parts with neighbours of one kind made one."""
    found: list[Part] = []
    for _, run in groupby(parts, key=type):
        first, *others = run
        if isinstance(first, CallBegins):
            found += [first, *others]
        else:
            texts = [part.text for part in others if not isinstance(part, CallBegins)]
            found.append(type(first)("".join([first.text, *texts])))
    return found
