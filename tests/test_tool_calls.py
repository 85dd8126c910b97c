"""Tool calls and reasoning in chat completions, by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from helpers.json_schemas import schemas
from helpers.null_engine import write_model
from helpers.scripted_backend import THINKING_TEMPLATE, ScriptedBackend, scripted
from helpers.tokenizers import byte_level
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from openai import AsyncOpenAI, BadRequestError

from tensorray.actors.guidance import compile_vocabulary
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.conversation import Conversation
from tensorray.cluster.frontend import Frontend
from tensorray.cluster.llm import LLM, SamplingParams
from tensorray.cluster.outputs import RequestOutput
from tensorray.cluster.reply import Reply
from tensorray.cluster.reply_format import ReplyFormats, ReplyReader
from tensorray.cluster.structured_outputs import StructuredOutputs
from tensorray.cluster.tools import ToolUse
from tensorray.cluster.vocabulary import load_vocabulary

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time"}}
HELLO: Any = [{"role": "user", "content": "Hello"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = f"Let me look.\n{CALL}\n" + CALL.replace("Paris", "Rome")
THOUGHT = "<think>\nHm, the weather…\n</think>\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), chat_template=THINKING_TEMPLATE)


@asynccontextmanager
async def client_of(
    model: Path, text: str, **how: Any
) -> AsyncIterator[tuple[AsyncOpenAI, ScriptedBackend]]:
    how = {"config": {"hf_overrides": {"max_position_embeddings": 4096}}, **how}
    async with scripted(model, lambda prompt: text, **how) as (http, backend):
        yield (
            AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0),
            backend,
        )


async def chat(client: AsyncOpenAI, **fields: Any) -> Any:
    fields = {"model": "tiny", "messages": HELLO, **fields}
    return await client.chat.completions.create(**fields)


def arguments(calls: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls or []]


async def test_calls_are_parsed(model: Path) -> None:
    async with client_of(model, TWO) as (client, backend):
        answer = await chat(client, tools=[WEATHER, TIME])
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me look."
        assert arguments(choice.message.tool_calls) == [
            ("get_weather", {"city": "Paris"}),
            ("get_weather", {"city": "Rome"}),
        ]
        ids = [call.id for call in choice.message.tool_calls]
        assert len(set(ids)) == 2
        assert all(id.startswith("call_") for id in ids)
        assert backend.seen[0].sampling.grammar == ""  # the model's choice, and free


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_a_stream_tells_the_name_first_and_arguments_in_pieces(
    model: Path, step: int
) -> None:
    async with client_of(model, THOUGHT + TWO, step=step) as (client, _):
        stream = await chat(client, tools=[WEATHER], stream=True)
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert deltas[0].role == "assistant"
        assert "".join(d.content or "" for d in deltas) == "Let me look."
        thought = [getattr(d, "reasoning_content", None) or "" for d in deltas]
        assert "".join(thought) == "Hm, the weather…"
        found: dict[int, list[Any]] = {}
        for delta in deltas:
            for call in delta.tool_calls or []:
                found.setdefault(call.index, []).append(call)
        assert sorted(found) == [0, 1]
        for city, (first, *rest) in zip(("Paris", "Rome"), found.values(), strict=True):
            assert first.id
            assert (first.type, first.function.name) == ("function", "get_weather")
            assert first.function.arguments == ""
            assert all(call.id is None and call.function.name is None for call in rest)
            text = "".join(call.function.arguments for call in rest)
            assert json.loads(text) == {"city": city}
            assert len(rest) > 1 or step == 1000
        reasons = [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason]
        assert reasons == ["tool_calls"]


async def test_openais_accumulating_stream_understands_it(model: Path) -> None:
    async with client_of(model, TWO) as (client, _):
        async with client.chat.completions.stream(
            model="tiny", messages=HELLO, tools=[WEATHER]
        ) as stream:
            final = await stream.get_final_completion()
        assert [call.function.arguments for call in final.choices[0].message.tool_calls or []] == [
            '{"city": "Paris"}',
            '{"city": "Rome"}',
        ]


async def test_what_is_no_call_is_content(model: Path) -> None:
    text = 'So: <tool_call>{"name": "nobody", "arguments": {}}</tool_call> and <tool_'
    async with client_of(model, text) as (client, _):
        answer = await chat(client, tools=[WEATHER])
        assert answer.choices[0].message.content == text
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "stop"
        chunks = [c async for c in await chat(client, tools=[WEATHER], stream=True)]
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == text


async def test_without_tools_calls_are_text(model: Path) -> None:
    async with client_of(model, CALL) as (client, backend):
        for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            answer = await chat(client, **fields)
            assert answer.choices[0].message.content == CALL
        assert backend.seen[0].prompt == backend.seen[1].prompt


async def test_an_answer_cut_short_says_length(model: Path) -> None:
    async with client_of(model, CALL[:60], finish_reason="length") as (client, _):
        (choice,) = (await chat(client, tools=[WEATHER])).choices
        assert choice.finish_reason == "length"
        assert CALL[:60].endswith(choice.message.tool_calls[0].function.arguments)


async def test_results_go_back_to_the_model(model: Path) -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    prompts = []
    script = lambda prompt: prompts.append(prompt) or "fine"  # type: ignore[func-returns-value] # noqa: E731
    overrides = {"hf_overrides": {"max_position_embeddings": 4096}}
    async with scripted(model, script, config=overrides) as (http, _):
        answer = await http.post(
            "/chat/completions", json={"messages": messages, "tools": [WEATHER]}
        )
        assert answer.status_code == 200, answer.text
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}' in prompts[0]
    assert "<tool>sunny" in prompts[0]


async def test_reasoning_is_apart_and_counted(model: Path) -> None:
    async with client_of(model, THOUGHT + "Sunny.") as (client, _):
        answer = await chat(client)
        message = answer.choices[0].message
        assert (message.content, message.reasoning_content) == ("Sunny.", "Hm, the weather…")
        assert message.reasoning == message.reasoning_content
        counted = answer.usage.completion_tokens_details.reasoning_tokens
        assert counted == len((THOUGHT.rstrip()).encode())  # a byte a token
        stream = await chat(client, stream=True, stream_options={"include_usage": True})
        last = [chunk async for chunk in stream][-1]
        assert last.usage.completion_tokens_details.reasoning_tokens == counted
        quiet = await chat(client, extra_body={"include_reasoning": False})
        assert quiet.choices[0].message.content == "Sunny."
        assert not hasattr(quiet.choices[0].message, "reasoning_content")


async def test_thinking_can_be_turned_off(model: Path) -> None:
    async with client_of(model, "<think> is a tag") as (client, backend):
        for fields in (
            {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
            {"extra_body": {"enable_thinking": False}},
            {"reasoning_effort": "none"},
        ):
            answer = await chat(client, **fields)
            assert answer.choices[0].message.content == "<think> is a tag"
        assert len({tuple(request.prompt) for request in backend.seen}) == 1


async def test_what_a_client_says_of_itself_comes_back_or_counts(model: Path) -> None:
    async with client_of(model, "fine") as (client, backend):
        raw = await client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=HELLO,
            metadata={"a": "b"},
            safety_identifier="ada",
            prompt_cache_key="k",
            service_tier="auto",
            store=False,
            modalities=["text"],
            verbosity="medium",
        )
        assert "x-tensorray-warnings" not in raw.headers
        assert json.loads(raw.text)["metadata"] == {"a": "b"}
        assert backend.seen[0].user == "ada"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, r"tools\[0\].type"),
    ({"tools": [WEATHER, WEATHER]}, "same name"),
    ({"tools": [WEATHER] * 1025}, "1024 is the most"),
    ({"tool_choice": "required"}, "needs tools"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g'"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"tools\[0\].function.name"),
    (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "strict": True,
                        "parameters": {"type": "object", "propertyNames": {"maxLength": 3}},
                    },
                }
            ]
        },
        r"tools\[0\].function.parameters.*propertyNames",
    ),
    (
        {
            "tools": [{**TIME, "function": {"name": "f", "parameters": {"type": "array"}}}],
            "tool_choice": "required",
        },
        "must be an object",
    ),
    ({"functions": [{"name": "f"}]}, "send tools"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"store": True}, "not stored"),
    ({"verbosity": "low"}, "verbosity"),
    ({"prompt_cache_retention": "24h"}, "in memory only"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD)
async def test_what_can_not_be_is_refused(
    model: Path, fields: dict[str, Any], message: str
) -> None:
    async with client_of(model, "") as (client, _):
        with pytest.raises(BadRequestError, match=message):
            await chat(client, **fields)


async def test_auto_can_be_turned_off(model: Path) -> None:
    settings = {
        "enable_auto_tool_choice": False,
        "hf_overrides": {"max_position_embeddings": 4096},
    }
    async with client_of(model, CALL, config=settings) as (client, _):
        with pytest.raises(BadRequestError, match="enable-auto-tool-choice"):
            await chat(client, tools=[WEATHER])
        answer = await chat(client, tools=[WEATHER], tool_choice="required")
        assert len(answer.choices[0].message.tool_calls) == 1


def test_without_text_there_is_nothing_to_take_apart(model: Path) -> None:
    frontend = Frontend.load(EngineConfig(model=str(model)))
    silent = SamplingParams(detokenize=False)
    assert frontend.converse(Conversation(HELLO), silent, request_id="x").reply is None
    with pytest.raises(BadRequest, match="detokenize"):
        frontend.converse(Conversation(HELLO, ToolUse.read([TIME])), silent, request_id="x")


def test_what_continues_an_answer_does_not_reason_again() -> None:
    tokenizer = byte_level()
    formats = ReplyFormats(tokenizer, "", reasoning_parser="deepseek_r1")
    assert formats.format(tokenizer.encode("user"), ToolUse()) is not None
    assert formats.format(tokenizer.encode("user the"), ToolUse(), continues=True) is None
    within = formats.format(tokenizer.encode("user<think>"), ToolUse(), continues=True)
    assert within is not None
    assert within.inside


# --- formats of models ---


@pytest.mark.parametrize(
    ("template", "parser", "message"),
    [
        ("{{ messages }}", "auto", "knows of none"),
        ("{{ tools }}", "auto", "--tool-call-parser"),
        ("{{ tools }}", "none", "--tool-call-parser"),
    ],
)
def test_tools_need_a_template_and_a_format(template: str, parser: str, message: str) -> None:
    formats = ReplyFormats(byte_level(), template, tool_parser=parser)
    formats.check(ToolUse())
    with pytest.raises(BadRequest, match=message):
        formats.check(ToolUse.read([TIME]))


@pytest.mark.parametrize(
    ("parser", "prompt", "text", "content", "reasoning"),
    [
        ("qwen3", "user", "<think>a</think>b", "b", "a"),
        ("qwen3", "user", "b <think>", "b <think>", ""),
        ("qwen3", "user<think>\n", "a\n</think>\n\nb ", "b ", "a"),
        ("qwen3", "user<think>\n\n</think>\n\n", "b</think>", "b</think>", ""),
        ("qwen3", "user", "<think>a ", "", "a"),
        ("deepseek_r1", "user", "a</think>b", "b", "a"),
        ("mistral", "user", "[THINK]a[/THINK]b", "b", "a"),
    ],
)
def test_reasoning_is_found_where_it_begins(
    parser: str, prompt: str, text: str, content: str, reasoning: str
) -> None:
    tokenizer = byte_level()
    formats = ReplyFormats(tokenizer, "", reasoning_parser=parser)
    format = formats.format(tokenizer.encode(prompt), ToolUse())
    for pieces in ([text], list(text)):
        if format is None:
            whole = Reply(text)
        else:
            reader = ReplyReader(format, tokenizer)
            parts = [part for piece in pieces for part in reader.push(piece, [0])]
            whole = Reply.of([*parts, *reader.finish()])
        assert (whole.content, whole.reasoning) == (content, reasoning)


@pytest.mark.parametrize("prompt", ["user", "user<think>"])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_what_is_enforced_comes_after_reasoning(
    model: Path, prompt: str, choice: Literal["auto", "required"]
) -> None:
    known = load_vocabulary(EngineConfig(model=str(model)))
    frontend = Frontend.load(EngineConfig(model=str(model)))
    compiled = compile_vocabulary(known, 259)
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    use = ToolUse.read([strict], choice)
    tokenizer = frontend.tokenizer
    format = frontend.replies.format(tokenizer.encode(prompt, parse_special=True), use)
    assert format is not None
    digits = StructuredOutputs(regex="[0-9]+").compiled()
    guided = frontend.replies.format(tokenizer.encode(prompt), ToolUse(), digits)
    assert guided is not None
    begin = "" if prompt.endswith("<think>") else "<think>"

    def takes(grammar: str, text: str) -> bool:
        matcher = LLMatcher(compiled, grammar, log_level=0)
        tokens = tokenizer.encode(text, add_special_tokens=False)
        taken = [matcher.try_consume_tokens([token]) for token in tokens]
        return sum(taken) == len(tokens) and bool(matcher.is_accepting())

    # Where reasoning only may begin, text may too, in which a marker is a call's.
    thought = "so" if begin and choice == "auto" else "so, <tool_call>"
    assert takes(format.grammar, f"{begin}{thought}</think>\n\n{CALL}")
    assert not takes(format.grammar, f"{begin}so</think>\n\n{CALL.replace('city', 'town')}")
    assert takes(format.grammar, f"{begin}so</think>\n\nNo.") == (choice == "auto")
    assert takes(guided.grammar, f"{begin}so</think>\n\n12")
    assert not takes(guided.grammar, f"{begin}so</think>\n\n12a")
    assert takes(guided.grammar, "12") == bool(begin)


# --- calls that have to be made, by a model that knows nothing ---

FORMATS = {
    "hermes": THINKING_TEMPLATE.replace("<think>", "").replace("</think>", ""),
    "mistral": "{{ tools }}[TOOL_CALLS]{{ messages }}",
    "mistral with [ARGS]": "{{ tools }}[TOOL_CALLS][ARGS]{{ messages }}",
    "llama3_json": "{{ tools }}<|python_tag|>{{ messages }}",
    "pythonic": "{{ tools }}[func_name1(params_name1=params_value1{{ messages }}",
    "qwen3_coder": "{{ tools }}<tool_call><function=f><parameter=p>{{ messages }}",
}


@pytest.fixture(scope="module", params=sorted(FORMATS))
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_model(tmp_path_factory.mktemp("model"), chat_template=FORMATS[request.param])
    overrides = {"max_position_embeddings": 6000}
    with LLM(
        str(path), load_format="dummy", device="cpu", hf_overrides=overrides, num_threads=1
    ) as llm:
        yield llm


#: How often four schemas are tried, in each of six formats. `make soak` asks for more.
EXAMPLES = int(os.environ.get("TENSORRAY_SOAK_SCHEMAS", "50")) // 25  # the first is trivial

_objects = st.dictionaries(st.sampled_from(["a", "b_c", "é"]), schemas, max_size=3)
#: Towards short answers, as in the tests of guided decoding.
LEANING = {'"': 3.0, "}": 2.0, "]": 2.0, "Ġ": -3.0, "</s>": 6.0, ">": 4.0, "<": 4.0}


def params(llm: LLM, seed: int) -> SamplingParams:
    spelled = llm.frontend.tokenizer.token_to_id
    bias = {spelled(text) or 0: value for text, value in LEANING.items()}
    return SamplingParams(max_tokens=160, seed=seed, logit_bias=bias)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(st.lists(_objects, min_size=4, max_size=4), st.integers(0, 2**31))
def test_forced_calls_have_valid_arguments(
    llm: LLM, properties: list[dict[str, Any]], seed: int
) -> None:
    """An answer that ended in time has calls, and nothing else."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"f{i}",
                "parameters": {
                    "type": "object",
                    "properties": each,
                    "required": list(each),
                    "additionalProperties": False,
                },
            },
        }
        for i, each in enumerate(properties)
    ]
    prepared = []
    for i in range(4):
        named: Any = {"type": "function", "function": {"name": f"f{i}"}}
        use = ToolUse.read(tools[max(0, i - 1) : i + 1], named if i % 2 else "required")
        prepared.append(
            llm.frontend.converse(
                Conversation(HELLO, use), params(llm, seed + i), request_id=f"{seed}-{i}"
            )
        )

    async def answers() -> list[RequestOutput]:
        return await asyncio.gather(*(llm.frontend.collect(llm.client, p) for p in prepared))

    ended = 0
    for i, answer in enumerate(llm.run(answers())):
        (output,) = answer.outputs
        if output.finish_reason != "stop":
            continue
        ended += 1
        reply = output.reply
        assert reply.content == ""
        assert reply.tool_calls
        if i % 2:
            assert [call.name for call in reply.tool_calls] == [f"f{i}"]
        for call in reply.tool_calls:
            schema = tools[int(call.name[1:])]["function"]["parameters"]
            jsonschema.Draft202012Validator(schema).validate(json.loads(call.arguments))
    assert ended


def test_a_strict_function_is_held_to_its_schema_where_the_model_calls_it(llm: LLM) -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    grammar = llm.frontend.converse(
        Conversation(HELLO, ToolUse.read([strict, TIME])), SamplingParams(), request_id="x"
    ).request.sampling.grammar
    assert "get_weather" in grammar
    assert "mixed" in grammar
    answers = llm.chat([HELLO] * 4, params(llm, 1), tools=[strict], parallel_tool_calls=False)
    for answer in answers:
        assert len(answer.outputs[0].reply.tool_calls) <= 1


def test_llm_tells_calls_apart(llm: LLM) -> None:
    for answer in llm.chat([HELLO, HELLO], params(llm, 1), tools=[TIME], tool_choice="required"):
        output = answer.outputs[0]
        assert output.finish_reason == "stop"
        assert all(call.name == "time" for call in output.reply.tool_calls)
        assert all(json.loads(call.arguments) == {} for call in output.reply.tool_calls)
        assert output.reply.tool_calls
        assert output.reply.content == ""
        assert "time" in output.text
