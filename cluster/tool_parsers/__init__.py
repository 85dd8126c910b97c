"""Formats in which models write calls of tools, a file each."""

from __future__ import annotations

from tensorray.cluster.tool_parsers.hermes import Hermes
from tensorray.cluster.tool_parsers.llama3_json import Llama3Json
from tensorray.cluster.tool_parsers.mistral import Mistral
from tensorray.cluster.tool_parsers.pythonic import Pythonic
from tensorray.cluster.tool_parsers.qwen3_coder import Qwen3Coder
from tensorray.cluster.tool_parsers.tool_format import ToolFormat

FORMATS: dict[str, type[ToolFormat]] = {
    kind.name: kind for kind in (Hermes, Qwen3Coder, Mistral, Pythonic, Llama3Json)
}


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template shows its model."""
    for kind in FORMATS.values():
        if kind.is_shown_in(template):
            return kind(template)
    return None
