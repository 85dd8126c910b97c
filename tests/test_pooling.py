"""Embeddings: the last hidden states of a prompt as one vector, beside generation."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from helpers.gpu_shards import make_gpu_shard
from helpers.running import make_shard
from helpers.tiny_models import directory
from safetensors.numpy import load_file, save_file

from tensorray.actors.pooling import NO_STATES, NOT_FINITE
from tensorray.actors.protocol import Sampling, StepResult
from tensorray.builder.model import Model, ModelConfigError
from tensorray.builder.registry import DEFINITIONS, resolve
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.batch import URLS, call
from tensorray.cluster.ingress import create_app
from tensorray.cluster.llm import LLM, PoolingParams, SamplingParams
from tensorray.cluster.pooling import cosine, pair_up
from tensorray.cluster.pooling_type import find_pooling_type
from tensorray.cluster.request import GenerationRequest, RequestRefused
from tensorray.cluster.scheduler import Progress, Scheduler
from tensorray.cluster.sequence import Sequence

GOLDEN = dict(np.load(Path(__file__).parent / "fixtures" / "pooling.npz"))
MODELS = ["qwen3", "gemma3", "gpt2", "llama3"]
KINDS: list[Any] = ["last", "mean", "cls"]
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
RAW = PoolingParams(normalize=False)


def prompts(name: str) -> list[list[int]]:
    return [GOLDEN[f"{name}_prompt_{i}"].tolist() for i in range(4)]


def expected(name: str, kind: str) -> list[np.ndarray]:
    return [GOLDEN[f"{name}_{kind}_{i}"] for i in range(4)]


# --- in shards ---


def pooled(seq: int, prompt: list[int], kind: str) -> Sequence:
    request = GenerationRequest(
        request_id=str(seq),
        prompt=prompt,
        sampling=Sampling(),
        max_tokens=1,
        pooling=kind,
        reuse_prefix=kind == "last",
    )
    return Sequence(seq, request, request.sampling)


def generated(seq: int, prompt: list[int], tokens: int, priority: int = 0) -> Sequence:
    sampling = Sampling(temperature=0.0)
    request = GenerationRequest(
        request_id=str(seq),
        prompt=prompt,
        sampling=sampling,
        max_tokens=tokens,
        priority=priority,
    )
    return Sequence(seq, request, sampling)


def drive(
    shard: Any, sequences: list[Sequence], *, step_tokens: int = 64, depth: int = 1, **options: Any
) -> tuple[dict[int, list[Progress]], Scheduler]:
    """Run sequences to their ends; what each was told."""
    books = Scheduler(
        shard.info.kv,
        max_model_len=64,
        max_num_seqs=8,
        max_num_batched_tokens=step_tokens,
        **options,
    )
    books.add(*sequences)
    told: dict[int, list[Progress]] = {each.seq: [] for each in sequences}
    under_way: list[Any] = []
    while books.unfinished:
        while len(under_way) < depth and (plan := books.schedule()) is not None:
            under_way.append(shard.submit(plan))
        result: StepResult = under_way.pop(0)()
        for progress in books.update(result):
            told[progress.sequence.seq].append(progress)
    for pending in under_way:
        books.update(pending())
    return told, books


def vectors(told: dict[int, list[Progress]]) -> list[np.ndarray]:
    found = []
    for progress in told.values():
        if progress[0].pooled:
            assert [each.finish_reason for each in progress] == ["stop"]
            assert progress[0].token is None
            found.append(np.frombuffer(progress[0].pooled, "<f4"))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_states_are_transformers_whole_chunked_and_preempted(name: str, kind: str) -> None:
    wanted = expected(name, kind)
    sequences = [pooled(i, prompt, kind) for i, prompt in enumerate(prompts(name))]
    for step_tokens, num_blocks in ((64, 512), (8, 512), (8, 40 if name == "gemma3" else 18)):
        shard = make_shard(directory(name), num_blocks=num_blocks)
        told, _ = drive(shard, [_again(each) for each in sequences], step_tokens=step_tokens)
        for ours, theirs in zip(vectors(told), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def _again(sequence: Sequence) -> Sequence:
    return Sequence(sequence.seq, sequence.request, sequence.sampling)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_gpu_shard_pools_as_the_cpu_shard_beside_generation(kind: str, depth: int) -> None:
    name = "qwen3"
    alone, _ = drive(make_shard(directory(name)), [generated(9, prompts(name)[1], 20)])
    for shard in (make_shard(directory(name)), make_gpu_shard(directory(name))):
        sequences = [pooled(i, prompt, kind) for i, prompt in enumerate(prompts(name))]
        sequences.insert(2, generated(9, prompts(name)[1], 20))
        told, books = drive(shard, sequences, step_tokens=12, depth=depth)
        for ours, theirs in zip(vectors(told), expected(name, kind), strict=True):
            np.testing.assert_allclose(ours, theirs, **TOLERANCE)
        assert [each.token for each in told[9]] == [each.token for each in alone[9]]
        assert not books.unfinished
        assert books.stats().running == 0
        assert len(shard._pooler._sums) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_preempted_sequence_pools_from_its_beginning(kind: str) -> None:
    """A sequence of higher priority takes the blocks in mid-prompt."""
    name = "qwen3"
    long = prompts(name)[3]
    shard = make_shard(directory(name), num_blocks=16)
    books = Scheduler(
        shard.info.kv,
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        policy="priority",
    )
    books.add(pooled(0, long, kind))
    for _ in range(2):
        plan = books.schedule()
        assert plan is not None
        assert books.update(shard.submit(plan)()) == []
    urgent = generated(1, prompts(name)[0], 4, priority=-1)
    books.add(urgent)
    found = []
    while books.unfinished:
        plan = books.schedule()
        assert plan is not None
        found += [each.pooled for each in books.update(shard.submit(plan)()) if each.pooled]
    assert books.stats().preemptions == 1
    np.testing.assert_allclose(np.frombuffer(found[0], "<f4"), expected(name, kind)[3], **TOLERANCE)


def test_the_context_may_be_filled_to_its_last_token() -> None:
    shard = make_shard(directory("qwen3"))
    told, _ = drive(shard, [pooled(0, [5] * 64, "last")])
    assert vectors(told)[0].shape == (32,)
    with pytest.raises(RequestRefused, match="it can have 64 at most"):
        drive(shard, [pooled(0, [5] * 65, "last")])


@pytest.mark.parametrize("make", [make_shard, make_gpu_shard])
def test_what_can_not_be_pooled_fails_alone(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "qwen3"
    sequences = [pooled(0, prompts(name)[0], "mean"), generated(1, prompts(name)[1], 3)]
    shard = make(directory(name))
    plain = shard._model.final_norm
    spoiled = lambda op, w, x: plain(op, w, x) * np.nan  # noqa: E731
    monkeypatch.setattr(shard._model, "final_norm", spoiled)
    monkeypatch.setattr(shard._model, "head", lambda op, w, x: np.zeros((len(x), 272), np.float32))
    told, _ = drive(shard, sequences)
    assert [(each.finish_reason, each.error) for each in told[0]] == [("error", NOT_FINITE)]
    assert told[1][-1].finish_reason == "length"
    for where in ("pooling", "gpu_shard"):
        monkeypatch.setattr(f"tensorray.actors.{where}.has_states", lambda model: False)
    shard.reset()
    told, _ = drive(shard, [_again(each) for each in sequences])
    assert [(each.finish_reason, each.error) for each in told[0]] == [("error", NO_STATES)]
    assert told[1][-1].finish_reason == "length"


def test_every_definition_says_what_its_states_are() -> None:
    assert all(each.final_norm is not Model.final_norm for each in DEFINITIONS)


# --- through LLM ---


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    settings: dict[str, Any] = {"num_kv_blocks": 256, "max_model_len": 64, "num_threads": 1}
    with LLM(
        str(directory("qwen3")), max_num_batched_tokens=16, max_num_seqs=8, **settings
    ) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_s_vector_is_the_same_alone_and_in_a_batch(llm: LLM, kind: Any) -> None:
    params = PoolingParams(pooling_type=kind, normalize=False)
    several = llm.encode(prompts("qwen3"), params)
    for prompt, output, theirs in zip(
        prompts("qwen3"), several, expected("qwen3", kind), strict=True
    ):
        np.testing.assert_allclose(output.outputs.data, theirs, **TOLERANCE)
        assert output.prompt_token_ids == prompt
        (alone,) = llm.encode(prompt, params)  # its blocks are cached by now
        np.testing.assert_allclose(alone.outputs.data, output.outputs.data, **TOLERANCE)


def test_vectors_are_cut_then_normalized(llm: LLM) -> None:
    prompt, raw = prompts("qwen3")[0], expected("qwen3", "last")[0]
    for dimensions in (None, 7):
        (output,) = llm.embed(prompt, PoolingParams(dimensions=dimensions))
        cut = raw[:dimensions]
        np.testing.assert_allclose(output.outputs.data, cut / np.linalg.norm(cut), **TOLERANCE)
        assert output.outputs.embedding == output.outputs.data.tolist()


def test_generation_and_embedding_share_prompts(llm: LLM) -> None:
    prompt = prompts("qwen3")[3]
    greedy = SamplingParams(temperature=0, max_tokens=4)
    (first,) = llm.generate(prompt[:-3], greedy)
    (output,) = llm.encode(prompt)
    np.testing.assert_allclose(output.outputs.data, expected("qwen3", "last")[3], **TOLERANCE)
    assert llm.generate(prompt[:-3], greedy)[0].outputs[0].token_ids == first.outputs[0].token_ids


def test_scores_are_cosines(llm: LLM) -> None:
    texts = ["the rain", "in the train", "then"]
    vectors = [each.outputs.data for each in llm.embed(texts)]
    for ours, theirs in zip(llm.score(texts[0], texts), vectors, strict=True):
        assert ours.outputs.score == pytest.approx(float(vectors[0] @ theirs), abs=1e-4)
    assert llm.score(texts, texts)[1].outputs.score == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="3 texts and 2"):
        llm.score(texts, texts[:2])


def test_pairs_and_cosines() -> None:
    assert pair_up(1, 3) == [(0, 0), (0, 1), (0, 2)]
    assert pair_up(2, 2) == [(0, 0), (1, 1)]
    assert pair_up(2, 1) == [(0, 0), (1, 0)]
    zero, one = np.zeros(3, np.float32), np.array([0, 2, 0], np.float32)
    assert (cosine(zero, one), cosine(one, one * 3), cosine(one, -one)) == (0, 1, -1)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([5] * 65, {}, "too long: 65 tokens, but the context is 64"),
        ([999], {}, "the prompt has token 999"),
        ("", {}, "empty"),
        ([5], {"dimensions": 33}, "more than the 32"),
    ],
)
def test_bad_inputs_run_nothing(
    llm: LLM, prompt: Any, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        llm.embed([prompt] if isinstance(prompt, list) else prompt, PoolingParams(**params))


@pytest.mark.parametrize("layout", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_layouts_pool_as_one_shard_does(layout: dict[str, int]) -> None:
    with LLM(
        str(directory("qwen3")),
        num_kv_blocks=128,
        max_model_len=64,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        num_threads=1,
        **layout,
    ) as several:
        for kind in KINDS:
            found = several.encode(
                prompts("qwen3"), PoolingParams(pooling_type=kind, normalize=False)
            )
            for output, theirs in zip(found, expected("qwen3", kind), strict=True):
                np.testing.assert_allclose(output.outputs.data, theirs, **TOLERANCE)
        assert several.generate([5, 6], SamplingParams(max_tokens=3, ignore_eos=True))


# --- what a checkpoint says ---


def test_sentence_transformers_files_say_how_to_pool(tmp_path: Path) -> None:
    assert find_pooling_type("auto", tmp_path) == "last"
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    for mode, kind in (
        ("pooling_mode_lasttoken", "last"),
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_cls_token", "cls"),
    ):
        file.write_text(json.dumps({"word_embedding_dimension": 8, mode: True}))
        assert find_pooling_type("auto", tmp_path) == kind
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    assert find_pooling_type("mean", tmp_path) == "mean"
    with pytest.raises(ValueError, match="pooling_mode_max_tokens is not supported"):
        find_pooling_type("auto", tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="not Sentence Transformers"):
        find_pooling_type("auto", tmp_path)


# --- over HTTP ---


class LLMBackend:
    """An LLM's engine, for an application on its event loop."""

    def __init__(self, llm: LLM) -> None:
        self.generate = llm.client.generate
        self.cancel = llm.client.cancel

    async def failure(self) -> str | None:
        return None

    async def metrics(self) -> bytes:
        return b""

    async def status(self) -> list[Any]:
        return []


@pytest.fixture(scope="module")
def http(llm: LLM) -> httpx.AsyncClient:
    backend: Any = LLMBackend(llm)
    app = create_app(llm.frontend, backend, llm.config)
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)


@pytest.fixture(scope="module")
def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http)


TEXTS = ["the rain in the thin train", "then the other one", "in"]
SAID = [{"role": "user", "content": "in"}]


@pytest.mark.parametrize("form", [openai.NOT_GIVEN, "float", "base64"])
def test_the_openai_client_gets_embeddings(llm: LLM, client: openai.AsyncOpenAI, form: Any) -> None:
    wanted = [each.outputs.data for each in llm.embed(TEXTS)]
    tokens = [llm.frontend.tokenizer.encode(text) for text in TEXTS]
    inputs: list[Any] = [TEXTS, TEXTS[0], tokens, tokens[0]]
    for input in inputs:
        answer = llm.run(client.embeddings.create(model="qwen3", input=input, encoding_format=form))
        count = 3 if input in (TEXTS, tokens) else 1
        assert [each.index for each in answer.data] == [*range(count)]
        assert answer.usage.prompt_tokens == sum(map(len, tokens[:count]))
        for each, theirs in zip(answer.data, wanted, strict=False):
            vector: Any = each.embedding
            if form == "base64":
                vector = np.frombuffer(base64.b64decode(vector), "<f4")
            np.testing.assert_allclose(vector, theirs, atol=1e-5)
    answer = llm.run(client.embeddings.create(model="qwen3", input=TEXTS, dimensions=5))
    assert all(len(each.embedding) == 5 for each in answer.data)
    assert np.linalg.norm(answer.data[0].embedding) == pytest.approx(1, abs=1e-5)


def post(llm: LLM, http: httpx.AsyncClient, path: str, **body: Any) -> tuple[int, Any]:
    response = llm.run(http.post(path, json=body))
    return response.status_code, response.json()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": True},
        {"continue_final_message": True, "dimensions": 5},
    ],
    ids=str,
)
def test_messages_embed_as_the_template_renders_them(
    llm: LLM, http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    template = {name: value for name, value in fields.items() if name != "dimensions"}
    tokens = llm.frontend.chat(SAID, **{"add_generation_prompt": False, **template})
    plain = llm.frontend.chat(SAID, add_generation_prompt=False)
    assert (tokens == plain) == (not template)
    (wanted,) = llm.embed(tokens, PoolingParams(dimensions=fields.get("dimensions")))
    status, answer = post(llm, http, "/v1/embeddings", messages=SAID, **fields)
    assert status == 200, answer
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    (found,) = answer["data"]
    np.testing.assert_allclose(found["embedding"], wanted.outputs.data, atol=1e-5)


def test_scores_and_rankings_agree_with_embeddings(llm: LLM, http: httpx.AsyncClient) -> None:
    vectors = [each.outputs.data for each in llm.embed(TEXTS)]
    wanted = [cosine(vectors[0], each) for each in vectors]
    for path in ("/score", "/v1/score"):
        status, answer = post(llm, http, path, text_1=TEXTS[0], text_2=TEXTS)
        assert status == 200
        assert [each["score"] for each in answer["data"]] == pytest.approx(wanted, abs=1e-4)
    documents: list[Any] = [{"text": TEXTS[1]}, TEXTS[0], TEXTS[2]]
    order = sorted([1, 0, 2], key=lambda i: -wanted[[1, 0, 2][i]])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        status, answer = post(llm, http, path, query=TEXTS[0], documents=documents, top_n=2)
        assert status == 200
        assert [each["index"] for each in answer["results"]] == order[:2]
        assert answer["results"][0]["document"] == {"text": TEXTS[0]}
        assert answer["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-4)
    _, answer = post(llm, http, "/rerank", query="in", documents=["in"], return_documents=False)
    assert "document" not in answer["results"][0]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/embeddings", {}, "input", "missing"),
        ("/v1/embeddings", {"input": "a", "messages": SAID}, "input", "both"),
        ("/v1/embeddings", {"input": "a", "enable_thinking": True}, "enable_thinking", "goes with"),
        ("/v1/embeddings", {"messages": []}, "messages", "at least 1"),
        ("/v1/embeddings", {"messages": [{"role": "x"}]}, r"messages[0].role", "one of system"),
        ("/v1/embeddings", {"messages": SAID, "add_special_tokens": True}, "add_special", "leave"),
        ("/v1/embeddings", {"input": []}, "input", "input must be a string"),
        ("/v1/embeddings", {"input": ["a", 1]}, "input", r"input\[1\] must be a string"),
        ("/v1/embeddings", {"input": ""}, "prompt", "empty"),
        ("/v1/embeddings", {"input": [999]}, "prompt", "token 999"),
        ("/v1/embeddings", {"input": [5] * 65}, "input", "too long"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "more than 2048"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions", "greater"),
        ("/v1/embeddings", {"input": "a", "dimensions": 33}, "dimensions", "more than the 32"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "x"}, "encoding_format", "base64"),
        ("/v1/embeddings", {"input": "a", "pooling_type": "x"}, "pooling_type", "'mean'"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate", "at least 1"),
        ("/v1/embeddings", {"input": "a", "truncation_side": "left"}, "trunc", "their beginning"),
        (
            "/v1/score",
            {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 3},
            "trunc",
            "short",
        ),
        ("/v1/score", {"text_1": "a"}, "text_2", "required|missing"),
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1", "text_1 must be"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_2", "2 texts and 3"),
        ("/v1/score", {"text_1": "a", "text_2": ["a"] * 2049}, "input", "more than 2048"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 2049}, "input", "more than 2048"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query", "at least 1"),
        ("/v1/rerank", {"query": "a", "documents": [1]}, "documents", "documents must be"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n", "greater"),
    ],
)
def test_bad_requests_name_what_is_wrong(
    llm: LLM, http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    status, answer = post(llm, http, path, **body)
    assert status == 400
    assert re.search(message, answer["error"]["message"]), answer
    assert answer["error"]["param"].startswith(param)


def test_no_other_model_is_asked(llm: LLM, http: httpx.AsyncClient) -> None:
    assert post(llm, http, "/v1/embeddings", input="a", model="gone")[0] == 404


# --- models that are saved for embeddings ---


@pytest.mark.parametrize(("name", "headless"), [("llama3", "LlamaModel"), ("qwen3", "Qwen3Model")])
def test_a_headless_checkpoint_embeds(name: str, headless: str, tmp_path: Path) -> None:
    shutil.copytree(directory(name), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": [headless], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {
        key.removeprefix("model."): value
        for key, value in tensors.items()
        if key.startswith("model.")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    with LLM(str(tmp_path), num_kv_blocks=64, max_model_len=64, num_threads=1) as llm:
        for output, theirs in zip(llm.encode(prompts(name)), expected(name, "mean"), strict=True):
            np.testing.assert_allclose(output.outputs.data, theirs, **TOLERANCE)


@pytest.mark.parametrize(
    "config", [{"is_causal": False}, {"use_bidirectional_attention": True}], ids=str
)
def test_a_model_that_looks_ahead_is_refused(config: dict[str, bool]) -> None:
    with pytest.raises(ModelConfigError, match="attend to earlier ones only"):
        resolve({"architectures": ["Qwen3ForCausalLM"], **config})


def test_a_classification_head_is_refused_by_name() -> None:
    with pytest.raises(ModelConfigError, match="Qwen3ForSequenceClassification is not supported"):
        resolve({"architectures": ["Qwen3ForSequenceClassification"]})


def test_files_of_requests_embed(llm: LLM) -> None:
    backend: Any = LLMBackend(llm)
    app = create_app(llm.frontend, backend, llm.config)
    assert "/v1/embeddings" in URLS
    status, body = llm.run(call(app, "/v1/embeddings", b'{"input": "in"}'))
    assert status == 200
    (wanted,) = llm.embed("in")
    np.testing.assert_allclose(
        json.loads(body)["data"][0]["embedding"], wanted.outputs.data, atol=1e-5
    )


# --- judged by a model ---

JUDGED = "{{ query }}: {{ document }}? "


def test_a_judge_s_scores_are_its_odds_of_yes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny vocabulary "in" and " on" are single tokens; "yes" is not."""
    monkeypatch.setattr(llm.frontend, "_max_logprobs", -1)
    settings = {"score_template": JUDGED, "score_tokens": ["in", " on"]}
    backend: Any = LLMBackend(llm)
    config = llm.config.model_copy(update=settings)
    app = create_app(llm.frontend, backend, config)
    greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    scores = []
    for document in TEXTS:
        prompt = llm.frontend.tokenizer.encode(f"then: {document}? ", add_special_tokens=False)
        (answer,) = llm.generate(prompt, greedy)
        entries: Any = answer.outputs[0].logprobs
        found = {each.text: each.logprob for each in entries[0].top}
        odds = np.exp([found["in"], found[" on"]])
        scores.append(odds[0] / odds.sum())
    assert max(scores) - min(scores) > 1e-3
    body = json.dumps({"text_1": "then", "text_2": TEXTS}).encode()
    status, told = llm.run(call(app, "/v1/score", body))
    assert status == 200, told
    assert [each["score"] for each in json.loads(told)["data"]] == pytest.approx(scores, abs=1e-4)
    body = json.dumps({"query": "then", "documents": TEXTS}).encode()
    _, told = llm.run(call(app, "/v1/rerank", body))
    best = json.loads(told)["results"][0]
    assert best["index"] == int(np.argmax(scores))
    assert best["relevance_score"] == pytest.approx(max(scores), abs=1e-4)
    with pytest.raises(ValueError, match="it is 3 tokens of this model, not one"):
        create_app(
            llm.frontend, backend, config.model_copy(update={"score_tokens": ["yes", " on"]})
        )
