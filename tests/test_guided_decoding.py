"""Guided decoding: whatever the model would rather say, the text follows the grammar."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from helpers.gpu_shards import StepwiseShard, make_gpu_shard
from helpers.host_device import HostDevice
from helpers.json_schemas import Schema, schemas
from helpers.null_engine import write_model
from helpers.running import Arrival, make_shard, run
from helpers.tiny_models import directory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.guidance import Guidance, NoEndToken, Vocabulary, compile_vocabulary
from tensorray.actors.link import PendingStep
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan, StepResult
from tensorray.actors.sampler import Sampler
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.llm import LLM, SamplingParams
from tensorray.cluster.scheduler import Scheduler
from tensorray.cluster.structured_outputs import StructuredOutputs
from tensorray.cluster.vocabulary import load_vocabulary

MODEL = "qwen3"
#: Schemas tried: ten an example. `make soak` asks for 500.
EXAMPLES = int(os.environ.get("TENSORRAY_SOAK_SCHEMAS", "50")) // 10
#: Towards short answers: "Ġ" is the tokenizer's spelling of a space.
LEANINGS = {'"': 3.0, "}": 2.0, "]": 2.0, "Ġ": -3.0, "</s>": 6.0}
DATE = {"type": "object", "properties": {"day": {"type": "integer"}}, "required": ["day"]}


@pytest.fixture(scope="module")
def known() -> Vocabulary:
    return load_vocabulary(EngineConfig(model=str(directory(MODEL))))


@pytest.fixture(scope="module")
def guidance(known: Vocabulary) -> Guidance:
    return Guidance(lambda: known, 272)


def text_of(known: Vocabulary, tokens: list[int]) -> str:
    ended = tokens[-1] in known.ends
    return b"".join(known.tokens[token] for token in tokens[: len(tokens) - ended]).decode()


def start(seq: int, sampling: Sampling, outputs: list[int] | None = None) -> SequenceStart:
    return SequenceStart(
        seq=seq,
        tokens=[5, 6, *(outputs or [])],
        prompt_len=2,
        computed=0,
        blocks=[],
        sampling=sampling,
    )


def guided(seed: int = 0, **spelled: Any) -> Sampling:
    grammar = StructuredOutputs(**spelled).compiled()
    return Sampling(seed=seed, grammar=grammar, stop_token_ids=[1])


@pytest.mark.parametrize(
    ("spelled", "pattern"),
    [
        ({"regex": "^[0-9]{3}-[a-f]{2}$"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["yes", "no", 'a "b" \n/*']}, r'yes|no|a "b" \n/\*'),
        ({"grammar": 'start: "x" NUMBER\nNUMBER: /[0-9]{2}/'}, r"x\d{2}"),
        ({"grammar": 'root ::= "x" [0-9] [0-9]'}, r"x\d{2}"),
    ],
)
def test_a_sampler_chooses_what_the_grammar_allows(
    guidance: Guidance, known: Vocabulary, spelled: dict[str, Any], pattern: str
) -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        sampler, tokens = Sampler(272, guidance), []
        sampler.start(start(0, guided(seed, **spelled)))
        while not tokens or tokens[-1] not in known.ends:
            logits = rng.normal(0, 3, (1, 272)).astype(np.float32)
            (token,), _, failed = sampler.sample([0], logits)
            assert not failed
            tokens.append(token)
            assert len(tokens) < 20
        assert re.fullmatch(pattern, text_of(known, tokens))


def test_a_sequence_that_starts_again_goes_on_in_its_grammar(
    guidance: Guidance, known: Vocabulary
) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (40, 1, 272)).astype(np.float32)
    sampling = guided(3, regex="[a-z]{12}!")
    straight, broken = Sampler(272, guidance), Sampler(272, guidance)
    straight.start(start(0, sampling))
    tokens: list[int] = []
    for row in logits[:14]:
        broken = Sampler(272, guidance)  # on another shard
        broken.start(start(7, sampling, tokens))
        (token,), _, _ = straight.sample([0], row)
        assert broken.sample([7], row)[0] == [token]
        tokens.append(token)
        if token in known.ends:
            break
    assert re.fullmatch("[a-z]{12}!", text_of(known, tokens))


def test_the_rest_of_a_batch_is_left_alone(guidance: Guidance) -> None:
    logits = np.random.default_rng(2).normal(0, 3, (3, 272)).astype(np.float32)
    alone, mixed = Sampler(272), Sampler(272, guidance)
    for sampler, seqs in ((alone, [0, 2]), (mixed, [0, 1, 2])):
        for seq in seqs:
            sampling = guided(1, choice=["yes"]) if seq == 1 else Sampling(seed=seq)
            sampler.start(start(seq, sampling))
    expected = alone.sample([0, 2], logits[[0, 2]])[0]
    found = mixed.sample([0, 1, 2], logits)[0]
    assert [found[0], found[2]] == expected


def test_without_a_vocabulary_a_guided_sequence_fails() -> None:
    logits = np.zeros((1, 272), np.float32)
    sampler, device = Sampler(272), DeviceSampler(HostDevice(), 272, 2)
    sampler.start(start(0, guided(regex="a")))
    device.start(start(0, guided(regex="a")), 0)
    assert "vocabulary" in sampler.sample([0], logits)[2][0]
    tokens, _, failed = device.collect(device.enqueue([0], np.zeros(1, np.int32), logits))
    assert tokens == [-1]
    assert "vocabulary" in failed[0]


def test_bans_that_leave_nothing_of_a_grammar_fail(guidance: Guidance, known: Vocabulary) -> None:
    yes = [id for id, data in enumerate(known.tokens) if data[:1] == b"y"]
    sampler = Sampler(272, guidance)
    grammar = StructuredOutputs(choice=["yes"]).compiled()
    sampler.start(start(0, Sampling(grammar=grammar, banned_token_ids=yes)))
    assert "grammar" in sampler.sample([0], np.zeros((1, 272), np.float32))[2][0]


def test_the_device_sampler_follows_grammars_with_steps_in_flight(
    guidance: Guidance, known: Vocabulary
) -> None:
    """The second step is queued before the first is collected, as a pipelined shard does."""
    host = Sampler(272, guidance)
    device = DeviceSampler(HostDevice(), 272, 4, None, guidance)
    samplings = [guided(4, regex="[a-m]{5}"), Sampling(seed=5), guided(6, json=DATE)]
    for seq, sampling in enumerate(samplings):
        host.start(start(seq, sampling))
        device.start(start(seq, sampling), seq + 1)
    rng, rows = np.random.default_rng(3), np.array([1, 2, 3], np.int32)
    steps = rng.normal(0, 3, (6, 3, 272)).astype(np.float32)
    expected = [host.sample([0, 1, 2], logits)[0] for logits in steps]
    assert expected[5][0] in known.ends
    found, under_way = [], []
    for logits in steps:
        under_way.append(device.enqueue([0, 1, 2], rows, logits))
        if len(under_way) == 2:
            found.append(device.collect(under_way.pop(0))[0])
    found.append(device.collect(under_way.pop())[0])
    assert found == expected


class _Ahead:
    """A shard whose results are read once the next step was started."""

    def __init__(self, shard: GpuShard) -> None:
        self.info = shard.info
        self._shard = shard

    def execute(self, plan: StepPlan) -> StepResult:
        return _Late(self._shard.submit(plan))  # type: ignore[return-value]


class _Late:
    """A step's result, which waits when it is looked at."""

    def __init__(self, pending: PendingStep) -> None:
        self._pending = pending
        self._result: StepResult | None = None

    def __getattr__(self, name: str) -> Any:
        self._result = self._result or self._pending()
        return getattr(self._result, name)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [200, 20])
def test_both_shards_write_the_same_text(known: Vocabulary, depth: int, num_blocks: int) -> None:
    """With few blocks sequences are preempted, and computed again, in the middle of a grammar."""
    arrivals = []
    for i in range(8):
        sampling = Sampling(seed=i, temperature=0.9)
        if i % 4:
            sampling = guided(i, json=DATE) if i % 2 else guided(i, regex="([a-z]{4} ){3}")
        arrivals.append(Arrival(i // 3, [*range(3, 20), i + 20], sampling, 24))
    path = directory(MODEL)

    def scheduler(shard: Any) -> Scheduler:
        return Scheduler(shard.info.kv, max_model_len=64, max_num_seqs=8, max_num_batched_tokens=40)

    cpu = make_shard(path, num_blocks=num_blocks, vocabulary=lambda: known)
    gpu = make_gpu_shard(path, num_blocks=num_blocks, vocabulary=lambda: known, kind=StepwiseShard)
    books = scheduler(cpu)
    expected = run(cpu, books, arrivals)
    assert (books.stats().preemptions > 0) == (num_blocks == 20)
    driven: Any = _Ahead(gpu) if depth == 2 else gpu
    found = run(driven, scheduler(gpu), arrivals, depth=depth)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    for i, outcome in enumerate(found):
        if i % 4 and outcome.finish_reason == "stop":
            text = text_of(known, outcome.tokens)
            assert json.loads(text)["day"] is not None if i % 2 else len(text) == 15
    assert any(found[i].finish_reason == "stop" for i in (2, 6))


def test_the_vocabulary_is_there_before_the_first_grammar(known: Vocabulary) -> None:
    loads: list[int] = []

    def load() -> Vocabulary:
        loads.append(threading.get_ident())
        return known

    ahead = Guidance(load, 272, quiet=0.0)
    ahead.prepare().join(60)
    assert len(loads) == 1
    assert not ahead.guide(StructuredOutputs(regex="a").compiled(), []).error
    assert len(loads) == 1
    busy = Guidance(load, 272, quiet=3600.0)  # steps all the time
    busy.prepare()
    assert not busy.guide(StructuredOutputs(regex="a").compiled(), []).error
    assert len(loads) == 2


def test_sequences_of_one_grammar_are_each_at_a_place_of_their_own(known: Vocabulary) -> None:
    guidance = Guidance(lambda: known, 272)
    grammar = StructuredOutputs(choice=["ab", "ac"]).compiled()
    begun = known.encode(b"a")
    for _ in range(2):
        ahead, behind = guidance.guide(grammar, begun), guidance.guide(grammar, [])
        after, before = guidance.masks([ahead, behind])
        assert (after != before).any()
        assert (guidance.masks([guidance.guide(grammar, [])]) == before).all()
    for number in range(40):  # more than are kept
        other = StructuredOutputs(choice=[f"{number}"]).compiled()
        assert (guidance.masks([guidance.guide(other, [])]) != before).any()
    assert (guidance.masks([guidance.guide(grammar, begun)]) == after).all()


def test_a_vocabulary_that_does_not_load_fails_its_sequences_only() -> None:
    def load() -> Vocabulary:
        raise OSError("no such file")

    guidance = Guidance(load, 272, quiet=0.0)
    guidance.prepare().join(60)
    with pytest.raises(OSError, match="no such file"):
        _ = guidance.guide(StructuredOutputs(regex="a").compiled(), []).error


# --- schemas of all kinds ---


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Random weights over a tokenizer of bytes: a model with no notion of JSON."""
    path = write_model(tmp_path_factory.mktemp("model"), chat_template=None)
    longer = {"max_position_embeddings": 512}
    with LLM(
        str(path), load_format="dummy", device="cpu", hf_overrides=longer, max_num_seqs=16
    ) as llm:
        yield llm


def completions(llm: LLM, wanted: list[Schema], seed: int) -> Iterator[tuple[Schema, str, bool]]:
    """The text that each schema got, and whether it was complete."""
    spelled = llm.frontend.tokenizer.token_to_id
    ending = {spelled(text) or 0: bias for text, bias in LEANINGS.items()}
    params = [
        SamplingParams(
            structured_outputs=StructuredOutputs(json=schema),
            max_tokens=256,
            seed=seed + i,
            logit_bias=ending,
        )
        for i, schema in enumerate(wanted)
    ]
    for schema, answer in zip(wanted, llm.generate(["a"] * len(wanted), params), strict=True):
        (output,) = answer.outputs
        yield schema, output.text, output.finish_reason == "stop"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(st.lists(schemas, min_size=10, max_size=10), st.integers(0, 2**31))
def test_what_ends_is_valid(llm: LLM, wanted: list[Schema], seed: int) -> None:
    complete = 0
    for schema, text, ended in completions(llm, wanted, seed):
        if ended:
            complete += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        else:
            assert len(text.encode()) >= 200  # so it was the limit that ended it
    assert complete >= 4


def test_a_grammar_of_any_length_is_not_compiled() -> None:
    with pytest.raises(BadRequest, match="too many"):
        StructuredOutputs(regex="a" * 300_000).compiled()


def test_llm_takes_every_spelling(llm: LLM) -> None:
    kinds: list[tuple[dict[str, Any], str]] = [
        ({"json_object": True}, r"(?s)\s*\{.*"),
        ({"json": json.dumps({"enum": [12]})}, r"\s*12"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"regex": "[xy]{3}"}, "[xy]{3}"),
    ]
    params = [
        SamplingParams(structured_outputs=StructuredOutputs(**spelled), max_tokens=30, seed=1)
        for spelled, _ in kinds
    ]
    for answer, (_, pattern) in zip(llm.generate(["a"] * 4, params), kinds, strict=True):
        assert re.fullmatch(pattern, answer.outputs[0].text)


def test_n_sequences_have_a_grammar_each(llm: LLM) -> None:
    params = SamplingParams(
        n=6, seed=2, structured_outputs=StructuredOutputs(regex="[a-z]{8}"), max_tokens=30
    )
    texts = [output.text for output in llm.generate(["a"], params)[0].outputs]
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts)
    assert len(set(texts)) == 6


def test_a_special_token_never_counts_as_text(tmp_path: Path) -> None:
    known = load_vocabulary(EngineConfig(model=str(write_model(tmp_path / "model"))))
    guidance = Guidance(lambda: known, 259)
    guide = guidance.guide(StructuredOutputs(regex="<s>.*").compiled(), [])
    (mask,) = guidance.masks([guide]).view(np.uint32)
    allowed = [id for id in range(259) if mask[id // 32] >> (id % 32) & 1]
    assert allowed == [known.tokens.index(b"<")]


def test_a_model_without_an_end_token_follows_no_grammar() -> None:
    endless = Vocabulary([b"a", b"b"], [], [], lambda data: [])
    with pytest.raises(NoEndToken, match="no end-of-sequence token"):
        compile_vocabulary(endless, 2)
