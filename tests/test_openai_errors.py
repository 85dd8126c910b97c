"""Bad input: each row with its HTTP status and what the message must say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.null_engine import serving, write_model

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MAX_BODY = 20_000


@dataclass
class Case:
    """What is sent, and what comes back."""

    name: str
    status: int
    message: str  # a part of it
    fields: dict[str, Any] = field(default_factory=dict)
    path: str = COMPLETIONS
    body: bytes | None = None  # instead of fields
    param: str | None = None
    code: str | None = None
    method: str = "POST"


def completion(name: str, message: str, param: str | None, **fields: Any) -> Case:
    return Case(name, 400, message, {"prompt": "Hi", **fields}, param=param)


def chat(name: str, message: str, param: str | None, messages: Any, **fields: Any) -> Case:
    return Case(name, 400, message, {"messages": messages, **fields}, path=CHAT, param=param)


def refused(name: str, fragment: str, **fields: Any) -> Case:
    case = chat(f"{name} refused", f"{name}: {fragment}", name, [user("Hi")], **fields)
    case.code = "unsupported_parameter"
    return case


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}

CASES = [
    # --- lengths ---
    completion("prompt too long", "too long: 301 tokens, but the context is 256", "prompt",
               prompt="x" * 300),
    completion("prompt fills the context", "too long", "prompt", prompt="x" * 255),
    completion("max_tokens over the context", "ask for at most 253", "max_tokens", max_tokens=254),
    completion("max_tokens zero", "greater than or equal to 1", "max_tokens", max_tokens=0),
    completion("min_tokens over max_tokens", "must not exceed max_tokens", None,
               min_tokens=9, max_tokens=8),
    completion("empty prompt", "the prompt is empty", "prompt", prompt=""),
    completion("no prompts", "and not empty", "prompt", prompt=[]),
    completion("an empty prompt of several", "the prompt is empty", "prompt", prompt=["a", ""]),
    completion("empty token prompt", "the prompt is empty", "prompt", prompt=[[]]),
    Case("no prompt", 400, "prompt: field required", {"max_tokens": 1}, param="prompt"),
    # --- the body ---
    Case("invalid UTF-8", 400, "invalid unicode", body=b'{"prompt": "\xff\xfe"}'),
    Case("lone surrogate", 400, "not valid", body=b'{"prompt": "\\ud800"}'),
    Case("invalid JSON", 400, "invalid JSON", body=b'{"prompt": "Hi"'),
    Case("no body", 400, "invalid JSON", body=b""),
    Case("not an object", 400, "should be an object", body=b"[1, 2]"),
    Case("deep nesting", 400, "not valid", body=b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    Case("body over the limit", 413, f"limit of {MAX_BODY} bytes", {"prompt": "x" * MAX_BODY},
         code="body_too_large"),
    # --- types and ranges ---
    completion("prompt is a number", "prompt must be a string", "prompt", prompt=5),
    completion("prompt of mixed types", "prompt[1] must be a token id", "prompt", prompt=[1, "a"]),
    completion("token id not in the vocabulary", "tokens are 0 to 258", "prompt", prompt=[1, 999]),
    completion("token id is a bool", "prompt[0]", "prompt", prompt=[True]),
    completion("max_tokens is text", "valid integer (got 'many')", "max_tokens",
               max_tokens="many"),
    completion("max_tokens is a bool", "valid integer", "max_tokens", max_tokens=True),
    completion("max_tokens is a fraction", "valid integer", "max_tokens", max_tokens=1.5),
    completion("temperature is text", "valid number", "temperature", temperature="hot"),
    completion("temperature negative", "greater than or equal to 0", "temperature",
               temperature=-0.1),
    completion("temperature NaN as text", "valid number", "temperature", temperature="NaN"),
    Case("temperature NaN", 400, "finite number", param="temperature",
         body=b'{"prompt": "Hi", "temperature": NaN}'),
    Case("temperature infinite", 400, "finite number", param="temperature",
         body=b'{"prompt": "Hi", "temperature": 1e999}'),
    completion("top_p zero", "greater than 0", "top_p", top_p=0),
    completion("top_p over 1", "less than or equal to 1", "top_p", top_p=1.01),
    completion("priority beyond any", "less than 2147483648", "priority", priority=2**70),
    completion("top_k too small", "greater than or equal to -1", "top_k", top_k=-2),
    completion("min_p over 1", "less than or equal to 1", "min_p", min_p=2),
    completion("n zero", "greater than or equal to 1", "n", n=0),
    completion("n over the limit", "more than this server's limit of 4", "n", n=5),
    completion("best_of under n", "must be at least n", None, n=3, best_of=2),
    completion("best_of streamed", "can't be streamed", "best_of", best_of=2, stream=True),
    completion("logprobs over the limit", "limit of 20", "logprobs", logprobs=21),
    completion("prompt_logprobs streamed", "can't be streamed", None,
               prompt_logprobs=1, stream=True),
    completion("seed too large", "less than", "seed", seed=2**63),
    completion("stop is a number", "valid string or a valid array", "stop", stop=5),
    completion("too many stops", "at most 16", "stop", stop=[str(i) for i in range(17)]),
    completion("empty stop", "at least 1 character", "stop[0]", stop=[""]),
    completion("stream_options without stream", "needs stream", None,
               stream_options={"include_usage": True}),
    completion("stream is text", "valid boolean", "stream", stream="yes"),
    # --- logit_bias ---
    completion("logit_bias too many", "at most 1024", "logit_bias",
               logit_bias={str(i): 1 for i in range(1025)}),
    completion("logit_bias too large", "less than or equal to 100", "logit_bias[5]",
               logit_bias={"5": 100.5}),
    completion("logit_bias out of the vocabulary", "tokens are 0 to 258", "logit_bias",
               logit_bias={"259": 1}),
    completion("logit_bias key is text", "valid integer", "logit_bias.five",
               logit_bias={"five": 1}),
    Case("logit_bias NaN", 400, "finite number", param="logit_bias[5]",
         body=b'{"prompt": "Hi", "logit_bias": {"5": NaN}}'),
    completion("stop token out of the vocabulary", "stop_token_ids names token 259",
               "stop_token_ids", stop_token_ids=[259]),
    # --- models and routes ---
    Case("unknown model", 404, "no model 'gpt' here; this server has tiny",
         {"prompt": "Hi", "model": "gpt"}, param="model", code="model_not_found"),
    Case("unknown endpoint", 404, "nothing at POST /v1/audio", path="/v1/audio"),
    Case("wrong method", 405, "does not take GET", method="GET"),
    # --- messages ---
    chat("no messages", "at least 1 item", "messages", []),
    chat("messages is text", "valid array", "messages", "Hi"),
    chat("message is text", "should be an object", "messages[0]", ["Hi"]),
    chat("no role", "messages[0].role must be one of", "messages[0].role", [{"content": "Hi"}]),
    chat("unknown role", "messages[1].role must be one of", "messages[1].role",
         [user("Hi"), {"role": "robot", "content": "Hi"}]),
    chat("no content", "messages[0].content must be a string", "messages[0].content",
         [{"role": "user"}]),
    chat("content is a number", "messages[0].content must be a string", "messages[0].content",
         [user(5)]),
    chat("part without text", "messages[0].content[0] must be", "messages[0].content[0]",
         [user([{"type": "text"}])]),
    chat("part is text", "messages[0].content[0]", "messages[0].content[0]", [user(["Hi"])]),
    chat("image", "this server takes text only", "messages[0].content[1]",
         [user([{"type": "text", "text": "what is this"}, IMAGE])]),
    chat("audio", "this server takes text only", "messages[0].content[0]", [user([AUDIO])]),
    chat("a template variable that is not theirs", "messages is not", "chat_template_kwargs",
         [user("Hi")], chat_template_kwargs={"messages": []}),
    chat("a template that fails", "this template fails", "messages", [user("fail")]),
    chat("top_logprobs without logprobs", "needs logprobs", None, [user("Hi")], top_logprobs=1),
    chat("logprobs is a number", "valid boolean", "logprobs", [user("Hi")], logprobs=1),
    Case("no messages at all", 400, "messages: field required", {"max_tokens": 1}, path=CHAT,
         param="messages"),
    # --- structured outputs ---
    chat("a schema that can't be met", "unsatisfiable", "structured_outputs", [user("Hi")],
         guided_json={"allOf": [{"type": "string"}, {"type": "integer"}]}),
    chat("a schema keyword nobody knows", "propertyNames", "structured_outputs", [user("Hi")],
         structured_outputs={"json": {"type": "object", "propertyNames": {"maxLength": 3}}}),
    chat("a regex that is none", "unclosed character class", "structured_outputs", [user("Hi")],
         guided_regex="[a"),
    chat("a grammar that is none", "unknown name", "structured_outputs", [user("Hi")],
         guided_grammar="start: foo"),
    chat("nothing to choose", "at least 1 item", "structured_outputs.choice", [user("Hi")],
         structured_outputs={"choice": []}),
    chat("two grammars", "guided_json and guided_regex both", "guided_regex", [user("Hi")],
         guided_json={"type": "object"}, guided_regex="a"),
    chat("structured outputs without end", "ignore_eos can't go with", None, [user("Hi")],
         guided_regex="a+", ignore_eos=True),
    chat("json_schema without a schema", "goes with the type", "response_format", [user("Hi")],
         response_format={"type": "json_schema"}),
    # --- known, and not done here ---
    chat("tools for a template without", "knows of none", "tools", [user("Hi")], tools=[TOOL]),
    chat("tool_choice without tools", "needs tools", "tool_choice", [user("Hi")],
         tool_choice="required"),
    refused("functions", "send tools", functions=[{"name": "f"}]),
    refused("service_tier", "there is one tier", service_tier="flex"),
    refused("store", "answers are not stored", store=True),
    refused("modalities", "only text", modalities=["text", "audio"]),
    refused("truncation_side", "prompts that are truncated keep their end",
            truncate_prompt_tokens=1, truncation_side="right"),
    refused("chat_template", "the template is the server's", chat_template="{{ 1 }}"),
    Case("suffix refused", 400, "suffix: ", {"prompt": "Hi", "suffix": "!"}, param="suffix",
         code="unsupported_parameter"),
    # --- tokenize ---
    Case("tokenize nothing", 400, "either prompt or messages", path="/tokenize"),
    Case("detokenize out of the vocabulary", 400, "tokens[1] is 259", {"tokens": [1, 259]},
         path="/detokenize", param="tokens"),
    Case("detokenize text", 400, "tokens[0]: input should be a valid integer", {"tokens": ["a"]},
         path="/detokenize", param="tokens[0]"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def http(model: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(model, limits={"max_n": 4, "max_body_bytes": MAX_BODY}) as (client, backend):
        yield client
        stats = backend.engine.scheduler.stats()
        assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_bad_input(http: httpx.AsyncClient, case: Case) -> None:
    body = json.dumps(case.fields).encode() if case.body is None else case.body
    answer = await http.request(case.method, case.path, content=body)
    assert answer.status_code == case.status, answer.text
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert case.message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", case.param)
    assert error["code"] == case.code


async def test_a_body_over_the_limit_is_not_read_to_its_end(http: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 * MAX_BODY:
            sent += 1000
            yield b" " * 1000

    answer = await http.post(COMPLETIONS, content=endless())
    assert answer.status_code == 413
    assert sent <= MAX_BODY + 1000


async def test_a_model_without_a_template_takes_no_chat(tmp_path: Path) -> None:
    async with serving(write_model(tmp_path, chat_template=None)) as (http, _):
        answer = await http.post(CHAT, json={"messages": [user("Hi")]})
        assert answer.status_code == 400
        assert "chat template" in answer.json()["error"]["message"]
        assert "--chat-template" in answer.json()["error"]["message"]
        assert (await http.post(COMPLETIONS, json={"prompt": "Hi"})).status_code == 200


async def test_a_full_queue_asks_to_come_back(model: Path) -> None:
    async with serving(model, step_ms=20, max_num_seqs=1, max_waiting=1) as (http, backend):
        fields = {"prompt": "Hi", "max_tokens": 20}
        running = [asyncio.create_task(http.post(COMPLETIONS, json=fields)) for _ in range(2)]
        while backend.engine.scheduler.stats().running < 1:
            await asyncio.sleep(0.001)
        answer = await http.post(COMPLETIONS, json=fields)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert [(await each).status_code for each in running] == [200, 200]


async def test_a_failed_engine_is_unavailable(model: Path) -> None:
    async with serving(model, step_ms=20) as (http, backend):
        fields = {"prompt": "Hi", "max_tokens": 50}
        whole = asyncio.create_task(http.post(COMPLETIONS, json=fields))
        stream = asyncio.create_task(http.post(COMPLETIONS, json={**fields, "stream": True}))
        while not backend.engine._tracked or backend.engine._tracked[1].generated < 10:
            await asyncio.sleep(0.001)
        assert (await http.get("/health")).status_code == 200
        backend.engine.fail("the shard failed: out of luck")

        # Taken before: the stream has begun, so it learns by an event.
        answer = await whole
        assert answer.status_code == 503
        answer = await stream
        assert answer.status_code == 200
        *_, last = answer.text.strip().split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error"
        assert "out of luck" in error["message"]

        # Asked after.
        for answer in (
            await http.post(COMPLETIONS, json=fields),
            await http.post(COMPLETIONS, json={**fields, "stream": True}),
            await http.get("/health"),
        ):
            assert answer.status_code == 503
            assert "out of luck" in answer.json()["error"]["message"]
            assert "retry-after" in answer.headers
        assert b"engine_up" in (await http.get("/metrics")).content


async def test_a_bug_is_a_500_that_tells_nothing(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(model) as (http, backend):

        def broken(request: object) -> Any:
            raise KeyError("secret detail")

        backend.generate = broken  # type: ignore[method-assign]
        answer = await http.post(COMPLETIONS, json={"prompt": "Hi"})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "secret detail" not in answer.text
        assert "secret detail" in caplog.text
