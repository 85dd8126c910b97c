"""KServe's and Triton's protocol as Triton's own client sees it, over a null engine."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tensorray.cluster import batch
from tensorray.cluster.ingress import create_app
from tensorray.cluster.llm import LLM
from tensorray.cluster.triton_fields import DATATYPES, INPUTS
from tests.helpers.http_server import http_server
from tests.helpers.null_engine import LocalBackend, serving, write_model
from tests.helpers.tiny_models import directory

triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")

HELLO = "Hello"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[tuple[int, LocalBackend]]:
    with http_server(model) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: tuple[int, LocalBackend]) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server[0]}") as client:
        yield client


@pytest.fixture
async def http(model: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(model) as (client, _):
        yield client


def tensor(name: str, values: Any, datatype: str, *, binary: bool = True) -> Any:
    array = np.array(values, dtype=object if datatype == "BYTES" else triton_dtype(datatype))
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def triton_dtype(datatype: str) -> Any:
    names = {"INT32": np.int32, "UINT32": np.uint32, "UINT64": np.uint64, "FP32": np.float32}
    return {**names, "BOOL": np.bool_}[datatype]


def ask(text: str = HELLO, *, binary: bool = True, tokens: int = 6) -> list[Any]:
    return [
        tensor("text_input", [[text]], "BYTES", binary=binary),
        tensor("max_tokens", [[tokens]], "INT32", binary=binary),
    ]


def texts(result: Any) -> list[str]:
    found = result.as_numpy("text_output")
    return [each.decode() if isinstance(each, bytes) else each for each in found]


async def completion(http: httpx.AsyncClient, **fields: Any) -> str:
    """What OpenAI's API answers."""
    fields = {"prompt": HELLO, "max_tokens": 6, "temperature": 0, "seed": 0, **fields}
    answer = await http.post("/v1/completions", json=fields)
    return str(answer.json()["choices"][0]["text"])


# --- health and metadata ---


def test_health(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    for name in ("tiny", "ensemble", "tensorrt_llm_bls"):
        assert client.is_model_ready(name)
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("other")


async def test_an_engine_that_failed_is_not_ready(model: Path) -> None:
    async with serving(model) as (http, backend):
        backend.engine.fail("out of luck")
        assert (await http.get("/v2/health/live")).status_code == 200
        assert (await http.get("/v2/health/ready")).status_code == 503
        assert (await http.get("/v2/models/tiny/ready")).status_code == 503
        answer = await http.post("/v2/models/tiny/generate", json={"text_input": HELLO})
        assert answer.status_code == 503
        assert isinstance(answer.json()["error"], str)


def test_metadata(client: Any) -> None:
    assert client.get_server_metadata()["name"] == "tensorray"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("ensemble")
    inputs = {each["name"]: each for each in metadata["inputs"]}
    assert (metadata["name"], metadata["versions"]) == ("ensemble", ["1"])
    assert inputs["text_input"] == {"name": "text_input", "datatype": "BYTES", "shape": [-1, 1]}
    assert inputs["stop_words"]["shape"] == [-1, -1]
    config = client.get_model_config("ensemble")
    types = {each["name"]: each["data_type"] for each in config["input"]}
    assert (types["text_input"], types["max_tokens"]) == ("TYPE_STRING", "TYPE_INT32")
    assert {each["name"] for each in config["input"]} == set(inputs)


def test_a_model_name_with_a_slash(model: Path) -> None:
    with (
        http_server(model, name="org/tiny") as (port, _),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        assert client.is_model_ready("org/tiny")
        assert client.get_model_metadata("org/tiny", "1")["name"] == "org/tiny"
        assert texts(client.infer("org/tiny", ask())) == texts(client.infer("ensemble", ask()))


# --- infer ---


@pytest.mark.parametrize("binary", [True, False])
async def test_infer(client: Any, http: httpx.AsyncClient, binary: bool) -> None:
    outputs = [triton.InferRequestedOutput("text_output", binary_data=binary)]
    result = client.infer("ensemble", ask(binary=binary), outputs=outputs, request_id="mine")
    assert texts(result) == [HELLO + await completion(http)]
    assert result.get_response()["id"] == "mine"
    assert result.get_response()["model_name"] == "ensemble"
    (told,) = result.get_response()["outputs"]
    assert ("data" in told) is not binary


async def test_a_batch_has_its_rows(client: Any, http: httpx.AsyncClient) -> None:
    inputs = [
        tensor("text_input", [["one"], ["three"]], "BYTES"),
        tensor("max_tokens", [[3], [9]], "UINT32"),
        tensor("num_return_sequences", [[2], [2]], "INT32"),
        tensor("exclude_input_in_output", [[True], [False]], "BOOL"),
    ]
    result = client.infer("tensorrt_llm_bls", inputs)
    one = await completion(http, prompt="one", max_tokens=3)
    three = "three" + await completion(http, prompt="three", max_tokens=9)
    found = texts(result)
    assert len(found) == 4
    assert (found[0], found[2]) == (one, three)
    assert found[3].startswith("three")


def test_log_probs_and_counts(client: Any) -> None:
    inputs = [
        *ask(),
        tensor("return_log_probs", [[True]], "BOOL"),
        tensor("return_num_input_tokens", [[True]], "BOOL"),
        tensor("return_num_output_tokens", [[True]], "BOOL"),
    ]
    result = client.infer("tiny", inputs)
    assert result.as_numpy("cum_log_probs").shape == (1, 1)
    assert result.as_numpy("output_log_probs").shape == (1, 1, 6)
    assert result.as_numpy("output_log_probs").dtype == np.float32
    assert result.as_numpy("num_input_tokens").tolist() == [[6]]
    assert result.as_numpy("num_output_tokens").tolist() == [[6]]
    asked = client.infer("tiny", ask(), outputs=[triton.InferRequestedOutput("cum_log_probs")])
    assert asked.as_numpy("cum_log_probs") == result.as_numpy("cum_log_probs")
    assert asked.as_numpy("text_output") is None


async def test_a_stop_word_ends_the_text_and_stays(client: Any, http: httpx.AsyncClient) -> None:
    text = await completion(http, max_tokens=60)
    at = next(i for i in range(5, len(text)) if text[i : i + 2].isascii())
    stop = tensor("stop_words", [["never there", text[at : at + 2]]], "BYTES")
    result = client.infer("tiny", [*ask(tokens=60), stop])
    assert texts(result) == [HELLO + text[: text.index(text[at : at + 2]) + 2]]


def test_without_top_k_and_top_p_the_likeliest_token_is_taken(client: Any, server: Any) -> None:
    seen: list[Any] = []
    backend = server[1]
    plain = backend.generate
    backend.generate = lambda request: seen.append(request) or plain(request)
    try:
        client.infer("tiny", [*ask(), tensor("temperature", [[0.5]], "FP32")])
        client.infer("tiny", [*ask(), tensor("top_p", [[0.5]], "FP32")])
        client.infer(
            "tiny",
            [
                *ask(),
                tensor("top_k", [[7]], "INT32"),
                tensor("top_p", [[0.0]], "FP32"),
                tensor("seed", [[2**64 - 1]], "UINT64"),
                tensor("end_id", [[65]], "INT32"),
                tensor("bad_words", [["b", ""]], "BYTES"),
                tensor("bad_words_list", [[[5, 6, 7], [1, 3, -1]]], "INT32"),
                tensor("embedding_bias_words", [["ca"]], "BYTES"),
                tensor("embedding_bias_weights", [[1.5]], "FP32"),
            ],
            priority=3,
        )
    finally:
        del backend.generate
    greedy, nucleus, full = [request.sampling for request in seen]
    assert greedy.temperature == 0.0
    assert (nucleus.temperature, nucleus.top_k, nucleus.top_p, nucleus.seed) == (1.0, 0, 0.5, 0)
    assert (full.temperature, full.top_k, full.top_p, full.seed) == (1.0, 7, 1.0, -1)
    assert full.stop_token_ids == [65]
    assert 5 in full.banned_token_ids
    assert len(full.banned_token_ids) == 2
    assert [6, 7] in full.bad_words
    assert sorted(full.logit_bias.values()) == [1.5, 1.5]
    assert seen[2].priority == 3


REFUSED = [
    ("beam_width", tensor("beam_width", [[65]], "INT32"), "sequences that run at once"),
    ("length_penalty", tensor("length_penalty", [[2.0]], "FP32"), "needs a beam_width"),
    ("lora_task_id", tensor("lora_task_id", [[4]], "UINT64"), "by name"),
    ("bad_words_list", tensor("bad_words_list", [[5, 6, 3, -1]], "INT32"), "rising places"),
    ("bad_words_list", tensor("bad_words_list", [[5, 6, 2, 1]], "INT32"), "rising places"),
    ("bad_words", tensor("bad_words_list", [[9999, 1]], "INT32"), "names token 9999"),
    ("top_q", tensor("top_q", [[0.5]], "FP32"), "no input"),
    ("top_p", tensor("top_p", [[1.5]], "FP32"), "less than or equal to 1"),
    ("seed", tensor("seed", [[0.5]], "FP32"), "FP32, not INT32"),
    ("top_k", tensor("top_k", [[1], [2]], "INT32"), "batch of 1"),
    ("num_return_sequences", tensor("num_return_sequences", [[0]], "INT32"), "greater than"),
    ("embedding_bias_weights", tensor("embedding_bias_weights", [[1.0]], "FP32"), "1 weights"),
]


@pytest.mark.parametrize(("name", "extra", "why"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_refused_is_named(client: Any, name: str, extra: Any, why: str) -> None:
    with pytest.raises(triton.InferenceServerException) as refused:
        client.infer("ensemble", [*ask(), extra])
    assert refused.value.status() == "400"
    assert name in refused.value.message()
    assert why in refused.value.message()


def test_what_asks_for_nothing_is_taken(client: Any) -> None:
    neutral = [
        tensor("beam_width", [[1]], "INT32"),
        tensor("pad_id", [[2]], "INT32"),
        tensor("return_context_logits", [[False]], "BOOL"),
    ]
    assert texts(client.infer("ensemble", [*ask(), *neutral])) == texts(
        client.infer("ensemble", ask())
    )


def test_other_refusals(client: Any) -> None:
    for arguments, why in (
        ({"outputs": [triton.InferRequestedOutput("logits")]}, "no output"),
        ({"sequence_id": 5}, "no state"),
        ({"timeout": 5}, "X-Request-Timeout"),
        ({"request_compression_algorithm": "gzip"}, "Content-Encoding"),
        ({"outputs": [triton.InferRequestedOutput("text_output", class_count=2)]}, "not supported"),
    ):
        with pytest.raises(triton.InferenceServerException, match=why):
            client.infer("ensemble", ask(), **arguments)
    with pytest.raises(triton.InferenceServerException, match="no model 'other'"):
        client.infer("other", ask())


BROKEN: list[tuple[bytes, dict[str, str], str]] = [
    (b"{", {}, "no inference request"),
    (b"{}", {}, "missing required field `inputs`"),
    (b"{}", {"Inference-Header-Content-Length": "9"}, "at most that of the body"),
    (b"{}", {"Inference-Header-Content-Length": "-1"}, "must be the length"),
]


def broken(why: str, extra: bytes = b"", **changes: Any) -> None:
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"], **changes}
    body = json.dumps({"inputs": [{k: v for k, v in tensor.items() if v is not None}]}).encode()
    BROKEN.append((body + extra, {"Inference-Header-Content-Length": str(len(body))}, why))


broken("bytes that belong to no input", b"abc")
broken("do not make the shape", shape=[2])
broken("is no shape", shape=[-1])
broken("is not BYTES", data=[1])
broken("a list here and a value there", data=[["a"], "b"])
broken("neither data nor", data=None)
broken("is no datatype", datatype="WORD", data=[1])
broken("5 bytes are left", b"12345", parameters={"binary_data_size": 6})
broken("end within a length", b"123", parameters={"binary_data_size": 3})
broken("end within a value", b"\x09\0\0\0a", parameters={"binary_data_size": 5})
broken("must be UTF-8", b"\x01\0\0\0\xff", parameters={"binary_data_size": 5})
broken("shared_memory_region is not supported", parameters={"shared_memory_region": "x"})
broken("do not make the shape", b"123", datatype="INT32", parameters={"binary_data_size": 3})


@pytest.mark.parametrize(("body", "headers", "why"), BROKEN)
async def test_broken_bodies(
    http: httpx.AsyncClient, body: bytes, headers: dict[str, str], why: str
) -> None:
    answer = await http.post("/v2/models/tiny/infer", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert why in answer.json()["error"]


# --- generate ---


async def test_generate(http: httpx.AsyncClient) -> None:
    fields = {"text_input": HELLO, "max_tokens": 6, "bad_words": "", "stop_words": "", "pad_id": 2}
    answer = (await http.post("/v2/models/ensemble/generate", json=fields)).json()
    assert answer == {
        "model_name": "ensemble",
        "model_version": "1",
        "sequence_id": 0,
        "sequence_start": False,
        "sequence_end": False,
        "text_output": HELLO + await completion(http),
    }
    given = {"text_input": HELLO, "parameters": {"max_tokens": 6, "temperature": 0}}
    same = (await http.post("/v2/models/ensemble/versions/1/generate", json=given)).json()
    assert same == answer


async def test_generate_with_log_probs_and_sequences(http: httpx.AsyncClient) -> None:
    fields = {"text_input": HELLO, "max_tokens": 3, "return_log_probs": True, "id": "mine"}
    answer = (await http.post("/v2/models/tiny/generate", json=fields)).json()
    assert len(answer["output_log_probs"]) == 3
    assert answer["id"] == "mine"
    fields |= {"num_return_sequences": 2}
    answer = (await http.post("/v2/models/tiny/generate", json=fields)).json()
    assert len(answer["text_output"]) == 2


async def test_generate_stream(http: httpx.AsyncClient) -> None:
    fields = {"text_input": HELLO, "max_tokens": 30, "stream": True}
    answer = await http.post("/v2/models/ensemble/generate_stream", json=fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["text_output"] for event in events) == await completion(
        http, max_tokens=30
    )
    assert len(events) > 5
    fields["stream"] = False
    answer = await http.post("/v2/models/ensemble/generate_stream", json=fields)
    (event,) = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line]
    assert event["text_output"] == HELLO + await completion(http, max_tokens=30)


def guided(kind: str, guide: str, **more: Any) -> dict[str, Any]:
    """A request whose answer follows a guide."""
    guide_fields = {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
    return {"text_input": HELLO, **guide_fields, **more}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "text_input is missing"),
        ({"text_input": 5}, "text_input: '5' is not BYTES"),
        ({"text_input": "a", "stream": True}, "use generate_stream"),
        ({"text_input": "a", "temperature": "hot"}, "temperature: 'hot' is not FP32"),
        ({"text_input": "a", "max_tokens": 5000}, "max_tokens is too large"),
        ({"text_input": "a", "guided_decoding_guide": "x"}, "guide_type is missing; send one"),
        (guided("structural_tag", "x"), "'structural_tag' is not supported"),
        (guided("json", "{}"), "the type is json_schema"),
        (guided("regex", ""), "send the text of the regex"),
        (guided("regex", "("), "guided_decoding_guide: "),
        (guided("regex", "a", end_id=-1), "end_id: -1 can't go with"),
        (guided("regex", "a", min_length=1), "min_tokens can't go with"),
        ({"text_input": "a", "parameters": "x"}, "parameters must be an object"),
        ({"text_input": "", "max_tokens": 1}, "text_input: the prompt is empty"),
        ({"text_input": "a", "stop_words": [1]}, "stop_words: '1' is not BYTES"),
    ],
)
async def test_generate_refuses(http: httpx.AsyncClient, fields: Any, why: str) -> None:
    answer = await http.post("/v2/models/ensemble/generate", json=fields)
    assert answer.status_code == 400
    assert why in answer.json()["error"]
    if not fields.get("stream"):
        streamed = await http.post("/v2/models/ensemble/generate_stream", json=fields)
        assert streamed.status_code == 400
        assert why in streamed.json()["error"]


# --- guided output ---

BOOLEAN = json.dumps({"type": "boolean"})
GUIDES = [
    ("regex", "[ab]{3}", lambda text: re.fullmatch("[ab]{3}", text)),
    ("json_schema", BOOLEAN, lambda text: isinstance(json.loads(text), bool)),
    ("ebnf_grammar", 'root ::= "up" | "down"', lambda text: text in ("up", "down")),
]


@pytest.fixture(scope="module")
def guided_app() -> Iterator[Any]:
    """The API over a model with weights, which can be held to a guide; and its event loop."""
    with LLM(str(directory("qwen3")), max_model_len=64, num_kv_blocks=64) as llm:
        yield create_app(llm.frontend, batch._Backend(llm.client), llm.config), llm


@pytest.mark.parametrize(("kind", "guide", "right"), GUIDES, ids=[row[0] for row in GUIDES])
def test_an_answer_follows_its_guide(guided_app: Any, kind: str, guide: str, right: Any) -> None:
    app, llm = guided_app
    fields = guided(kind, guide, max_tokens=24, exclude_input_in_output=True, end_id=3)
    row = {
        "inputs": [
            {"name": name, "shape": [1, 1], "datatype": DATATYPES[INPUTS[name]], "data": [value]}
            for name, value in fields.items()
        ]
    }

    async def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            answer = await http.post(f"/v2/models/ensemble/{path}", json=body)
            assert answer.status_code == 200, answer.text
            return dict(answer.json())

    text = llm.run(ask("generate", fields))["text_output"]
    assert right(text)
    (told,) = llm.run(ask("infer", row))["outputs"]
    assert told["data"] == [text]


def test_a_refusal_by_the_guard_is_one_triton_reads(tmp_path: Path) -> None:
    """Its client looks for a string, where OpenAI's error is an object."""
    model = write_model(tmp_path / "model")
    with (
        http_server(model, limits={"api_key": ["secret"]}) as (port, _),
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        with pytest.raises(triton.InferenceServerException, match="didn't provide an API key") as e:
            client.infer("ensemble", ask())
        assert e.value.status() == "401"
        headers = {"Authorization": "Bearer secret"}
        assert texts(client.infer("ensemble", ask(), headers=headers))[0].startswith(HELLO)
