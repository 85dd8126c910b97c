"""OpenAI's API as its own client sees it, over a null engine in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.helpers.null_engine import LocalBackend, serving, write_model

Client = openai.AsyncOpenAI


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def server(model: Path) -> AsyncIterator[tuple[Client, LocalBackend]]:
    async with serving(model) as (http, backend):
        yield (
            Client(base_url="http://test/v1", api_key="-", http_client=http, max_retries=0),
            backend,
        )


@pytest.fixture
def client(server: tuple[Client, LocalBackend]) -> Client:
    return server[0]


@pytest.fixture
def backend(server: tuple[Client, LocalBackend]) -> LocalBackend:
    return server[1]


def completion(client: Client, **fields: Any) -> Any:
    fields = {"model": "tiny", "prompt": "Hello", "max_tokens": 6, "seed": 1, **fields}
    return client.completions.create(**fields)


def chat(client: Client, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "Hello"}]
    fields = {"model": "tiny", "messages": messages, "max_tokens": 6, "seed": 1, **fields}
    return client.chat.completions.create(**fields)


# --- completions ---


async def test_completion(client: Client) -> None:
    answer = await completion(client)
    (choice,) = answer.choices
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert len(choice.text) > 0
    assert answer.usage.prompt_tokens == 6  # BOS and five bytes
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == 12
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_max_tokens_defaults_to_16_for_completions_and_to_the_context_for_chat(
    client: Client,
) -> None:
    answer = await client.completions.create(model="tiny", prompt="a")
    assert answer.usage.completion_tokens == 16
    answer = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a"}]
    )
    assert answer.usage.total_tokens == 256


async def test_a_stream_says_what_the_whole_answer_says(client: Client) -> None:
    whole = await completion(client, max_tokens=40)
    chunks = [chunk async for chunk in await completion(client, max_tokens=40, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_comes_last_in_a_stream(client: Client) -> None:
    stream = await completion(client, stream=True, stream_options={"include_usage": True})
    *chunks, last = [chunk async for chunk in stream]
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 6)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_usage_on_every_chunk(client: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await completion(client, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens async for chunk in stream]
    assert counts == sorted(counts)
    assert counts[-1] == 6


@pytest.mark.parametrize("stream", [False, True])
async def test_every_prompt_has_its_choices(client: Client, stream: bool) -> None:
    prompts = ["one", "two", "three"]
    answer = await completion(client, prompt=prompts, n=2, stream=stream)
    texts: dict[int, str] = {}
    if stream:
        async for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
    else:
        texts = {choice.index: choice.text for choice in answer.choices}
        assert answer.usage.completion_tokens == 6 * 6
        assert answer.usage.prompt_tokens == 4 + 4 + 6
    assert sorted(texts) == list(range(6))
    alone = await completion(client, prompt="three", n=2)
    assert [texts[4], texts[5]] == [choice.text for choice in alone.choices]


async def test_prompts_of_token_ids(client: Client) -> None:
    answer = await completion(client, prompt=[256, 1, 2])
    assert [choice.index for choice in answer.choices] == [0]
    assert answer.usage.prompt_tokens == 3
    answer = await completion(client, prompt=[[256, 1], [256, 2, 3]])
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens == 5


async def test_special_tokens_are_added_unless_told_not_to(client: Client) -> None:
    answer = await completion(client, extra_body={"add_special_tokens": False})
    assert answer.usage.prompt_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_before_it(
    client: Client, backend: LocalBackend, stream: bool
) -> None:
    text = (await completion(client, max_tokens=60)).choices[0].text
    at = next(i for i in range(5, len(text)) if text[i : i + 2].isascii())
    stop = text[at : at + 2]
    answer = await completion(client, max_tokens=60, stop=["never there", stop], stream=stream)
    if stream:
        choices = [chunk.choices[0] async for chunk in answer]
    else:
        choices = answer.choices
        assert answer.usage.completion_tokens < 60
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"
    assert choices[-1].stop_reason == stop
    assert backend.engine.scheduler.stats().running == 0


async def test_the_stop_string_is_kept_if_asked(client: Client) -> None:
    text = (await completion(client, max_tokens=60)).choices[0].text
    at = next(i for i in range(5, len(text)) if text[i : i + 2].isascii())
    stop = text[at : at + 2]
    extra = {"include_stop_str_in_output": True}
    answer = await completion(client, max_tokens=60, stop=stop, extra_body=extra)
    assert answer.choices[0].text == text[: text.index(stop) + 2]


async def test_completion_logprobs(client: Client) -> None:
    answer = await completion(client, logprobs=1)
    (choice,) = answer.choices
    shape = choice.logprobs
    assert len(shape.tokens) == len(shape.token_logprobs) == 6
    assert shape.text_offset[0] == 0
    assert shape.text_offset == sorted(shape.text_offset)
    assert [list(top) for top in shape.top_logprobs] == [[token] for token in shape.tokens]


async def test_echo_begins_with_the_prompt_and_its_logprobs(client: Client) -> None:
    plain = await completion(client)
    answer = await completion(client, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "Hello" + plain.choices[0].text
    assert choice.logprobs.tokens[:6] == ["<s>", *"Hello"]
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1] == 0.0
    assert choice.logprobs.text_offset[:7] == [0, 0, 1, 2, 3, 4, 5]
    assert len(choice.logprobs.tokens) == 12


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_alone_scores_the_prompt(client: Client, stream: bool) -> None:
    with_answer = (await completion(client, echo=True, logprobs=1)).choices[0].logprobs
    asked: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 0}
    if stream:
        chunks = [chunk async for chunk in await completion(client, **asked, stream=True)]
        choices = [chunk.choices[0] for chunk in chunks]
        assert "".join(choice.text for choice in choices) == "Hello"
        tokens = [token for choice in choices for token in choice.logprobs.tokens]
    else:
        answer = await completion(client, **asked)
        (choice,) = answer.choices
        assert choice.text == "Hello"
        assert choice.finish_reason == "length"
        assert choice.logprobs.token_logprobs == with_answer.token_logprobs[:6]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 0)
        tokens = choice.logprobs.tokens
    assert tokens == with_answer.tokens[:6]


async def test_nothing_at_all_is_refused(client: Client) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        await completion(client, max_tokens=0)


async def test_logprobs_in_a_stream_are_those_of_the_whole(client: Client) -> None:
    whole = (await completion(client, logprobs=1, max_tokens=30)).choices[0].logprobs
    tokens, offsets = [], []
    async for chunk in await completion(client, logprobs=1, max_tokens=30, stream=True):
        if chunk.choices[0].logprobs is not None:
            tokens += chunk.choices[0].logprobs.tokens
            offsets += chunk.choices[0].logprobs.text_offset
    assert (tokens, offsets) == (whole.tokens, whole.text_offset)


async def test_prompt_logprobs(client: Client) -> None:
    answer = await completion(client, extra_body={"prompt_logprobs": 0})
    first, *rest = answer.choices[0].prompt_logprobs
    assert first is None
    assert [list(entry) for entry in rest] == [[str(token)] for token in [39, 68, 75, 75, 78]]
    assert rest[0]["39"] == {"logprob": 0.0, "rank": 1, "decoded_token": "H"}


async def test_a_cached_prefix_shows_in_the_usage(client: Client) -> None:
    prompt = "x" * 100
    await completion(client, prompt=prompt)
    usage = (await completion(client, prompt=prompt)).usage
    assert usage.prompt_tokens_details.cached_tokens == 96
    usage = (await completion(client, prompt=prompt, extra_body={"cache_salt": "mine"})).usage
    assert usage.prompt_tokens_details.cached_tokens == 0


async def test_vllms_fields_reach_the_engine(model: Path) -> None:
    async with serving(model) as (http, backend):
        seen = []
        generate = backend.generate
        backend.generate = lambda request: seen.append(request) or generate(request)  # type: ignore[assignment,func-returns-value]
        fields = {
            "prompt": "Hello",
            "max_tokens": 9,
            "n": 2,
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 7,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "logit_bias": {"5": 2.5, "6": -100},
            "allowed_token_ids": [5, 6, 7],
            "banned_token_ids": [7],
            "seed": 11,
            "stop_token_ids": [9],
            "min_tokens": 3,
            "ignore_eos": True,
            "user": "ada",
            "priority": 4,
            "cache_salt": "salt",
        }
        answer = await http.post("/v1/completions", json=fields)
        assert answer.status_code == 200, answer.text
        assert "x-tensorray-warnings" not in answer.headers
        (request,) = seen
        sampling = request.sampling
        assert (request.n, request.max_tokens, request.user) == (2, 9, "ada")
        assert (request.priority, request.cache_salt) == (4, "salt")
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.25, 7)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.125, 1.5)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
        assert sampling.logit_bias == {5: 2.5, 6: -100.0}
        assert (sampling.allowed_token_ids, sampling.banned_token_ids) == ([5, 6, 7], [7])
        assert (sampling.seed, sampling.min_tokens, sampling.stop_token_ids) == (11, 3, [9])


# --- chat ---


async def test_chat(client: Client) -> None:
    answer = await chat(client)
    (choice,) = answer.choices
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert choice.message.tool_calls is None
    rendered = "<user>Hello\n<assistant>"
    assert answer.usage.prompt_tokens == 1 + len(rendered)


async def test_chat_stream(client: Client) -> None:
    whole = await chat(client, max_tokens=30)
    options = {"include_usage": True}
    stream = await chat(client, max_tokens=30, stream=True, stream_options=options)
    *chunks, last = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    content = "".join(delta.content or "" for delta in deltas)
    assert content == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert last.usage.total_tokens == whole.usage.total_tokens


async def test_chat_choices(client: Client) -> None:
    answer = await chat(client, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    roles = set()
    async for chunk in await chat(client, n=3, stream=True):
        roles |= {choice.index for choice in chunk.choices if choice.delta.role == "assistant"}
    assert roles == {0, 1, 2}


TELLING = {"return_token_ids": True, "return_tokens_as_token_ids": True}


async def test_completions_tell_their_tokens(client: Client) -> None:
    asked = {"prompt": ["Hello", "Hi"], "n": 2, "logprobs": 1, "extra_body": TELLING}
    answer = await completion(client, **asked)
    for choice in answer.choices:
        text = (b"Hello", b"Hi")[choice.index // 2]
        assert choice.prompt_token_ids[1:] == [byte - ord("!") for byte in text]
        assert len(choice.token_ids) == 6
        assert choice.logprobs.tokens == [f"token_id:{token}" for token in choice.token_ids]
        assert all(name.startswith("token_id:") for name in choice.logprobs.top_logprobs[0])
    told: dict[int, list[int]] = {}
    prompts: dict[int, list[int]] = {}
    async for chunk in await completion(client, stream=True, **asked):
        for choice in chunk.choices:
            told.setdefault(choice.index, []).extend(choice.token_ids)
            if getattr(choice, "prompt_token_ids", None) is not None:
                assert prompts.setdefault(choice.index, choice.prompt_token_ids)
    assert told == {choice.index: choice.token_ids for choice in answer.choices}
    assert prompts == {choice.index: choice.prompt_token_ids for choice in answer.choices}


async def test_chats_tell_their_tokens(client: Client) -> None:
    asked = {"logprobs": True, "top_logprobs": 1, "extra_body": TELLING}
    answer = await chat(client, **asked)
    (choice,) = answer.choices
    names = [f"token_id:{token}" for token in choice.token_ids]
    assert [entry.token for entry in choice.logprobs.content] == names
    assert len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    chunks = [chunk async for chunk in await chat(client, stream=True, **asked)]
    assert chunks[0].prompt_token_ids == answer.prompt_token_ids
    assert not any(hasattr(chunk, "prompt_token_ids") for chunk in chunks[1:])
    told = [getattr(chunk.choices[0], "token_ids", []) for chunk in chunks]
    assert [token for tokens in told for token in tokens] == choice.token_ids


async def test_tokens_are_not_told_unasked(client: Client) -> None:
    for answer in (await completion(client), await chat(client)):
        assert "token_ids" not in answer.to_json()


async def test_chat_logprobs(client: Client) -> None:
    answer = await chat(client, logprobs=True, top_logprobs=1)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert bytes(content[0].bytes).decode("utf-8", "replace") == content[0].token
    assert content[0].top_logprobs[0].token == content[0].token
    answer = await chat(client, logprobs=True)
    assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert (await chat(client)).choices[0].logprobs is None


async def test_text_parts_are_one_text(client: Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    split = await chat(client, messages=[{"role": "user", "content": parts}])
    joined = await chat(client, messages=[{"role": "user", "content": "a\nb"}])
    assert split.usage.prompt_tokens == joined.usage.prompt_tokens


async def test_template_arguments_reach_the_template(client: Client) -> None:
    plain = await chat(client)
    longer = await chat(client, extra_body={"chat_template_kwargs": {"suffix": "12345"}})
    assert longer.usage.prompt_tokens == plain.usage.prompt_tokens + 5


async def test_max_completion_tokens_wins(client: Client) -> None:
    answer = await chat(client, max_tokens=9, max_completion_tokens=4)
    assert answer.usage.completion_tokens == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": []},
        {
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": "none",
        },
    ],
    ids=lambda fields: "+".join(fields),
)
async def test_what_asks_for_nothing_is_taken(client: Client, fields: dict[str, Any]) -> None:
    answer = await chat(client, **fields)
    assert answer.choices[0].finish_reason == "length"


# --- the rest ---


async def test_models(client: Client) -> None:
    models = (await client.models.list()).data
    assert [(model.id, model.object) for model in models] == [("tiny", "model")]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("huge")


async def test_tokenize_and_back(model: Path) -> None:
    async with serving(model) as (http, _):
        answer = (await http.post("/tokenize", json={"prompt": "Hé"})).json()
        assert answer["count"] == 4
        assert answer["max_model_len"] == 256
        assert answer["tokens"][0] == 256
        text = (await http.post("/detokenize", json={"tokens": answer["tokens"]})).json()
        assert text == {"prompt": "<s>Hé"}
        fields = {"prompt": "Hi", "add_special_tokens": False, "return_token_strs": True}
        answer = (await http.post("/tokenize", json=fields)).json()
        assert (answer["count"], answer["token_strs"]) == (2, ["H", "i"])
        messages = [{"role": "user", "content": "Hi"}]
        answer = (await http.post("/tokenize", json={"messages": messages})).json()
        assert answer["count"] == 1 + len("<user>Hi\n<assistant>")


async def test_version_and_schema(model: Path) -> None:
    async with serving(model) as (http, _):
        assert (await http.get("/version")).json() == {"version": "0.1.0"}
        schema = (await http.get("/openapi.json")).json()
        body = schema["paths"]["/v1/completions"]["post"]["requestBody"]
        name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/")[-1]
        assert "prompt" in schema["components"]["schemas"][name]["properties"]


async def test_unknown_fields_are_ignored_aloud(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(model) as (http, _):
        fields = {"prompt": "Hi", "max_tokens": 1, "temprature": 0.1, "naïve\n": 1}
        answer = await http.post("/v1/completions", json=fields)
        assert answer.status_code == 200
        warning = answer.headers["x-tensorray-warnings"]
        assert warning == 'ignored unknown fields: "temprature", "na\\u00efve\\n"'
        assert "temprature" in caplog.text


# --- clients that leave ---


class HangUp:
    """One ASGI request whose client reads what it likes, then hangs up."""

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        self._body = [json.dumps(body).encode()]
        self._left = asyncio.Event()
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self.sent.put))

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    def hang_up(self) -> None:
        self._left.set()


@pytest.mark.parametrize("stream", [True, False])
async def test_hanging_up_frees_the_blocks_within_two_steps(model: Path, stream: bool) -> None:
    async with serving(model, step_ms=100) as (http, backend):
        engine, steps = backend.engine, 0
        send = engine._link.send

        def counted(plan: Any) -> None:
            nonlocal steps
            steps += 1
            send(plan)

        engine._link.send = counted  # type: ignore[method-assign]
        body = {"prompt": "Hello", "max_tokens": 200, "stream": stream, "n": 2}
        client = HangUp(http._transport.app, "/v1/completions", body)  # type: ignore[attr-defined]
        while steps < 3:
            await asyncio.sleep(0.005)
        stats = engine.scheduler.stats()
        assert stats.running == 2
        before = steps
        client.hang_up()
        while engine.scheduler.stats().running:
            await asyncio.sleep(0.001)
        stats = engine.scheduler.stats()
        assert stats.free_blocks == stats.total_blocks
        assert steps - before <= 2
        await asyncio.wait_for(client.task, 60)


async def test_a_client_that_does_not_read_costs_the_others_nothing(model: Path) -> None:
    async with serving(model) as (http, backend):
        body = {"prompt": "Hello", "max_tokens": 200, "stream": True}
        client = HangUp(http._transport.app, "/v1/completions", body)  # type: ignore[attr-defined]
        client.sent._maxsize = 2  # type: ignore[attr-defined]
        answer = await http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 100})
        assert answer.json()["usage"]["completion_tokens"] == 100
        while backend.engine.scheduler.stats().running:
            await asyncio.sleep(0.001)
        events = b""
        while not events.endswith(b"data: [DONE]\n\n"):
            message = await client.sent.get()
            events += message.get("body", b"")
        chunks = [json.loads(line[6:]) for line in events.decode().split("\n\n")[:-2]]
        assert len(chunks) < 20  # what it had not read was merged
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
