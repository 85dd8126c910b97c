"""Chat templates: a conversation to prompt tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.template_sandbox import TemplateEnvironment, TemplateRefusal
from tensorray.cluster.tokenizer import ControlToken, InvalidText, Tokenizer

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_FIRST_PRIVATE_CHARACTER = 0xF0000


class ChatTemplateError(BadRequest):
    """There is no chat template, or it can't render this conversation."""


class ChatTemplate:
    """A model's chat template.

    `source` replaces the model's own: a file's path or a template itself. Raises
    ChatTemplateError for a source that is no template; a model whose own template is missing or
    broken is refused when it is asked to chat.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._environment = TemplateEnvironment()
        self._sources = dict(tokenizer.chat_templates)
        self._compiled: dict[str, Template] = {}
        if source is not None:
            self._sources = {"default": _read(source)}
            self._template(with_tools=False)
        spellings = list(tokenizer.control_strings)
        self._edges = {spelling[0] for spelling in spellings} | {s[-1] for s in spellings}

    @property
    def exists(self) -> bool:
        """Whether the model has one, or was given one."""
        return bool(self._sources)

    @property
    def text(self) -> str:
        """The template's own text; of several, all of them."""
        return "\n".join(self._sources.values())

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **arguments: Any,
    ) -> list[int]:
        """Prompt tokens of a conversation. With `continue_final_message` they end where the last
        message's text does, for the answer to go on from there.

        The template's own markup is special tokens; a message that spells one is not obeyed. Once
        rendered the two look alike, so the template is rendered a second time with every message
        in disguise: each character that begins or ends some special token is replaced by another
        that occurs nowhere, one for one. Special tokens that still show in that second text are
        the template's own, whatever it trims, joins, repeats or reorders, and the first text is
        encoded with exactly those places as special tokens. Where the disguise changes what the
        template does (it looks for `</think>` in a message, say), only spelled-out special
        tokens are disguised; where even that does, the conversation is refused.

        Raises BadRequest for malformed messages and ChatTemplateError where the template is
        missing or fails.
        """
        template = self._template(with_tools=bool(tools))
        variables = _variables(messages, tools, arguments)
        mark = _mark_end(variables) if continue_final_message else ""

        def render(variables: dict[str, Any]) -> str:
            return self._render(template, variables, add_generation_prompt)

        try:
            text = render(variables)
        except ChatTemplateError:
            # Most templates want a call's arguments as an object, some as the JSON text that
            # OpenAI's protocol has.
            as_text = _map_arguments(variables, _dump)
            if as_text == variables:
                raise
            text = render(variables := as_text)
        end = len(text)
        if mark:
            if text.count(mark) != 1:
                raise ChatTemplateError(
                    "the chat template does not show the last message as it is, so it can't be "
                    "continued",
                    param="continue_final_message",
                )
            end = text.index(mark)
        try:
            if not any(self._edges.intersection(string) for string in _strings(variables)):
                return self._tokenizer.encode(
                    text[:end], add_special_tokens=False, parse_special=True
                )
            markup = self._own_markup(text, variables, render)
            return self._tokenizer.encode_around(
                text[:end], [token for token in markup if token.end <= end]
            )
        except InvalidText as error:
            raise BadRequest(f"the messages can't be encoded: {error}", param="messages") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **arguments: Any,
    ) -> str:
        """The conversation as the text that `encode` encodes, for display."""
        template = self._template(with_tools=bool(tools))
        return self._render(template, _variables(messages, tools, arguments), add_generation_prompt)

    def _own_markup(
        self, text: str, variables: dict[str, Any], render: Callable[[dict[str, Any]], str]
    ) -> list[ControlToken]:
        """Where `text`, rendered from `variables`, has special tokens of the template's own."""
        disguise = _Disguise(self._edges, text)
        for hide in (disguise.everywhere, disguise.in_spellings(self._tokenizer)):
            try:
                hidden = render(_map_strings(variables, hide))
            except ChatTemplateError:
                continue
            if disguise.lift(hidden) == text:
                return self._tokenizer.find_control_tokens(hidden)
        raise ChatTemplateError(
            "a message spells a special token of this model and the chat template makes something "
            "of it, so the two can't be told apart; leave it out",
            param="messages",
        )

    def _template(self, *, with_tools: bool) -> Template:
        sources = self._sources
        name = "tool_use" if with_tools and "tool_use" in sources else "default"
        if not sources:
            raise ChatTemplateError(
                "this model has no chat template, so it can't take messages; send a prompt to "
                "completions, or start the server with --chat-template"
            )
        if name not in sources:
            if len(sources) > 1:
                raise ChatTemplateError(
                    f"this model has chat templates {', '.join(sources)} and none is the default; "
                    "start the server with --chat-template"
                )
            name = next(iter(sources))
        if name not in self._compiled:
            try:
                self._compiled[name] = self._environment.from_string(sources[name])
            except TemplateSyntaxError as error:
                raise ChatTemplateError(
                    f"the chat template is not valid: line {error.lineno}: {error.message}"
                ) from None
            except (RecursionError, SyntaxError, MemoryError):  # of what it is compiled to
                raise ChatTemplateError("the chat template is nested too deeply") from None
        return self._compiled[name]

    def _render(
        self, template: Template, variables: dict[str, Any], add_generation_prompt: bool
    ) -> str:
        context = {
            "tools": None,
            "documents": None,
            **self._tokenizer.special_tokens,
            **variables,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._environment.render(template, context)
        except TemplateRefusal as error:
            raise ChatTemplateError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from None
        except Exception as error:  # a template's operations can raise anything
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise ChatTemplateError(
                f"the chat template fails on these messages: {kind}{error}", param="messages"
            ) from error


def _variables(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    variables: dict[str, Any] = {**arguments, "messages": check_messages(messages)}
    if tools:
        variables["tools"] = [dict(tool) for tool in tools]
    return variables


class _Disguise:
    """Replaces some characters one for one by private-use ones that occur nowhere else."""

    def __init__(self, characters: set[str], text: str) -> None:
        taken = set(text)
        free = (chr(c) for c in range(_FIRST_PRIVATE_CHARACTER, 0x10FFFE) if chr(c) not in taken)
        pairs = dict(zip(sorted(characters), free, strict=False))
        self._hide = str.maketrans(pairs)
        self._lift = str.maketrans({hidden: plain for plain, hidden in pairs.items()})
        self._pairs = pairs

    def everywhere(self, text: str) -> str:
        return text.translate(self._hide)

    def in_spellings(self, tokenizer: Tokenizer) -> Callable[[str], str]:
        """Hides the first character of every special token that a text spells."""

        def hide(text: str) -> str:
            characters = list(text)
            for token in tokenizer.find_control_tokens(text):
                characters[token.start] = self._pairs[characters[token.start]]
            return "".join(characters)

        return hide

    def lift(self, text: str) -> str:
        return text.translate(self._lift)


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Messages as templates take them: each a role and a text, other keys passed on.

    A content of several text parts becomes one text, a line each; a tool call's arguments, JSON
    text in OpenAI's protocol, become the object they stand for. Raises BadRequest naming the
    place of whatever is malformed or not text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise BadRequest("messages must be a list of at least one message", param="messages")
    checked = []
    for i, message in enumerate(messages):
        here = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise BadRequest(f"{here} must be an object with role and content", param=here)
        role = message.get("role")
        if role not in _ROLES:
            raise BadRequest(
                f"{here}.role must be one of {', '.join(_ROLES)}, not {role!r}",
                param=f"{here}.role",
            )
        name = message.get("name")
        if name is not None and not isinstance(name, str):
            raise BadRequest(f"{here}.name must be a string", param=f"{here}.name")
        checked.append({**message, "content": _content(message, here)})
    parsed: list[dict[str, Any]] = _map_arguments({"messages": checked}, _parse)["messages"]
    return parsed


def _content(message: Mapping[str, Any], here: str) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return None
    where = f"{here}.content"
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of text parts", param=where)
    texts = []
    for j, part in enumerate(content):
        place = f"{where}[{j}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            raise BadRequest(
                f"{place} is of type {kind!r}; this server takes text only", param=place
            )
        if kind != "text" or not isinstance(text, str):
            raise BadRequest(f'{place} must be {{"type": "text", "text": "…"}}', param=place)
        texts.append(text)
    return "\n".join(texts)


def _mark_end(variables: dict[str, Any]) -> str:
    """Put a character that occurs nowhere behind the last message's text; returns it."""
    *before, last = variables["messages"]
    text = last.get("content")
    if not isinstance(text, str) or not text:
        raise BadRequest(
            "continue_final_message: the last message has no text to go on from",
            param="continue_final_message",
        )
    strings = "".join(_strings(variables))
    mark = next(
        character for number in range(0xE000, 0xF900) if (character := chr(number)) not in strings
    )
    variables["messages"] = [*before, {**last, "content": text + mark}]
    return mark


def _map_arguments(variables: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The variables with each tool call's arguments changed."""

    def in_call(call: Any) -> Any:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            function = call["function"]
            if "arguments" in function:
                return {
                    **call,
                    "function": {**function, "arguments": change(function["arguments"])},
                }
        return call

    return {
        **variables,
        "messages": [
            {**message, "tool_calls": [in_call(call) for call in message["tool_calls"]]}
            if isinstance(message.get("tool_calls"), list)
            else message
            for message in variables["messages"]
        ],
    }


def _parse(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _dump(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _strings(value: Any) -> Iterator[str]:
    """Every string in a structure of lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The structure with each of its strings changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _read(source: str) -> str:
    """A template from a file, or as it is if it can't be a path."""
    if re.search(r"[{\n]", source):
        return source
    path = Path(source).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"--chat-template {source}: cannot be read: {error}") from None
