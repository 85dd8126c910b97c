"""LoRA adapters over HTTP: named as models, swapped while clients are answered, and refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.equality import assert_same_tokens
from helpers.lora_files import merge, read_files, write_adapter, write_files
from helpers.lora_server import Backend, lora_server
from helpers.null_engine import serving, write_model
from helpers.tiny_models import directory, references

from tensorray.actors.adapter import Adapter
from tensorray.cluster.llm import LLM, SamplingParams
from tensorray.cluster.tokenizer_files import load_tokenizer

BASE = directory("llama3")
PROMPT = references("llama3")[0].prompt.tolist()[:20]
TOKENS = 24
TOKENIZER = load_tokenizer(BASE)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(BASE, root / f"adapter-{i}", seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def server(adapters: list[Path]) -> Iterator[tuple[httpx.Client, Backend]]:
    with (
        lora_server(BASE, allowed_lora_path=[str(adapters[0].parent)], max_num_seqs=8) as (
            port,
            backend,
        ),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        yield client, backend


@pytest.fixture(scope="module")
def merged(adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The answers, and how clear each choice was, of the adapters merged; last of the base."""
    root = tmp_path_factory.mktemp("merged")
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    found = []
    for model in [*(merge(BASE, each, root / each.name) for each in adapters), BASE]:
        with LLM(str(model), max_model_len=64, num_kv_blocks=64, num_threads=1) as llm:
            ((completion,),) = [each.outputs for each in llm.generate([PROMPT], params)]
            assert completion.logprobs is not None
            best = [sorted(t.logprob for t in entry.top) for entry in completion.logprobs]
            margins = [float(two[-1] - two[-2]) for two in best]
            found.append((completion.token_ids, margins))
    return found


def ask(client: httpx.Client, model: str, **fields: Any) -> httpx.Response:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        **fields,
    }
    return client.post("/v1/completions", json=body)


def load(client: httpx.Client, name: str, path: Path | str, **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return client.post("/v1/load_lora_adapter", json=body)


def unload(client: httpx.Client, name: str) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def loaded(client: httpx.Client) -> dict[str, Any]:
    models = client.get("/v1/models").raise_for_status().json()["data"]
    return {each["id"]: each for each in models if "parent" in each}


def spelled(tokens: list[int]) -> Any:
    """Tokens as the API's logprobs have them."""
    names = TOKENIZER.token_bytes
    return [names[token].decode("utf-8", "replace") for token in tokens]


def assert_answer(answer: httpx.Response, *expected: Any) -> None:
    """The whole answer is one of these."""
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    ours = choice["logprobs"]["tokens"]
    assert len(ours) == TOKENS
    for tokens, margins in expected[:-1]:
        try:
            assert_same_tokens(ours, spelled(tokens), margins)
        except AssertionError:
            continue
        return
    tokens, margins = expected[-1]
    assert_same_tokens(ours, spelled(tokens), margins)


def test_an_adapter_is_a_model_of_its_own(
    server: tuple[httpx.Client, Backend], adapters: list[Path], merged: list[Any]
) -> None:
    client, _ = server
    assert load(client, "one", adapters[0]).text.startswith("Success")
    assert load(client, "two", adapters[1]).status_code == 200
    found = loaded(client)
    assert {name: (each["parent"], each["root"]) for name, each in found.items()} == {
        "one": ("base", str(adapters[0])),
        "two": ("base", str(adapters[1])),
    }
    assert client.get("/v1/models/one").json()["id"] == "one"
    for model, expected in (("one", merged[0]), ("two", merged[1]), ("base", merged[-1])):
        answer = ask(client, model)
        assert answer.json()["model"] == model
        assert_answer(answer, expected)
    chat = {"model": "one", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=chat).json()["model"] == "one"
    assert client.post("/tokenize", json={"model": "one", "prompt": "hi"}).status_code == 200
    for name in ("one", "two"):
        assert unload(client, name).status_code == 200
    assert not loaded(client)


def test_what_is_not_loaded_is_not_found(server: tuple[httpx.Client, Backend]) -> None:
    client, _ = server
    message = {"role": "user", "content": "hi"}
    for answer in (
        ask(client, "nobody"),
        ask(client, "nobody", stream=True),
        ask(client, "n" * 5000),
        client.post("/v1/chat/completions", json={"model": "nobody", "messages": [message]}),
        client.post("/tokenize", json={"model": "nobody", "prompt": "hi"}),
        client.get("/v1/models/nobody"),
        unload(client, "nobody"),
    ):
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["code"] == "model_not_found"


def test_a_swap_during_traffic_drops_nothing(
    server: tuple[httpx.Client, Backend], adapters: list[Path], merged: list[Any]
) -> None:
    """While clients ask on and on, adapters come, go, and take each other's place."""
    client, backend = server
    for name, path in (("stays", adapters[0]), ("changes", adapters[1]), ("goes", adapters[2])):
        assert load(client, name, path).status_code == 200
    stop = threading.Event()
    going, gone = threading.Event(), threading.Event()  # before it is unloaded, and after
    answers: dict[str, list[httpx.Response]] = {
        "base": [],
        "stays": [],
        "changes": [],
        "goes": [],
    }

    def ask_on(model: str) -> None:
        while not stop.is_set():
            was_gone = gone.is_set()
            answer = ask(client, model)
            if model == "goes" and answer.status_code == 404:
                assert going.is_set(), "not found while it was loaded"
                return
            assert not (model == "goes" and was_gone), "found after it was unloaded"
            answers[model].append(answer)

    def more_of(*models: str) -> None:
        """Wait until each has another answer that was asked for after now."""
        before = {model: len(answers[model]) + 1 for model in models}
        for _ in range(1800):
            if all(len(answers[model]) > count for model, count in before.items()):
                return
            assert not any(each.done() for each in asking if not going.is_set())
            stop.wait(0.1)
        raise AssertionError("clients get no answers")

    with ThreadPoolExecutor(5) as pool:
        asking = [pool.submit(ask_on, model) for model in (*answers, "changes")]
        try:
            more_of("base", "stays", "changes", "goes")
            for path in (adapters[3], adapters[1], adapters[3]):
                assert load(client, "changes", path, load_inplace=True).status_code == 200
                more_of("changes", "stays")
            assert load(client, "new", adapters[2]).status_code == 200
            assert_answer(ask(client, "new"), merged[2])
            going.set()
            assert unload(client, "goes").status_code == 200
            gone.set()
            more_of("base", "stays", "changes")
        finally:
            stop.set()
        for each in asking:
            each.result()
    expected = {
        "base": [merged[-1]],
        "stays": [merged[0]],
        "changes": [merged[1], merged[3]],
        "goes": [merged[2]],
    }
    for model, found in answers.items():
        for answer in found:
            assert_answer(answer, *expected[model])
    assert_answer(ask(client, "changes"), merged[3])
    for name in ("stays", "changes", "new"):
        assert unload(client, name).status_code == 200
    assert_answer(ask(client, "base"), merged[-1])  # a step after which nothing is left
    assert backend.shards[0].adapters() == []


def broken(make: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[Path, Path], Path]:
    """An adapter that `make` has changed, config and tensors."""

    def write(good: Path, target: Path) -> Path:
        config, tensors = read_files(good)
        make(config, tensors)
        return write_files(target, config, tensors)

    return write


def config_with(**changes: Any) -> Callable[[Path, Path], Path]:
    return broken(lambda config, _: config.update(changes))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def tensor(name: str, *shape: int) -> Callable[[Path, Path], Path]:
    def change(_: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[name] = np.ones(shape, np.float32)

    return broken(change)


def without(name: str) -> Callable[[Path, Path], Path]:
    return broken(lambda _, tensors: tensors.pop(name))


def truncated(good: Path, target: Path) -> Path:
    config, tensors = read_files(good)
    write_files(target, config, tensors)
    file = target / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return target


def pickled(good: Path, target: Path) -> Path:
    config, tensors = read_files(good)
    write_files(target, config, tensors)
    (target / "adapter_model.safetensors").rename(target / "adapter_model.bin")
    return target


def no_json(good: Path, target: Path) -> Path:
    write_files(target, *read_files(good))
    (target / "adapter_config.json").write_text("{")
    return target


def poisoned(_: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors[f"{Q}A.weight"][0, 0] = np.nan


EXPERT = "base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_"
REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "rank": (
        lambda good, target: write_adapter(BASE, target, seed=1, rank=17),
        "rank 17 is above this server's limit of 16 (--max-lora-rank)",
    ),
    "another base's shapes": (
        lambda good, target: write_adapter(directory("gemma3"), target, seed=1),
        "(it was trained on gemma3)",
    ),
    "another family": (
        lambda good, target: write_adapter(directory("gpt2"), target, seed=1),
        "the model has no such linear layer (it was trained on gpt2)",
    ),
    "inputs": (tensor(f"{Q}A.weight", 4, 31), "the adapter is for 31 inputs and 32 outputs"),
    "A and B": (tensor(f"{Q}B.weight", 32, 5), "by adapter_config.json its rank is 4"),
    "half a pair": (without(f"{Q}B.weight"), "self_attn.q_proj has no lora_B.weight"),
    "no matrix": (tensor(f"{Q}A.weight", 4), "is no matrix of floats"),
    "unknown module": (
        broken(
            lambda _, tensors: tensors.update(
                {
                    f"base_model.model.model.layers.7.mlp.up_proj.lora_{letter}.weight": value
                    for letter, value in (("A", np.ones((4, 32))), ("B", np.ones((32, 4))))
                }
            )
        ),
        "model.layers.7.mlp.up_proj: the model has no such linear layer",
    ),
    "whole module": (tensor("base_model.model.lm_head.weight", 4, 4), "whole trained modules"),
    "embedding": (
        tensor("base_model.model.model.embed_tokens.lora_embedding_A", 4, 4),
        "adapters of embeddings are not supported",
    ),
    "not finite": (broken(poisoned), "values that are not finite"),
    "truncated": (truncated, "truncated"),
    "pickle": (pickled, "a pickle, which is never loaded"),
    "no JSON": (no_json, "not JSON"),
    "not LoRA": (config_with(peft_type="IA3"), "only LORA is supported"),
    "DoRA": (config_with(use_dora=True), "DoRA"),
    "modules_to_save": (config_with(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
    "bias": (config_with(bias="all"), "trained biases"),
    "PiSSA": (config_with(init_lora_weights="pissa_niter_4"), "changes the base's weights"),
    "unknown option": (config_with(use_magic=True), "use_magic is True: this option of PEFT"),
    "experts": (config_with(target_parameters=["experts.w"]), "target_parameters"),
    "no rank": (config_with(r="8"), "the rank is an integer"),
    "slow pattern": (config_with(alpha_pattern={"(a+)+b": 1}), "no simple regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused(
    case: str,
    server: tuple[httpx.Client, Backend],
    adapters: list[Path],
    merged: list[Any],
) -> None:
    client, backend = server
    make, message = REFUSED[case]
    target = adapters[0].parent / f"refused-{len(list(adapters[0].parent.iterdir()))}"
    answer = load(client, "bad", make(adapters[0], target))
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert not loaded(client)
    assert backend.shards[0].adapters() == []
    assert_answer(ask(client, "base"), merged[-1])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc", "not below a directory"),
        ("{root}/../..", "not below a directory"),
        ("{root}/link", "not below a directory"),
        ("org/name", "not below a directory"),
        ("{root}/nothing", "no such directory"),
        ("{root}/a\0b", "zero byte"),
        ("~nobody-of-this-name/a", "no path"),
        ("{root}/" + 300 * "a", "no path"),
        ("", "at least 1 character"),
    ],
)
def test_paths_outside_of_what_is_allowed_are_refused(
    path: str, message: str, server: tuple[httpx.Client, Backend], adapters: list[Path]
) -> None:
    client, _ = server
    root = adapters[0].parent
    if not (root / "link").is_symlink():
        (root / "link").symlink_to("/etc")
    answer = load(client, "bad", path.format(root=root))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_names_are_taken_once(server: tuple[httpx.Client, Backend], adapters: list[Path]) -> None:
    client, _ = server
    assert "base model's name" in load(client, "base", adapters[0]).text
    assert load(client, "one", adapters[0]).status_code == 200
    again = load(client, "one", adapters[1])
    assert again.status_code == 400
    assert "load_inplace" in again.json()["error"]["message"]
    assert loaded(client)["one"]["root"] == str(adapters[0])
    assert unload(client, "one").status_code == 200


def test_adapters_beyond_the_limit_are_refused(adapters: list[Path]) -> None:
    with (
        lora_server(BASE, max_cpu_loras=2) as (port, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        assert load(client, "a", adapters[0]).status_code == 200
        assert load(client, "b", adapters[1]).status_code == 200
        refused = load(client, "c", adapters[2])
        assert refused.status_code == 400
        assert "--max-cpu-loras" in refused.json()["error"]["message"]
        assert load(client, "b", adapters[2], load_inplace=True).status_code == 200
        assert unload(client, "a").status_code == 200
        assert load(client, "c", adapters[2]).status_code == 200


def test_all_engines_have_an_adapter_or_none(adapters: list[Path], merged: list[Any]) -> None:
    """Also those that came up after it was loaded, and those that one of them refuses."""
    with (
        lora_server(BASE, data_parallel_size=2) as (port, backend),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        first, late = backend.doors()
        adapter = Adapter("one", 1, str(adapters[0]))
        backend.call(first.load_adapter(adapter))  # before the other engine came up
        backend.call(first.publish_adapter(1))
        assert list(loaded(client)) == ["one"]
        assert [len(shard.adapters()) for shard in backend.shards] == [1, 0]
        with ThreadPoolExecutor(8) as pool:
            for answer in pool.map(lambda _: ask(client, "one"), range(8)):
                assert_answer(answer, merged[0])
        assert backend.call(late.list_adapters()) == [adapter]

        def full(adapter: Any) -> None:
            raise ValueError("no memory here")

        backend.shards[1].add_adapter = full  # type: ignore[method-assign]
        answer = load(client, "two", adapters[1])
        assert answer.status_code == 400
        assert "no memory here" in answer.json()["error"]["message"]
        assert list(loaded(client)) == ["one"]
        assert [each.name for each in backend.shards[0].adapters()] == ["one"]


def test_loading_is_off_unless_allowed(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(write_model(tmp_path / "tiny")) as (client, _):
            for verb in ("load", "unload"):
                answer = await client.post(f"/v1/{verb}_lora_adapter", json={"lora_name": "x"})
                assert answer.status_code == 404

    asyncio.run(check())


def test_loading_needs_the_key(adapters: list[Path]) -> None:
    with (
        lora_server(BASE, api_key=["secret"]) as (port, _),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):
        assert load(client, "one", adapters[0]).status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert load(client, "one", adapters[0]).status_code == 200
