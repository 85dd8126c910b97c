"""The frontend: what may be asked, what the engine is told, and what comes back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import tokenizers as small
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorray.actors.protocol import Logprobs
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import (
    MAX_PROMPT_LOGPROBS,
    Frontend,
    GenerationFailed,
    PreparedRequest,
)
from tensorray.cluster.outputs import CompletionOutput, RequestOutput, RequestOutputDelta
from tensorray.cluster.request import Delta, GenerationRequest
from tensorray.cluster.sampling_params import SamplingParams

MODELS = Path(__file__).parent / "fixtures" / "models"
TOKENIZER = small.byte_level("{{ bos_token }}{{ messages[0].content }}<|im_end|>")
EOS = TOKENIZER.eos_ids[0]
VOCAB = TOKENIZER.vocab_size


def frontend(**changes: Any) -> Frontend:
    settings: dict[str, Any] = {
        "model_names": ["tiny"],
        "max_model_len": 64,
        "vocab_size": VOCAB + 3,
        "eos_token_ids": [EOS],
        **changes,
    }
    return Frontend(TOKENIZER, **settings)


def prepare(prompt: str | list[int] = "Hello", *, echo: bool = False, **fields: Any) -> Any:
    front = frontend()
    return front, front.request(prompt, front.params(**fields), request_id="r", echo=echo)


def tokens(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class Replay:
    """An engine that sends what it was given, and remembers what it was told."""

    def __init__(self, *items: Sequence[Delta]) -> None:
        self.items = items
        self.cancelled: list[tuple[str, int | None]] = []
        self.sent = 0
        self.closed = False

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        try:
            for item in self.items:
                self.sent += 1
                yield [
                    Delta(**{name: getattr(delta, name) for name in delta.__struct_fields__})
                    for delta in item
                ]
                await asyncio.sleep(0)
        finally:
            self.closed = True

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        self.cancelled.append((request_id, index))


def collect(front: Frontend, prepared: PreparedRequest, engine: Replay) -> RequestOutput:
    return asyncio.run(front.collect(engine, prepared))


def stream(front: Frontend, prepared: PreparedRequest, engine: Replay) -> list[RequestOutputDelta]:
    async def run() -> list[RequestOutputDelta]:
        return [delta async for delta in front.stream(engine, prepared)]

    return asyncio.run(run())


def logprobs(token: int, logprob: float = -0.5, top: Sequence[int] = ()) -> Logprobs:
    return Logprobs(token, logprob, 1, list(top), [-0.25 * (i + 1) for i in range(len(top))])


# --- loading ----------------------------------------------------------------------------------


def test_load_reads_no_weights(tmp_path: Path) -> None:
    for file in (MODELS / "llama3").iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    generation = {
        "eos_token_id": [1, 3],
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": None,
        "max_new_tokens": 7,
        "do_sample": True,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    front = Frontend.load(EngineConfig(model=str(tmp_path), seed=3))
    config = json.loads((tmp_path / "config.json").read_text())
    assert front.vocab_size == config["vocab_size"]
    assert front.max_model_len == config["max_position_embeddings"]
    assert front.model_names == [tmp_path.name]
    assert front.eos_token_ids == [1, 3]
    assert front.default_params == {"temperature": 0.6, "top_p": 0.9}
    assert front.params().temperature == 0.6
    assert front.params(temperature=0.1).temperature == 0.1
    prepared = front.request("hi", front.params(), request_id="r")
    assert prepared.request.max_tokens == 7
    assert prepared.request.sampling.stop_token_ids == [1, 3]
    assert front.chat([{"role": "user", "content": "hi"}])[:2] == [0, 2]

    plain = Frontend.load(EngineConfig(model=str(tmp_path), generation_config="vllm"))
    assert plain.default_params == {}
    assert plain.eos_token_ids == [1, 3]
    named = Frontend.load(
        EngineConfig(model=str(tmp_path), served_model_name=["a", "b"], max_model_len=16)
    )
    assert (named.model_names, named.max_model_len) == (["a", "b"], 16)


def test_generation_defaults_from_another_directory(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25}')
    model = str(MODELS / "llama3")
    front = Frontend.load(EngineConfig(model=model, generation_config=str(tmp_path)))
    assert front.default_params == {"temperature": 0.25}
    with pytest.raises(ValueError, match="neither auto nor vllm nor a directory"):
        Frontend.load(EngineConfig(model=model, generation_config="nowhere"))


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODELS / "llama3" / name).read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<|end|>"', '"<|user|>"'))
    front = Frontend.load(EngineConfig(model=str(MODELS / "llama3"), tokenizer=str(tmp_path)))
    assert front.tokenizer.eos_ids == (2,)


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match="--max-model-len 1000 is more than the 256 positions"):
        Frontend.load(EngineConfig(model=str(MODELS / "llama3"), max_model_len=1000))


# --- requests ---------------------------------------------------------------------------------


def test_a_request_is_resolved() -> None:
    _, prepared = prepare("Hello world", max_tokens=5, temperature=0.5, seed=9, n=2, top_k=-1)
    request = prepared.request
    assert request.prompt == [TOKENIZER.bos_id, *tokens("Hello world")]
    assert (request.max_tokens, request.n) == (5, 2)
    assert request.sampling.temperature == 0.5
    assert (request.sampling.seed, request.sampling.top_k) == (9, 0)
    assert request.sampling.stop_token_ids == [EOS]
    assert request.reuse_prefix
    assert prepared.prompt == "Hello world"


def test_max_tokens_may_fill_the_context() -> None:
    _, prepared = prepare(tokens("Hello"))
    assert prepared.request.prompt == tokens("Hello")
    assert prepared.prompt is None
    assert prepared.request.max_tokens == 63
    assert prepare([5] * 63)[1].request.max_tokens == 1
    assert prepare([5] * 63, max_tokens=1)[1].request.max_tokens == 1


def test_stop_tokens_and_ignored_eos() -> None:
    stop = prepare(stop_token_ids=[5, EOS, 5])[1].request.sampling.stop_token_ids
    assert stop == [5, EOS]
    assert prepare(ignore_eos=True)[1].request.sampling.stop_token_ids == []


def test_special_tokens_of_a_prompt_are_the_callers_choice() -> None:
    front = frontend()
    prepared = front.request("a", front.params(), request_id="r", add_special_tokens=False)
    assert prepared.request.prompt == tokens("a")
    assert EOS not in front.request("<|im_end|>", front.params(), request_id="r").request.prompt


def test_fields_for_admission_are_passed_on() -> None:
    front = frontend()
    request = front.request(
        "a", front.params(), request_id="r7", priority=-2, user="u", cache_salt="s"
    ).request
    assert (request.request_id, request.priority) == ("r7", -2)
    assert (request.user, request.cache_salt) == ("u", "s")


def test_prompt_logprobs_need_every_row() -> None:
    request = prepare(prompt_logprobs=2)[1].request
    assert not request.reuse_prefix
    assert request.sampling.prompt_logprobs == 2
    request = prepare(logprobs=3, echo=True)[1].request
    assert not request.reuse_prefix
    assert (request.sampling.prompt_logprobs, request.sampling.logprobs) == (3, 3)
    assert prepare(echo=True)[1].request.reuse_prefix


def test_seeds() -> None:
    def seeds(front: Frontend) -> list[int]:
        return [
            front.request("a", front.params(), request_id="r").request.sampling.seed
            for _ in range(3)
        ]

    assert len(set(seeds(frontend()))) == 3
    assert seeds(frontend(seed=1)) == seeds(frontend(seed=1)) != seeds(frontend(seed=2))
    assert len(set(seeds(frontend(seed=1)))) == 3


@pytest.mark.parametrize(
    ("prompt", "fields", "message", "param"),
    [
        ("", {}, "the prompt is empty", "prompt"),
        ([], {}, "the prompt is empty", "prompt"),
        ("a\ud800", {}, "the prompt can't be encoded: .*surrogate", "prompt"),
        ([-1], {}, f"token -1; this model's tokens are 0 to {VOCAB + 2}", "prompt"),
        ([0, VOCAB + 3], {}, f"token {VOCAB + 3}; this", "prompt"),
        ([True], {}, "token True", "prompt"),
        (["a"], {}, "token 'a'", "prompt"),
        ([5] * 64, {}, "too long: 64 tokens, but the context is 64", "prompt"),
        ([5] * 900, {"max_tokens": 1}, "too long: 900 tokens, but the context is 64", "prompt"),
        (
            [5] * 60,
            {"max_tokens": 5},
            "60 tokens of prompt and 5 of answer exceed the context of 64 tokens; "
            "ask for at most 4",
            "max_tokens",
        ),
        ([5] * 60, {"min_tokens": 5}, r"min_tokens \(5\) exceeds the 4", "min_tokens"),
        ("a", {"n": 9}, r"n \(9\) is more than this server's limit of 4", "n"),
        ("a", {"best_of": 9}, r"best_of \(9\) is more than", "best_of"),
        ("a", {"logprobs": 9}, r"logprobs \(9\) asks for more .* limit of 5", "logprobs"),
        ("a", {"logprobs": -1}, r"logprobs \(-1\) asks for more", "logprobs"),
        ("a", {"prompt_logprobs": 6}, r"prompt_logprobs \(6\) asks", "prompt_logprobs"),
        ("a", {"stop": ["x"], "detokenize": False}, "stop strings need text", "stop"),
        ("a", {"logit_bias": {VOCAB + 9: 1.0}}, "logit_bias names token", "logit_bias"),
        ("a", {"stop_token_ids": [-1]}, "stop_token_ids names token -1", "stop_token_ids"),
        ("a", {"banned_token_ids": [9999]}, "banned_token_ids names", "banned_token_ids"),
        ("a", {"allowed_token_ids": [9999]}, "allowed_token_ids names", "allowed_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused(
    prompt: Any, fields: dict[str, Any], message: str, param: str
) -> None:
    front = frontend(max_n=4, max_logprobs=5)
    with pytest.raises(BadRequest, match=message) as caught:
        front.request(prompt, front.params(**fields), request_id="r")
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_bad_parameters_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        frontend().params(**fields)
    assert caught.value.param == param


def test_all_logprobs_where_the_server_allows_it() -> None:
    front = frontend(max_logprobs=-1)
    prepared = front.request("a", front.params(logprobs=-1), request_id="r")
    assert prepared.request.sampling.logprobs == -1


def test_chat_becomes_prompt_tokens() -> None:
    front = frontend()
    prompt = front.chat([{"role": "user", "content": "Hello<|im_end|>"}])
    assert prompt == [TOKENIZER.bos_id, *tokens("Hello<|im_end|>"), EOS]


# --- answers ----------------------------------------------------------------------------------


def test_a_whole_answer() -> None:
    front, prepared = prepare("Hello")
    engine = Replay(
        [Delta(0, tokens(" wor"), cached_tokens=1)],
        [Delta(0, [*tokens("ld"), EOS], finish_reason="stop", stop_token=EOS)],
    )
    output = collect(front, prepared, engine)
    assert output.request_id == "r"
    assert (output.prompt, output.prompt_token_ids) == ("Hello", prepared.request.prompt)
    expected = [*tokens(" wor"), *tokens("ld"), EOS]
    assert output.outputs == [CompletionOutput(0, " world", expected, finish_reason="stop")]
    assert output.finished
    assert (output.usage.prompt_tokens, output.usage.cached_tokens) == (2, 1)
    assert output.usage.completion_tokens == len(expected)
    assert output.num_cached_tokens == 1
    assert engine.closed
    assert engine.cancelled == []


def test_a_stream_has_one_item_for_each_the_engine_sends() -> None:
    front, prepared = prepare(n=2)
    engine = Replay(
        [Delta(0, tokens("a")), Delta(1, tokens("b"))],
        [Delta(1, tokens("the"), finish_reason="length")],
        [Delta(0, [], finish_reason="abort")],
        [Delta(0, tokens("never seen"))],
    )
    deltas = stream(front, prepared, engine)
    assert [[(o.index, o.text, o.finish_reason) for o in d.outputs] for d in deltas] == [
        [(0, "a", None), (1, "b", None)],
        [(1, "the", "length")],
        [(0, "", "abort")],
    ]
    assert [delta.finished for delta in deltas] == [False, False, True]
    assert [delta.usage.completion_tokens for delta in deltas] == [2, 3, 3]
    assert engine.sent == 3  # an answer that is whole reads no further


def test_characters_are_whole() -> None:
    front, prepared = prepare()
    first, *rest = [[token] for token in tokens("世")]
    engine = Replay(
        [Delta(0, first)],
        *[[Delta(0, token)] for token in rest],
        [Delta(0, first, finish_reason="length")],
    )
    deltas = stream(front, prepared, engine)
    assert [d.outputs[0].text for d in deltas] == ["", "", "世", "�"]
    assert sum(len(d.outputs[0].token_ids) for d in deltas) == 4


def test_a_stop_string_ends_one_sequence_and_tells_the_engine() -> None:
    front, prepared = prepare(n=2, stop=["o wo"])
    engine = Replay(
        [Delta(0, tokens("Hello")), Delta(1, tokens("the"))],
        [Delta(0, tokens(" world")), Delta(1, tokens(" the"))],
        [Delta(0, tokens(" late")), Delta(1, tokens("a"))],
        [Delta(0, [], finish_reason="abort"), Delta(1, tokens("b"), finish_reason="length")],
    )
    output = collect(front, prepared, engine)
    first, second = output.outputs
    assert (first.text, first.finish_reason, first.stop_reason) == ("Hell", "stop", "o wo")
    assert first.token_ids == tokens("Hello world")
    assert (second.text, second.finish_reason) == ("the theab", "length")
    assert engine.cancelled == [("r", 0)]
    assert output.usage.completion_tokens == 2 + len(second.token_ids)


def test_a_stop_string_of_the_last_sequence_closes_the_stream() -> None:
    front, prepared = prepare(stop="the")
    engine = Replay([Delta(0, tokens("a the end"))], [Delta(0, tokens("more"))])
    output = collect(front, prepared, engine).outputs[0]
    assert (output.text, output.stop_reason) == ("a ", "the")
    assert output.token_ids == tokens("a the")
    assert engine.sent == 1
    assert engine.closed


def test_a_stop_string_may_be_part_of_the_answer() -> None:
    front, prepared = prepare(stop=["the"], include_stop_str_in_output=True)
    engine = Replay([Delta(0, tokens("a the end"))])
    assert collect(front, prepared, engine).outputs[0].text == "a the"


def test_held_back_text_comes_at_the_end() -> None:
    front, prepared = prepare(stop=["worlds"])
    engine = Replay(
        [Delta(0, tokens("Hello world"))], [Delta(0, [EOS], finish_reason="stop", stop_token=EOS)]
    )
    deltas = stream(front, prepared, engine)
    assert [d.outputs[0].text for d in deltas] == ["Hello ", "world"]


def test_min_tokens_keep_stop_strings_from_ending_the_answer() -> None:
    front, prepared = prepare(stop=["the"], min_tokens=2)
    engine = Replay([Delta(0, tokens("the the the the"))])
    output = collect(front, prepared, engine).outputs[0]
    assert output.text == "the "
    assert output.token_ids == tokens("the the")


@pytest.mark.parametrize(
    ("fields", "text", "stop_reason"),
    [
        ({"stop_token_ids": [tokens("a")[0]]}, "the", tokens("a")[0]),
        (
            {"stop_token_ids": [tokens("a")[0]], "include_stop_str_in_output": True},
            "thea",
            tokens("a")[0],
        ),
    ],
)
def test_a_stop_token_is_no_text_but_a_token(
    fields: dict[str, Any], text: str, stop_reason: int
) -> None:
    front, prepared = prepare(**fields)
    ids = tokens("thea")
    engine = Replay([Delta(0, ids, finish_reason="stop", stop_token=ids[-1])])
    output = collect(front, prepared, engine).outputs[0]
    assert (output.text, output.token_ids) == (text, ids)
    assert (output.finish_reason, output.stop_reason) == ("stop", stop_reason)


def test_special_tokens_in_the_answer() -> None:
    for skip, text in ((True, "ab"), (False, "a<|im_start|>b")):
        front, prepared = prepare(skip_special_tokens=skip)
        ids = TOKENIZER.encode("a<|im_start|>b", add_special_tokens=False, parse_special=True)
        engine = Replay([Delta(0, ids, finish_reason="length")])
        assert collect(front, prepared, engine).outputs[0].text == text


def test_tokens_without_text() -> None:
    front, prepared = prepare(detokenize=False, echo=True)
    engine = Replay([Delta(0, tokens("the"), finish_reason="length")])
    output = collect(front, prepared, engine).outputs[0]
    assert output.text == ""
    assert output.token_ids == [*prepared.request.prompt, *tokens("the")]


def test_logprobs_are_spelled_out() -> None:
    front, prepared = prepare(logprobs=2)
    a, the, half = tokens("a")[0], tokens("the")[0], tokens("世")[0]
    engine = Replay(
        [Delta(0, [a], [logprobs(a, -1.5, [the, a])])],
        [Delta(0, [half], [logprobs(half, -2.0, [half, a])], finish_reason="length")],
    )
    output = collect(front, prepared, engine).outputs[0]
    assert output.cumulative_logprob == -3.5
    assert output.logprobs is not None
    first, second = output.logprobs
    assert first is not None
    assert (first.token_id, first.text, first.bytes, first.logprob) == (a, "a", b"a", -1.5)
    assert [(top.text, top.logprob, top.rank) for top in first.top] == [
        ("the", -0.25, 1),
        ("a", -0.5, 2),
    ]
    assert second is not None
    assert (second.text, second.bytes) == ("�", b"\xe4")


def test_logprobs_end_where_the_tokens_do() -> None:
    front, prepared = prepare(logprobs=0, stop=["the"])
    ids = tokens("a the end")
    engine = Replay([Delta(0, ids, [logprobs(token) for token in ids])])
    output = collect(front, prepared, engine).outputs[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids) == 3 < len(ids)
    assert output.cumulative_logprob == -1.5


def test_prompt_logprobs_come_once_all_are_known() -> None:
    front, prepared = prepare("the end", prompt_logprobs=0, n=2)
    prompt = prepared.request.prompt
    assert len(prompt) > 3
    spelled = [logprobs(token) for token in prompt[1:]]
    engine = Replay(
        [Delta(0, [], prompt_logprobs=spelled[:1])],
        [Delta(0, tokens("a"), prompt_logprobs=spelled[1:]), Delta(1, tokens("a"))],
        [Delta(0, [], finish_reason="length"), Delta(1, [], finish_reason="length")],
    )
    deltas = stream(front, prepared, engine)
    assert [d.prompt_logprobs is None for d in deltas] == [False, True]
    known = collect(front, prepared, engine).prompt_logprobs
    assert known is not None
    assert [entry and entry.token_id for entry in known] == [None, *prompt[1:]]


def test_echo_puts_the_prompt_before_the_answer() -> None:
    front, prepared = prepare("the end", echo=True, logprobs=0, n=2)
    prompt = prepared.request.prompt
    a = tokens("a")[0]
    engine = Replay(
        [Delta(0, [a], [logprobs(a)], [logprobs(token) for token in prompt[1:]])],
        [Delta(1, [a], [logprobs(a)]), Delta(0, [a], [logprobs(a)], finish_reason="length")],
        [Delta(1, [], finish_reason="length")],
    )
    deltas = stream(front, prepared, engine)
    assert [[o.text for o in d.outputs] for d in deltas] == [["the enda"], ["the enda", "a"], [""]]
    for output in collect(front, prepared, engine).outputs:
        count = 2 if output.index == 0 else 1
        assert output.token_ids == [*prompt, *[a] * count]
        assert output.logprobs is not None
        assert [entry and entry.token_id for entry in output.logprobs] == [
            None,
            *prompt[1:],
            *[a] * count,
        ]
        assert output.cumulative_logprob == -0.5 * count


def test_echo_of_token_ids_is_their_text() -> None:
    front, prepared = prepare(TOKENIZER.encode("the"), echo=True)
    engine = Replay([Delta(0, tokens("a"), finish_reason="length")])
    assert collect(front, prepared, engine).outputs[0].text == "thea"


def test_best_of_returns_the_likeliest_per_token() -> None:
    front, prepared = prepare(n=2, best_of=3)
    assert prepared.request.n == 3
    assert prepared.request.sampling.logprobs == 0
    a = tokens("a")[0]
    ends = {0: [-1.0], 1: [-0.6, -0.6], 2: [-0.5, -1.1]}
    engine = Replay(
        [
            Delta(i, [a] * len(each), [logprobs(a, p) for p in each], finish_reason="length")
            for i, each in ends.items()
        ]
    )
    output = collect(front, prepared, engine)
    assert [len(each.token_ids) for each in output.outputs] == [2, 2]
    assert [each.index for each in output.outputs] == [0, 1]
    assert all(each.logprobs is None for each in output.outputs)
    assert output.usage.completion_tokens == 5
    front, prepared = prepare(n=2, best_of=3, logprobs=0)
    sums = [each.cumulative_logprob for each in collect(front, prepared, engine).outputs]
    assert sums == [-1.2, -1.6]


def test_best_of_cannot_be_streamed() -> None:
    front, prepared = prepare(best_of=2)
    with pytest.raises(BadRequest, match=r"best_of \(2\) with n \(1\) can't be streamed"):
        front.stream(Replay(), prepared)
    front, prepared = prepare(best_of=2, n=2)
    front.stream(Replay(), prepared)


def test_an_engines_error_is_raised() -> None:
    front, prepared = prepare()
    engine = Replay([Delta(0, [], finish_reason="error", error="the logits are not finite")])
    with pytest.raises(GenerationFailed, match="the logits are not finite"):
        collect(front, prepared, engine)
    assert engine.closed


def test_leaving_a_stream_closes_the_engines() -> None:
    front, prepared = prepare()
    engine = Replay(*[[Delta(0, tokens("a"))]] * 9)

    async def run() -> None:
        deltas = front.stream(engine, prepared)
        async for _ in deltas:
            break
        await deltas.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())
    assert engine.closed
    assert engine.sent == 1


def test_cancelling_collect_closes_the_engines_stream() -> None:
    front, prepared = prepare()
    engine = Replay(*[[Delta(0, tokens("a"))]] * 9)

    async def run() -> None:
        task = asyncio.ensure_future(front.collect(engine, prepared))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert engine.closed
    assert 0 < engine.sent < 9


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(["Hello", " world", "the", "世", "a", "<|"]), min_size=1, max_size=10),
    st.lists(st.integers(1, 4), min_size=30, max_size=30),
    st.sampled_from([[], ["world"], ["e", "lo"], ["世a"]]),
    st.booleans(),
)
def test_however_deltas_are_coalesced_the_answer_is_the_same(
    words: list[str], sizes: list[int], stop: list[str], echo: bool
) -> None:
    front, prepared = prepare("the", stop=stop, logprobs=0, echo=echo)
    ids = tokens("".join(words))
    spelled = [logprobs(token, -float(i)) for i, token in enumerate(ids)]

    def replay(sizes: list[int]) -> Replay:
        items, start = [], 0
        for size in sizes:
            if start < len(ids):
                end = start + size
                items.append([Delta(0, ids[start:end], spelled[start:end])])
                start = end
        return Replay(*items, [Delta(0, [], finish_reason="length")])

    one_by_one = collect(front, prepared, replay([1] * len(ids)))
    assert collect(front, prepared, replay(sizes * len(ids))) == one_by_one
    streamed = stream(front, prepared, replay(sizes * len(ids)))
    parts = [output for delta in streamed for output in delta.outputs]
    assert "".join(part.text for part in parts) == one_by_one.outputs[0].text
    assert streamed[-1].usage == one_by_one.usage
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)


def test_defaults_apply_to_sampling_params_of_the_user() -> None:
    front = frontend(default_params={"temperature": 0.2, "top_k": 9})
    assert front.params(top_k=3) == SamplingParams(temperature=0.2, top_k=3)


def test_more_prompt_logprobs_than_one_answer_holds_are_refused() -> None:
    front = frontend(max_logprobs=-1, max_model_len=20_000)
    rows = MAX_PROMPT_LOGPROBS // front.vocab_size
    for options in ({"prompt_logprobs": -1}, {"logprobs": -1, "echo": True}):
        echo = bool(options.get("echo"))
        fields = {name: value for name, value in options.items() if name != "echo"}
        params = front.params(max_tokens=1, **fields)
        front.request([5] * rows, params, request_id="x", echo=echo)
        with pytest.raises(BadRequest, match="is the most of one request") as refused:
            front.request([5] * (rows + 1), params, request_id="x", echo=echo)
        assert refused.value.param == next(iter(fields))
