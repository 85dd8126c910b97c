"""Clients that know nothing of this server, unchanged: curl, and LangChain's chat model.

OpenAI's own client is what `test_openai_api.py` uses, Triton's is `test_triton_api.py`'s.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.http_server import http_server
from tests.helpers.null_engine import write_model

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with http_server(write_model(tmp_path_factory.mktemp("model"))) as (port, _):
        yield f"http://127.0.0.1:{port}"


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "30", *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


def events(text: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(each) for each in data if each != "[DONE]"]


@needs_curl
def test_curl_with_openais_api(address: str) -> None:
    body = {"prompt": "Hello", "max_tokens": 20, "seed": 1}
    url = f"{address}/v1/completions"
    whole = json.loads(curl(url, "-d", json.dumps(body)))["choices"][0]["text"]
    assert len(whole) > 5
    streamed = curl(
        url, "-H", "Content-Type: application/json", "-d", json.dumps({**body, "stream": True})
    )
    assert streamed.endswith("data: [DONE]\n\n")
    assert "".join(event["choices"][0]["text"] for event in events(streamed)) == whole


@needs_curl
def test_curl_with_tritons_generate(address: str, tmp_path: Path) -> None:
    url = f"{address}/v2/models/ensemble"
    body = {"text_input": "Hello", "max_tokens": 20, "bad_words": "", "stop_words": ""}
    whole = json.loads(curl("-X", "POST", f"{url}/generate", "-d", json.dumps(body)))
    streamed = curl(
        "-X", "POST", f"{url}/generate_stream", "-d", json.dumps({**body, "stream": True})
    )
    pieces = "".join(event["text_output"] for event in events(streamed))
    assert whole["text_output"] == "Hello" + pieces
    code = ["-o", str(tmp_path / "body"), "-w", "%{http_code}"]
    assert curl(*code, f"{address}/v2/health/ready") == "200"
    assert curl(*code, f"{address}/v2/models/other/ready") == "404"


def test_langchain(address: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    model = langchain.ChatOpenAI(
        base_url=f"{address}/v1", api_key="-", model="tiny", seed=1, max_tokens=12, max_retries=0
    )
    talk = [("system", "Be brief."), ("user", "Hello")]
    whole = model.invoke(talk)
    assert whole.usage_metadata["output_tokens"] == 12
    assert whole.response_metadata["finish_reason"] == "length"
    pieces = list(model.stream(talk))
    assert "".join(piece.content for piece in pieces) == whole.content
    assert len(pieces) > 4
    answers = model.batch([talk, [("user", "Other")]])
    assert [answers[0].content == whole.content, answers[1].content == whole.content] == [
        True,
        False,
    ]
