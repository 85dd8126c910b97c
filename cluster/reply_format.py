"""How a model's answers are read: reasoning first, then text and calls of tools.

`ReplyFormats` is a model's, `ReplyFormat` one request's, `ReplyReader` one sequence's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tensorray.cluster import reasoning, tool_parsers
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.reasoning import ReasoningFormat
from tensorray.cluster.reply import Part, Reasoning
from tensorray.cluster.reply_grammar import reply_grammar
from tensorray.cluster.text_source import Reading, Source
from tensorray.cluster.tokenizer import Tokenizer
from tensorray.cluster.tool_parsers.tool_format import ToolFormat, literal
from tensorray.cluster.tools import ToolUse

AUTO = "auto"
NONE = "none"
TOOL_PARSERS = (AUTO, NONE, *tool_parsers.FORMATS)
REASONING_PARSERS = (AUTO, NONE, *reasoning.FORMATS)


@dataclass(frozen=True)
class ReplyFormat:
    """How the answer to one request is read, and what it must follow (a grammar, if any).

    `inside` says that it begins inside of reasoning; `shown` are special tokens that are markers,
    so that text must have them.
    """

    reasoning: ReasoningFormat | None
    inside: bool
    tools: ToolFormat | None
    use: ToolUse
    shown: frozenset[int]
    grammar: str = ""


class ReplyFormats:
    """What a model's chat template says of its answers, or what it was said to say."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        *,
        tool_parser: str = AUTO,
        reasoning_parser: str = AUTO,
        calls_freely: bool = True,
    ) -> None:
        """Without `calls_freely` calls are made only where a request requires them.

        Raises ValueError for a parser that does not exist.
        """
        self.template = template
        self._tokenizer = tokenizer
        self._calls_freely = calls_freely
        self.tools: ToolFormat | None = None
        self.reasoning: ReasoningFormat | None = None
        if tool_parser == AUTO:
            self.tools = tool_parsers.format_of(template)
        elif tool_parser in tool_parsers.FORMATS:
            self.tools = tool_parsers.FORMATS[tool_parser](template)
        elif tool_parser != NONE:
            raise ValueError(f"tool_call_parser is one of {', '.join(TOOL_PARSERS)}")
        if reasoning_parser == AUTO:
            self.reasoning = reasoning.format_of(template)
        elif reasoning_parser in reasoning.FORMATS:
            self.reasoning = reasoning.FORMATS[reasoning_parser]
        elif reasoning_parser != NONE:
            raise ValueError(f"reasoning_parser is one of {', '.join(REASONING_PARSERS)}")

    def check(self, use: ToolUse) -> None:
        """Raises BadRequest for tools that this model can't be given."""
        if use.mode == "none":
            return
        if not re.search(r"\btools\b", self.template):
            raise BadRequest(
                "tools: this model's chat template knows of none; send tool_choice 'none', or "
                "start the server with a --chat-template that does",
                param="tools",
            )
        if self.tools is None:
            raise BadRequest(
                "tools: how this model writes calls is not known; start the server with "
                f"--tool-call-parser {'|'.join(tool_parsers.FORMATS)}",
                param="tools",
            )
        if use.mode == "auto" and not self._calls_freely:
            raise BadRequest(
                "tool_choice 'auto' is turned off on this server (--no-enable-auto-tool-choice); "
                "send 'required', a function or 'none'",
                param="tool_choice",
            )

    def format(
        self,
        prompt: Sequence[int],
        use: ToolUse,
        answer: str = "",
        *,
        continues: bool = False,
    ) -> ReplyFormat | None:
        """How the answer to a prompt is read, or the rest of one that the prompt `continues`;
        None: it is text alone. `answer` is the grammar that the text itself must follow. Raises
        BadRequest."""
        thinks, inside = self.reasoning, False
        if thinks is not None:
            state = thinks.state(self._tokenizer, prompt, continues=continues)
            thinks, inside = (None, False) if state is None else (thinks, state)
        tools = self.tools if use.mode != "none" else None
        if thinks is None and tools is None:
            return None
        grammar = reply_grammar(thinks, inside, tools, use, answer, self._spell)
        markers = [
            *(tools.markers if tools else ()),
            *((thinks.begin, thinks.end) if thinks else ()),
        ]
        ids = {self._tokenizer.token_to_id(marker) for marker in markers}
        shown = frozenset(id for id in ids if id is not None)
        return ReplyFormat(thinks, inside, tools, use, shown, grammar)

    def _spell(self, marker: str) -> str:
        """A marker in a grammar: special tokens are not text there."""
        id = self._tokenizer.token_to_id(marker)
        return f"<[{id}]>" if id in set(self._tokenizer.control_ids) else literal(marker)


class ReplyReader:
    """Reads one sequence's text as it comes. `reasoning_tokens` counts the tokens so far that were
    reasoning, markers included."""

    def __init__(self, format: ReplyFormat, tokenizer: Tokenizer) -> None:
        self._format = format
        self._tokenizer = tokenizer
        self._source = Source()
        self._has_reasoned: bool | None = None  # not known yet
        self._end: int | None = None if format.reasoning else 0  # of reasoning, in characters
        self._tokens = 0  # up to there
        self._reading = self._read()

    @property
    def reasoning_tokens(self) -> int:
        return self._tokens if self._has_reasoned else 0

    def push(self, text: str, tokens: Sequence[int]) -> list[Part]:
        """The parts that this text adds; it is that of these tokens."""
        source = self._source
        was_open = self._end is None
        before = source.position + len(source.text) - source.at
        source.text += text
        next(self._reading, None)
        if was_open:
            self._tokens += (
                len(tokens)
                if self._end is None
                else self._count(text[: max(0, self._end - before)], tokens)
            )
        return source.take()

    def finish(self) -> list[Part]:
        """The parts that were held back, when no more text comes."""
        self._source.ended = True
        next(self._reading, None)
        self._source.finish()
        return self._source.take()

    def _read(self) -> Reading[None]:
        if self._format.reasoning is not None:
            yield from self._read_reasoning(self._format.reasoning)
        if self._format.tools is not None:
            yield from self._format.tools.read(self._source, self._format.use.schemas())
        yield from self._source.rest()

    def _read_reasoning(self, format: ReasoningFormat) -> Reading[None]:
        source = self._source
        self._has_reasoned = self._format.inside
        if not self._format.inside:
            yield from source.space()
            self._has_reasoned = yield from source.literal(format.begin)
            if not self._has_reasoned:
                source.at = 0
        if self._has_reasoned:
            source.drop()
            source.edge()
            if (yield from source.write_until(format.end, Reasoning)):
                source.at += len(format.end)
            source.edge()
        self._end = source.position
        source.drop()

    def _count(self, text: str, tokens: Sequence[int]) -> int:
        """How many of the tokens this beginning of their text takes."""
        left = len(text.encode())
        for count, token in enumerate(tokens):
            if left <= 0:
                return count
            left -= len(self._tokenizer.token_bytes[token])
        return len(tokens)
