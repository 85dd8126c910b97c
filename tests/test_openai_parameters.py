"""Every parameter of OpenAI's API is in the README's table, and the table is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats

from tensorray.cluster.errors import ApiError
from tensorray.cluster.openai_api import ApiRequest, ChatRequest, CompletionRequest

README = Path(__file__).parents[1] / "README.md"
MESSAGES = [{"role": "user", "content": "Hello"}]
KINDS: dict[str, tuple[type[ApiRequest], type, dict[str, Any]]] = {
    "completions": (
        CompletionRequest,
        completions.CompletionCreateParamsBase,
        {"prompt": "Hello"},
    ),
    "chat": (ChatRequest, chats.CompletionCreateParamsBase, {"messages": MESSAGES}),
}


def table() -> dict[str, dict[str, str]]:
    """What the README says of each parameter, by API."""
    text = README.read_text().split("Of OpenAI's own parameters:")[1].split("\n\nRefused")[0]
    found: dict[str, dict[str, str]] = {"completions": {}, "chat": {}}
    for row in text.strip().splitlines()[2:]:
        _, names, of_completions, of_chat, _ = row.split("|")
        for name in re.findall(r"`(\w+)`", names):
            found["completions"][name] = of_completions.strip()
            found["chat"][name] = of_chat.strip()
    return found


@pytest.mark.parametrize("api", KINDS)
def test_no_parameter_is_forgotten(api: str) -> None:
    known = {*KINDS[api][1].__annotations__, "stream"}
    listed = {name for name, said in table()[api].items() if said != "-"}
    assert listed - known == set()
    assert known - listed - ({"response_format"} if api == "completions" else set()) == set()


@pytest.mark.parametrize("api", KINDS)
def test_what_the_table_says_is_what_happens(api: str) -> None:
    kind, _, least = KINDS[api]
    for name, said in table()[api].items():
        if said == "yes":
            assert name in kind.model_fields, name
        elif said == "refused":
            with pytest.raises(ApiError, match=name):
                kind.model_validate({**least, name: {"asks": "for something"}}).ignored_fields()
        else:
            assert said == "-", name
