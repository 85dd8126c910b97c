"""Anthropic's Messages API, by its own client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2  # the client's own
import pytest
from anthropic import (
    APIStatusError,
    AsyncAnthropic,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
)
from helpers.null_engine import write_model
from helpers.scripted_backend import THINKING_TEMPLATE, ScriptedBackend, scripted_app

from tensorray.cluster.request import Delta

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>\nHm…\n</think>\n\nLet me look.\n{CALL}"
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a place",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
HELLO: Any = [{"role": "user", "content": "Weather?"}]
THINK: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), chat_template=THINKING_TEMPLATE)


@asynccontextmanager
async def client_of(
    model: Path, text: str, *, settings: dict[str, Any] | None = None, **how: Any
) -> AsyncIterator[tuple[AsyncAnthropic, ScriptedBackend, list[str]]]:
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return text

    config = {"hf_overrides": {"max_position_embeddings": 8192}, **(settings or {})}
    app, backend = scripted_app(model, script, config=config, **how)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http:
        client = AsyncAnthropic(
            base_url="http://test", api_key="secret", http_client=http, max_retries=0
        )
        yield client, backend, prompts


async def create(client: AsyncAnthropic, **fields: Any) -> Any:
    return await client.messages.create(
        **{"model": "tiny", "max_tokens": 100, "messages": HELLO, **fields}
    )


async def test_a_message(model: Path) -> None:
    async with client_of(model, "Sunny.") as (client, backend, prompts):
        answer = await create(
            client,
            system=[{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}],
            extra_body={"temperature": 0.5, "top_k": 3},
            stop_sequences=["STOP"],
            metadata={"user_id": "ada"},
        )
        assert (answer.type, answer.role, answer.model) == ("message", "assistant", "tiny")
        assert [(block.type, block.text) for block in answer.content] == [("text", "Sunny.")]
        assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
        assert answer.usage.output_tokens == 6
        assert answer.usage.input_tokens == len(backend.seen[0].prompt)
        (request,) = backend.seen
        assert (request.user, request.sampling.top_k, request.max_tokens) == ("ada", 3, 100)
        off = "<think>\n\n</think>\n\n"  # nothing said of thinking: none
        assert prompts == [f"<system>Be short.<user>Weather?<assistant>{off}"]


async def test_thinking_text_and_tool_use_are_blocks(model: Path) -> None:
    async with client_of(model, ANSWER) as (client, _, prompts):
        answer = await create(client, tools=[WEATHER], thinking=THINK)
        thought, text, call = answer.content
        assert (thought.type, thought.thinking) == ("thinking", "Hm…")
        assert text.text == "Let me look."
        assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
        assert answer.stop_reason == "tool_use"
        assert prompts[0].endswith("<assistant>")


@pytest.mark.parametrize("step", [1, 7, 1000])
async def test_a_stream_tells_the_same(model: Path, step: int) -> None:
    async with client_of(model, ANSWER, step=step) as (client, _, _):
        stream = await create(client, tools=[WEATHER], thinking=THINK, stream=True)
        events = [event async for event in stream]
        kinds = [event.type for event in events]
        once = [kind for i, kind in enumerate(kinds) if kinds[i - 1] != kind]
        block = ["content_block_start", "content_block_delta", "content_block_stop"]
        assert [kind for kind in once if kind != "ping"] == [
            "message_start", *block, *block, *block, "message_delta", "message_stop"
        ]  # fmt: skip
        starts = [event for event in events if event.type == "content_block_start"]
        assert [event.index for event in starts] == [0, 1, 2]
        assert [event.content_block.type for event in starts] == ["thinking", "text", "tool_use"]
        pieces = [
            event.delta.partial_json
            for event in events
            if event.type == "content_block_delta" and event.delta.type == "input_json_delta"
        ]
        assert json.loads("".join(pieces)) == {"city": "Paris"}
        assert len(pieces) > 1 or step == 1000
        last = events[-2]
        assert last.delta.stop_reason == "tool_use"
        assert last.usage.output_tokens > 0


async def test_anthropics_stream_helper_understands_it(model: Path) -> None:
    async with client_of(model, ANSWER, step=2) as (client, _, _):
        async with client.messages.stream(
            model="tiny", max_tokens=100, messages=HELLO, tools=[WEATHER], thinking=THINK
        ) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "Let me look."
        assert final.content[-1].type == "tool_use"
        assert final.content[-1].input == {"city": "Paris"}


async def test_results_of_tools_go_back(model: Path) -> None:
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "sunny"}],
                },
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    async with client_of(model, "fine") as (client, _, prompts):
        await create(client, messages=messages, thinking=THINK)
        assert prompts[0] == (
            "<user>Weather?<assistant>Let me look."
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
            "<tool>sunny<user>And?<assistant>"
        )


async def test_an_answer_goes_on_from_the_assistants_last_words(model: Path) -> None:
    async with client_of(model, "ny.") as (client, _, prompts):
        answer = await create(client, messages=[*HELLO, {"role": "assistant", "content": "Sun"}])
        assert answer.content[0].text == "ny."
        assert prompts[0] == "<user>Weather?<assistant>Sun"


async def test_tool_choice_is_enforced(model: Path) -> None:
    async with client_of(model, CALL) as (client, backend, _):
        for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
            await create(client, tools=[WEATHER], tool_choice=choice)
        await create(client, tools=[WEATHER], tool_choice={"type": "auto"})
        none = await create(client, tools=[WEATHER], tool_choice={"type": "none"})
        assert none.content[0].text == CALL
        grammars = [request.sampling.grammar for request in backend.seen]
        assert ["get_weather" in grammar for grammar in grammars] == [True, True, False, False]


async def test_why_it_stopped(model: Path) -> None:
    async with client_of(model, "one STOP two") as (client, _, _):
        answer = await create(client, stop_sequences=["STOP"])
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "STOP")
        assert answer.content[0].text == "one "
    async with client_of(model, CALL[:60], finish_reason="length") as (client, _, _):
        answer = await create(client, tools=[WEATHER])
        assert answer.stop_reason == "max_tokens"
        assert answer.content[0].input == {}  # cut short


async def test_tokens_are_counted(model: Path) -> None:
    async with client_of(model, "x") as (client, backend, _):
        fields: Any = {"messages": HELLO, "system": "Be short.", "tools": [WEATHER]}
        counted = await client.messages.count_tokens(model="tiny", **fields)
        await create(client, **fields)
        assert counted.input_tokens == len(backend.seen[0].prompt)


async def test_keys_come_in_a_header_of_their_own(model: Path) -> None:
    async with client_of(model, "x", settings={"api_key": ["secret"]}) as (client, _, _):
        await create(client)
        with pytest.raises(AuthenticationError) as caught:
            await create(client.with_options(api_key="wrong"))
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "system", "content": "x"}]}, "goes into system"),
    ({"messages": [*HELLO, {"role": "assistant", "content": ""}]}, "no text to go on from"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        r"messages\[0\].content\[0\].*'image'.*text only",
    ),
    ({"messages": [{"role": "user", "content": []}]}, r"messages\[0\].content has no blocks"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "no built-in tools"),
    ({"extra_body": {"temperature": 1.5}}, "temperature"),
    ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "mcp_servers"),
    ({"extra_headers": {"anthropic-version": "2022-01-01"}}, "anthropic-version"),
    ({"tool_choice": {"type": "any"}}, "needs tools"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
async def test_what_can_not_be_is_refused(
    model: Path, fields: dict[str, Any], message: str
) -> None:
    async with client_of(model, "") as (client, _, _):
        with pytest.raises(BadRequestError, match=message) as caught:
            await create(client, **fields)
        assert caught.value.body["type"] == "error"  # type: ignore[index]
        assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


async def test_an_unknown_model_is_not_found(model: Path) -> None:
    async with client_of(model, "") as (client, _, _):
        with pytest.raises(NotFoundError) as caught:
            await create(client, model="claude")
        assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


async def test_a_failure_in_a_stream_is_an_error_event(model: Path) -> None:
    async with client_of(model, "abc") as (client, backend, _):
        whole = backend.generate

        async def failing(request: Any) -> Any:
            async for deltas in whole(request):
                yield deltas
                raise KeyError("broken")

        backend.generate = failing  # type: ignore[method-assign]
        stream = await create(client, stream=True)
        with pytest.raises(APIStatusError) as caught:
            _ = [event async for event in stream]
        assert caught.value.body["error"]["type"] == "api_error"  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_request_makes_impossible_is_its_fault(model: Path, stream: bool) -> None:
    async with client_of(model, "abc") as (client, backend, _):

        async def failing(request: Any) -> Any:
            yield [Delta(0, [], finish_reason="error", error="no token is left", refused=True)]

        backend.generate = failing  # type: ignore[method-assign]
        with pytest.raises(BadRequestError, match="no token is left") as caught:
            await create(client, stream=stream)
        assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
