"""OpenAI's Responses API, by its own client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.null_engine import write_model
from helpers.scripted_backend import THINKING_TEMPLATE, ScriptedBackend, scripted
from openai import AsyncOpenAI, BadRequestError

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>\nHm…\n</think>\n\nLet me look.\n{CALL}"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": None,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), chat_template=THINKING_TEMPLATE)


@asynccontextmanager
async def client_of(
    model: Path, text: str, **how: Any
) -> AsyncIterator[tuple[AsyncOpenAI, ScriptedBackend, list[str]]]:
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return text

    config = {"hf_overrides": {"max_position_embeddings": 4096}}
    async with scripted(model, script, config=config, **how) as (http, backend):
        client = AsyncOpenAI(
            base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
        )
        yield client, backend, prompts


async def test_a_string_gets_a_text(model: Path) -> None:
    async with client_of(model, "Sunny.") as (client, backend, prompts):
        answer = await client.responses.create(
            model="tiny",
            input="Weather?",
            instructions="Be short.",
            max_output_tokens=50,
            temperature=0.5,
            metadata={"a": "b"},
            store=False,
            safety_identifier="ada",
        )
        assert answer.output_text == "Sunny."
        assert (answer.status, answer.object, answer.metadata) == (
            "completed",
            "response",
            {"a": "b"},
        )
        assert answer.usage is not None
        assert answer.usage.output_tokens == 6
        assert answer.usage.total_tokens == answer.usage.input_tokens + 6
        assert prompts == ["<system>Be short.<user>Weather?<assistant>"]
        (request,) = backend.seen
        assert (request.max_tokens, request.sampling.temperature, request.user) == (50, 0.5, "ada")


async def test_reasoning_text_and_calls_are_items(model: Path) -> None:
    async with client_of(model, ANSWER) as (client, _, _):
        answer = await client.responses.create(model="tiny", input="Hi", tools=[WEATHER])
        thought, message, call = answer.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "Hm…")
        assert message.content[0].text == "Let me look."
        assert (call.type, call.name) == ("function_call", "get_weather")
        assert json.loads(call.arguments) == {"city": "Paris"}
        assert all(item.status == "completed" for item in answer.output)
        assert answer.usage is not None
        assert answer.usage.output_tokens_details.reasoning_tokens > 10


@pytest.mark.parametrize("step", [1, 7, 1000])
async def test_a_stream_tells_the_same_in_order(model: Path, step: int) -> None:
    async with client_of(model, ANSWER, step=step) as (client, _, _):
        stream = await client.responses.create(
            model="tiny", input="Hi", tools=[WEATHER], stream=True
        )
        events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type.removeprefix("response.") for event in events]
        once = [kind for i, kind in enumerate(kinds) if kinds[i - 1] != kind]
        assert once == [
            "created", "in_progress",
            "output_item.added", "content_part.added", "reasoning_text.delta",
            "reasoning_text.done", "content_part.done", "output_item.done",
            "output_item.added", "content_part.added", "output_text.delta",
            "output_text.done", "content_part.done", "output_item.done",
            "output_item.added", "function_call_arguments.delta",
            "function_call_arguments.done", "output_item.done",
            "completed",
        ]  # fmt: skip
        final: Any = events[-1]
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert [item.id for item in final.response.output] == [item.id for item in done]
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert text == "Let me look."
        arguments = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert json.loads("".join(arguments)) == {"city": "Paris"}
        assert final.response.usage.output_tokens > 0


async def test_openais_stream_helper_understands_it(model: Path) -> None:
    async with client_of(model, ANSWER, step=2) as (client, _, _):
        async with client.responses.stream(model="tiny", input="Hi", tools=[WEATHER]) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        assert final.output_text == "Let me look."
        assert final.output[-1].type == "function_call"


async def test_a_conversation_goes_back_as_items(model: Path) -> None:
    async with client_of(model, "fine") as (client, _, prompts):
        first: Any = [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}],
            },
            {
                "type": "function_call",
                "call_id": "call_1",
                "name": "get_weather",
                "arguments": '{"city": "Paris"}',
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
        ]
        await client.responses.create(model="tiny", input=first)
        assert prompts[0] == (
            "<system>Be kind.<user>Weather?<assistant>Let me look."
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
            "<tool>sunny<assistant>"
        )


async def test_formats_and_forced_calls_are_enforced(model: Path) -> None:
    async with client_of(model, "<think></think>{}") as (client, backend, _):
        await client.responses.create(
            model="tiny",
            input="Hi",
            text={"format": {"type": "json_schema", "name": "x", "schema": WEATHER["parameters"]}},
        )
        await client.responses.create(
            model="tiny",
            input="Hi",
            tools=[WEATHER],
            tool_choice={"type": "function", "name": "get_weather"},
        )
        schema, call = [request.sampling.grammar for request in backend.seen]
        assert "city" in schema
        assert "thought" in schema
        assert "get_weather" in call


async def test_an_answer_cut_short_is_incomplete(model: Path) -> None:
    async with client_of(model, "abc", finish_reason="length") as (client, _, _):
        answer = await client.responses.create(model="tiny", input="Hi")
        assert answer.status == "incomplete"
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output[0].status == "incomplete"
        stream = await client.responses.create(model="tiny", input="Hi", stream=True)
        assert [event.type async for event in stream][-1] == "response.incomplete"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id.*not stored"),
    ({"store": True}, "store.*not stored"),
    ({"background": True}, "background"),
    ({"tools": [{"type": "web_search"}]}, "web_search.*no built-in tools"),
    ({"tool_choice": {"type": "web_search"}}, "web_search"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["web_search_call.results"]}, "include"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input_image.*text only",
    ),
    ({"text": {"verbosity": "high"}}, "verbosity"),
    ({"reasoning": {"summary": "detailed"}}, "summary"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"max_output_tokens": 0}, "max_tokens"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
async def test_what_can_not_be_is_refused(
    model: Path, fields: dict[str, Any], message: str
) -> None:
    async with client_of(model, "") as (client, _, _):
        with pytest.raises(BadRequestError, match=message):
            await client.responses.create(**{"model": "tiny", "input": "Hi", **fields})


async def test_a_failure_in_a_stream_is_an_event(model: Path) -> None:
    async with client_of(model, "abc") as (client, backend, _):
        whole = backend.generate

        async def failing(request: Any) -> Any:
            async for deltas in whole(request):
                yield deltas
                raise KeyError("broken")

        backend.generate = failing  # type: ignore[method-assign]
        stream = await client.responses.create(model="tiny", input="Hi", stream=True)
        *_, last = [event async for event in stream]
        assert last.type == "error"
        assert "failed" in last.message
