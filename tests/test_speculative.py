"""Speculative decoding on a CPU shard: whoever guesses, the tokens are those without guesses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from helpers.running import Arrival, Outcome, load, run, sequence
from helpers.tiny_models import directory
from pydantic import ValidationError
from safetensors.numpy import save_file

from tensorray.actors.config import ShardConfig
from tensorray.actors.draft_model import DraftModel
from tensorray.actors.lookup_drafter import LookupDrafter, look_up
from tensorray.actors.medusa import MedusaHeads
from tensorray.actors.protocol import Logprobs, Sampling, SequenceStart, StepPlan, StepResult
from tensorray.actors.shard import Shard
from tensorray.actors.speculation import pad, unpad
from tensorray.actors.speculative_config import SpeculativeConfig, parse_speculative_config
from tensorray.builder.checkpoint import CheckpointError
from tensorray.builder.checkpoint.medusa import load_medusa
from tensorray.builder.model import ModelConfigError
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.llm import LLM, SamplingParams
from tensorray.cluster.openai_api import ChatRequest

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
HIDDEN, VOCAB = 32, 272


@pytest.fixture(autouse=True)
def cheap_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if drafts took no time, so that models as large as the one they draft for pay too."""
    cost = property(lambda self: 0.0, lambda self, value: None)
    for drafter in (DraftModel, MedusaHeads):
        monkeypatch.setattr(drafter, "cost", cost)


def own_draft(name: str) -> dict[str, Any]:
    """The model as its own draft, which guesses everything right."""
    return {"model": str(directory(name)), "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def medusa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads that guess the next token's successors by llama3's own projection."""
    return write_medusa(tmp_path_factory.mktemp("medusa"))


def write_medusa(path: Path, *, vllm: bool = False, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    _, weights = load(directory("llama3"))
    tensors: dict[str, Any] = {}
    for head in range(2):
        block, projection = f"medusa_head.{head}.0.linear", f"medusa_head.{head}.1.weight"
        if vllm:
            block, projection = f"blocks.{head}.layers.0", f"lm_heads.{head}.weight"
        tensors[f"{block}.weight"] = rng.normal(0, 0.02, (HIDDEN, HIDDEN)).astype(np.float32)
        tensors[f"{block}.bias"] = np.zeros(HIDDEN, np.float32)
        tensors[projection] = np.asarray(weights.head.tokens)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "medusa_lm_head.safetensors")
    return path


def start(name: str, how: dict[str, Any] | None, **settings: Any) -> tuple[Shard, Any]:
    """A shard, and a scheduler for it."""
    config = EngineConfig(
        model=str(directory(name)),
        device="cpu",
        speculative_config=how or {},
        num_threads=1,
        **{"max_model_len": 64, "block_size": 4, "max_num_seqs": 8} | settings,
    )
    shard = Shard.load(config.shard())
    return shard, config.scheduler(shard.info)


def arrivals(seed: int = 0) -> list[Arrival]:
    """Prompts that repeat themselves, under everything a request can ask of sampling."""
    draw = Random(seed)
    kinds = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4),
        Sampling(temperature=0.7, top_k=20, top_p=0.9, seed=5),
        Sampling(temperature=1.3, min_p=0.02, seed=7, presence_penalty=0.5),
        Sampling(temperature=0.0, stop_token_ids=list(range(0, 272, 9)), min_tokens=7),
        Sampling(temperature=0.0, logit_bias={5: 3.0}, no_repeat_ngram_size=3),
    ]
    found = []
    for index, sampling in enumerate(kinds):
        phrase = [draw.randrange(10, 250) for _ in range(draw.randint(3, 6))]
        found.append(Arrival(index // 3, phrase * 4, sampling, 40 - index))
    return found


def compare(
    name: str, how: dict[str, Any], **settings: Any
) -> tuple[list[Outcome], dict[str, int]]:
    """Run with and without; the outcomes, which are equal, and what the scheduler counted."""
    plain = run(*start(name, None, **settings), arrivals())
    shard, scheduler = start(name, how, **settings)
    ours = run(shard, scheduler, arrivals())
    assert ours == plain
    stats = scheduler.stats()
    assert stats.free_blocks == stats.total_blocks
    return ours, {"drafted": stats.draft_tokens, "accepted": stats.accepted_tokens}


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-moe", "gpt2", "mistral"])
def test_prompt_lookup_changes_no_token(name: str) -> None:
    _, counted = compare(name, NGRAM)
    assert counted["accepted"] > 0
    assert counted["drafted"] > counted["accepted"]  # some were wrong, and left no trace


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2"])
def test_a_draft_model_changes_no_token(name: str) -> None:
    _, counted = compare(name, own_draft(name))
    # Itself as its draft it guesses right, but for penalties and ends, of which it knows nothing.
    assert counted["accepted"] > 0.6 * counted["drafted"]
    _, counted = compare(name, own_draft("qwen2"))
    assert 0 <= counted["accepted"] < counted["drafted"]


def test_medusa_heads_change_no_token(medusa: Path) -> None:
    _, counted = compare("llama3", {"method": "medusa", "model": str(medusa)})
    assert counted["drafted"] > 0


@pytest.mark.parametrize("how", [NGRAM, own_draft("gemma3")], ids=["ngram", "draft"])
def test_preemption_and_prefix_reuse_change_no_token_either(how: dict[str, Any]) -> None:
    # 6 groups of KV: a few sequences fill the pool, and lose their blocks to each other.
    shard, scheduler = start("gemma3", how, num_kv_blocks=60)
    plain = run(*start("gemma3", None), arrivals())
    assert run(shard, scheduler, arrivals()) == plain
    assert scheduler.stats().preemptions > 0
    shard, scheduler = start("gemma3", how)
    twice = [replace(each, step=after) for after in (0, 60) for each in arrivals()]
    assert run(shard, scheduler, twice) == plain * 2
    assert scheduler.stats().prefix_hits > 0


class KeepingShard:
    """A shard whose results are kept."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.results: list[StepResult] = []

    def execute(self, plan: StepPlan) -> StepResult:
        self.results.append(self._shard.execute(plan))
        return self.results[-1]


def logprobs_of(how: dict[str, Any] | None) -> tuple[list[int], list[Logprobs]]:
    shard, scheduler = start("llama3", how)
    kept = KeepingShard(shard)
    sampling = Sampling(temperature=0.8, seed=3, logprobs=3, prompt_logprobs=1)
    arrival = Arrival(0, [20, 21, 22, 23] * 5, sampling, 30)
    tokens: list[int] = []
    entries: list[Logprobs] = []
    scheduler.add(sequence(0, arrival))
    prompt: list[Logprobs] = []
    while scheduler.unfinished:
        for gain in scheduler.update(kept.execute(scheduler.schedule())):
            prompt += gain.prompt_logprobs or []
            if gain.token is not None:
                assert gain.logprobs is not None
                tokens.append(gain.token)
                entries.append(gain.logprobs)
    if how is not None:
        assert any(result.further_logprobs for result in kept.results)
    return tokens, prompt + entries


def test_log_probabilities_are_those_of_each_token() -> None:
    tokens, entries = logprobs_of(None)
    assert logprobs_of(own_draft("llama3")) == (tokens, entries)
    assert [entry.token for entry in entries[-len(tokens) :]] == tokens


def test_logits_that_are_not_finite_fail_their_sequence_only_when_it_gets_there() -> None:
    class Poisoned(Shard):
        def _logits(self, batch: Any, hidden: Any) -> Any:
            logits = super()._logits(batch, hidden)
            bad = batch.positions[batch.logit_rows] == 25
            return np.where(bad[:, None], np.float32(np.nan), logits)

    def outcome(how: dict[str, Any] | None) -> Outcome:
        shard, scheduler = start("llama3", how)
        shard.__class__ = Poisoned
        arrival = Arrival(0, [20, 21, 22, 23] * 5, Sampling(temperature=0.0), 30)
        return run(shard, scheduler, [arrival])[0]

    plain = outcome(None)
    assert plain.finish_reason == "error"
    assert len(plain.tokens) == 6
    assert outcome(own_draft("llama3")) == plain


# --- prompt lookup --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "room", "found"),
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 1, 2], 9, [3, 4, 1, 2, 3, 4, 1, 2, 3]),  # on into the copy
        ([7, 7, 7], 3, [7, 7, 7]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 1, [4]),  # the latest of two
        ([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], 1, [3]),  # the longest match goes before
        ([1, 2, 3, 4], 3, []),
        ([1, 2, -1, 3, 1, 2], 2, []),  # nothing follows in that text
        ([1, 2, 3, -1, 9, 1, 2], 5, [3]),
        ([3], 2, []),
    ],
)
def test_lookup_finds_what_followed(tokens: list[int], room: int, found: list[int]) -> None:
    assert look_up(np.array(tokens, np.int32), 1, 3, room) == found


def test_lookup_wants_a_suffix_of_the_least_length() -> None:
    tokens = np.array([1, 2, 3, 9, 2], np.int32)
    assert look_up(tokens, 1, 3, 1) == [3]
    assert look_up(tokens, 2, 3, 1) == []


def test_a_predicted_text_is_looked_through() -> None:
    drafter = LookupDrafter(2, 5)
    drafter.start(SequenceStart(0, [8, 9], 2, 0, [], Sampling(), prediction=[1, 2, 3, 4]))
    ask = ([0], [3], [], lambda seq, ahead, row: 0)
    assert drafter.draft(*ask) == [[]]
    drafter.gained(0, [1, 2], np.zeros(1))
    assert drafter.draft(*ask) == [[3, 4]]


def test_what_ranks_tell_each_other_keeps_lists_apart() -> None:
    lists = [[1, 2], [], [3]]
    assert unpad(pad(lists, [3, 2, 1]), [3, 2, 1]) == lists


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "mlp_speculator", "model": "x"}, "MLP speculators are not supported"),
        ({"method": "eagle"}, "'eagle' needs model"),
        ({"model": "x", "draft_tensor_parallel_size": 2}, "draft_tensor_parallel_size must be 1"),
        ({"method": "telepathy"}, "method must be one of ngram, draft_model, medusa"),
        ({"num_speculative_tokens": 3}, "method must be one of"),
        ({"method": "ngram", "model": "x"}, "has no model"),
        ({"method": "medusa"}, "needs model"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"method": "ngram", "lookup": 1}, "unknown lookup; there are disable_by_batch_size"),
        ({"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 3}, "is less than"),
        ({"model": "x", "prompt_lookup_max": 2}, "is for method ngram"),
    ],
)
def test_wrong_settings_are_refused_by_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="x", speculative_config=given)


def test_what_can_not_speculate_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pipeline"):
        EngineConfig(model="x", speculative_config=NGRAM, pipeline_parallel_size=2)
    from tensorray.actors.null_shard import NullShard

    how = parse_speculative_config(NGRAM)
    config = ShardConfig(str(directory("llama3")), speculative_config=how)
    with pytest.raises(ValueError, match="null device"):
        NullShard.from_config(config)


def test_the_shorter_and_longer_suffix_fit_each_other() -> None:
    def parsed(**keys: int) -> SpeculativeConfig | None:
        return parse_speculative_config({"method": "ngram", **keys})

    assert parse_speculative_config({}) is None
    for found, expected in (
        (parsed(prompt_lookup_max=1), (1, 1)),
        (parsed(prompt_lookup_min=7), (7, 7)),
        (parsed(), (2, 5)),
    ):
        assert found is not None
        assert (found.prompt_lookup_min, found.prompt_lookup_max) == expected


@pytest.mark.parametrize("vllm", [False, True])
def test_medusa_heads_are_read_in_either_layout(tmp_path: Path, vllm: bool) -> None:
    heads = load_medusa(write_medusa(tmp_path / "heads", vllm=vllm), HIDDEN, VOCAB)
    assert len(heads) == 2
    assert heads[1].projection.shape == (VOCAB, HIDDEN)
    ((weight, bias),) = heads[0].blocks
    assert weight.shape == (HIDDEN, HIDDEN)
    assert bias is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"medusa_head.1.1.weight": None}, "head 1 is incomplete"),
        ({"medusa_head.0.0.linear.weight": None}, "head 0 is incomplete"),
        ({"medusa_head.0.1.weight": np.zeros((9, HIDDEN), np.float32)}, r"shape \[9, 32\]"),
        ({"fc.weight": np.zeros((2, 2), np.float32)}, "'fc.weight' is none of"),
    ],
)
def test_damaged_medusa_heads_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_medusa(write_medusa(tmp_path / "heads", **changes), HIDDEN, VOCAB)


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    text = (directory("llama3") / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"vocab_size": 272', '"vocab_size": 280'))
    how = {"model": str(directory("llama3"))}
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", speculative_config=how, max_model_len=32
    )
    with pytest.raises(ModelConfigError, match="have to share a vocabulary"):
        Shard.load(config.shard())


# --- whole ----------------------------------------------------------------------------------------


def generate(how: dict[str, Any], ask: Callable[[LLM], Any], **settings: Any) -> Any:
    with LLM(
        str(directory("llama3")),
        device="cpu",
        max_model_len=96,
        num_threads=1,
        speculative_config=how,
        **settings,
    ) as llm:
        return ask(llm)


def test_llm_tells_of_drafts_in_usage_and_ends_at_stop_strings() -> None:
    prompt = [20, 21, 22, 23] * 6

    def ask(llm: LLM, **params: Any) -> Any:
        asked = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **params)
        (output,) = llm.generate(prompt, asked)
        return output

    plain = generate({}, ask)
    ours = generate(own_draft("llama3"), ask)
    assert ours.outputs == plain.outputs
    assert plain.usage.accepted_prediction_tokens == 0
    assert ours.usage.accepted_prediction_tokens > 20
    assert ours.usage.completion_tokens == 40
    text = plain.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = [
        generate(how, lambda llm: ask(llm, stop=[stop])) for how in ({}, own_draft("llama3"))
    ]
    assert stopped[0].outputs == stopped[1].outputs
    assert stopped[1].outputs[0].finish_reason == "stop"


def test_a_grammar_is_followed_with_and_without_guesses() -> None:
    params = SamplingParams(
        temperature=0.9, seed=2, max_tokens=40, structured_outputs={"regex": "(ab|cd){4,9}"}
    )

    def ask(llm: LLM) -> Any:
        output = llm.generate("ababcdcd" * 2, params)[0]
        return output.outputs[0], output.usage.accepted_prediction_tokens

    (plain, none), (ours, accepted) = generate({}, ask), generate(NGRAM, ask)
    assert ours == plain
    assert re.match("(ab|cd)+", ours.text)
    assert accepted > none == 0


def test_beams_search_beside_sequences_that_guess() -> None:
    prompt = [20, 21, 22, 23] * 5
    beams = SamplingParams(use_beam_search=True, n=3, temperature=0, max_tokens=12)
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)

    def ask(llm: LLM) -> Any:
        outputs = llm.generate([prompt, prompt], [beams, greedy])
        drafted = outputs[0].usage.rejected_prediction_tokens
        return [output.outputs for output in outputs], drafted, outputs[1].usage

    (plain, _, _), (ours, drafted, usage) = generate({}, ask), generate(NGRAM, ask)
    assert ours == plain
    assert drafted == 0 < usage.accepted_prediction_tokens


def test_tensor_parallel_ranks_run_the_same_drafts() -> None:
    prompts = [each.prompt for each in arrivals()][:4]
    params = SamplingParams(temperature=0.6, max_tokens=24, seed=1, ignore_eos=True)

    def ask(llm: LLM) -> Any:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    alone = generate(own_draft("llama3"), ask)
    for how in (NGRAM, own_draft("llama3")):
        assert generate(how, ask, tensor_parallel_size=2) == alone


def test_a_chats_prediction_is_looked_up_and_changes_nothing() -> None:
    messages = [{"role": "user", "content": "ab"}]

    def ask(llm: LLM, prediction: str = "") -> Any:
        prepared = llm.frontend.request(
            llm.frontend.chat(messages),
            SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
            request_id=f"p{len(prediction)}",
            prediction=prediction,
        )
        return llm.run(llm.frontend.collect(llm.client, prepared))

    def both(llm: LLM) -> tuple[Any, Any]:
        without = ask(llm)
        tokens = without.outputs[0].token_ids
        return without, ask(llm, llm.frontend.tokenizer.decode(tokens))

    plain, told = generate(NGRAM, both)
    assert told.outputs == plain.outputs
    accepted = [output.usage.accepted_prediction_tokens for output in (plain, told)]
    assert accepted[1] > accepted[0]


def test_the_api_takes_openais_prediction() -> None:
    body = {"messages": [{"role": "user", "content": "ab"}]}
    parts = [{"type": "text", "text": "some "}, {"type": "text", "text": "text"}]
    for content in ("some text", parts):
        asked = {**body, "prediction": {"type": "content", "content": content}}
        prediction = ChatRequest.model_validate(asked).prediction
        assert prediction is not None
        assert prediction.text == "some text"
    with pytest.raises(ValidationError, match="prediction"):
        ChatRequest.model_validate({**body, "prediction": {"type": "image"}})
