"""What a request asks for can contradict itself, which may be found where a token is drawn only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tensorray.actors import sampler
from tensorray.cluster import batch
from tensorray.cluster.ingress import create_app
from tensorray.cluster.llm import LLM
from tensorray.cluster.request import RequestRefused
from tensorray.cluster.sampling_params import SamplingParams
from tensorray.cluster.structured_outputs import StructuredOutputs
from tests.helpers.tiny_models import directory

WHY = "no token is left to choose"
OPENAI = {"model": "qwen3", "max_tokens": 8, "bad_words": ["a"]}
TRITON = {"text_input": "Hello", "max_tokens": 8, "bad_words": ["a"], "end_id": 3}
AT_ONCE, LATER = "[a]", "[b][a]"  # of the answer `a`, and of its last letter


def completion(regex: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {**OPENAI, "prompt": "Hello", "guided_regex": regex, **more}


def chat(regex: str, **more: Any) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": "Hello"}]
    fields = {**OPENAI, "messages": messages, "guided_regex": regex, **more}
    return "/v1/chat/completions", fields


def triton(path: str, regex: str) -> tuple[str, dict[str, Any]]:
    guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": regex}
    return f"/v2/models/ensemble/{path}", {**TRITON, **guide}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    settings: dict[str, Any] = {"served_model_name": ["qwen3"], "chat_template": "{{ messages }}"}
    with LLM(str(directory("qwen3")), max_model_len=128, num_kv_blocks=64, **settings) as started:
        yield started


@pytest.fixture(scope="module")
def post(llm: LLM) -> Callable[[str, dict[str, Any]], httpx.Response]:
    app = create_app(llm.frontend, batch._Backend(llm.client), llm.config)

    async def ask(path: str, body: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(path, json=body)

    return lambda path, body: llm.run(ask(path, body))


def said(error: Any) -> str:
    """The message of an error as OpenAI or Triton has it."""
    return str(error["message"] if isinstance(error, dict) else error)


@pytest.mark.parametrize(
    "asked",
    [
        completion(AT_ONCE),
        completion(LATER),
        completion(AT_ONCE, stream=True),
        chat(AT_ONCE),
        chat(AT_ONCE, stream=True),
        triton("generate", AT_ONCE),
        triton("generate_stream", AT_ONCE),
    ],
    ids=["whole", "whole later", "stream", "chat", "chat stream", "Triton", "Triton stream"],
)
def test_it_is_a_bad_request(post: Any, asked: Any) -> None:
    answer = post(*asked)
    assert answer.status_code == 400, answer.text
    assert WHY in said(answer.json()["error"])


def test_a_stream_that_has_begun_says_whose_fault_it_is(post: Any) -> None:
    answer = post(*completion(LATER, stream=True))
    assert answer.status_code == 200
    *_, last = answer.text.strip().split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "invalid_request_error"
    assert WHY in error["message"]


def test_the_library_raises_the_same(llm: LLM) -> None:
    params = SamplingParams(bad_words=["a"], structured_outputs=StructuredOutputs(regex=AT_ONCE))
    with pytest.raises(RequestRefused, match=WHY):
        llm.generate("Hello", params)


def test_what_is_not_of_the_requests_making_is_not_laid_to_it() -> None:
    failed = {
        1: sampler.NOT_FINITE,
        2: sampler.NONE_LEFT,
        3: sampler.ALL_EXCLUDED,
        4: sampler.OVERFLOW.format(repetition=9.0),
        5: sampler.NO_VOCABULARY,
        6: sampler.STUCK.format(reason="too many rules"),
        7: "logits processor mine failed: KeyError: 1",
    }
    assert sampler.refused(failed) == [2, 4, 6]
