"""Beam search: transformers' results, alone and beside other traffic, on every path to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import beam_cases
from helpers.beam_cases import GOLDEN, TOKENS, Case, assert_searched, params_of, prompt_of, searches
from helpers.gpu_shards import make_gpu_shard
from helpers.null_engine import VOCAB_SIZE, null_engine, serving, write_model
from helpers.tiny_models import directory, references
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tensorray.actors.link import LocalLink, ShardError, ShardLink
from tensorray.actors.null_shard import NullShard
from tensorray.actors.protocol import Logprobs, Sampling, StepResult
from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.beams import Beam, Search, candidates
from tensorray.cluster.engine import Engine
from tensorray.cluster.llm import LLM, BeamSearchParams, SamplingParams
from tensorray.cluster.outputs import RequestOutput
from tensorray.cluster.request import BeamSearch, Delta, GenerationRequest, RequestRefused
from tensorray.cluster.scheduler import Scheduler

SMALL = {
    "max_model_len": 60,
    "num_kv_blocks": 300,
    "block_size": 4,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "num_threads": 1,
}


def assert_found(output: RequestOutput, case: Case) -> None:
    beam_cases.assert_found([(o.token_ids, o.cumulative_logprob) for o in output.outputs], case)
    stops = case["settings"]["eos_token_id"]
    for each in output.outputs:
        assert each.finish_reason == ("stop" if each.token_ids[-1] in stops else "length")


@pytest.fixture(scope="module", params=sorted(GOLDEN))
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, LLM]]:
    with LLM(str(directory(request.param)), **SMALL) as llm:
        yield request.param, llm


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(directory("llama3")), **SMALL) as llm:
        yield llm


def greedy(max_tokens: int = TOKENS, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)


# --- as transformers has it -------------------------------------------------------------------


def test_alone(served: tuple[str, LLM]) -> None:
    name, llm = served
    for case in GOLDEN[name][: len(GOLDEN[name]) // 3]:  # the first prompt's, in every setting
        (output,) = llm.generate(prompt_of(name, case), params_of(case))
        assert_found(output, case)
    stats = llm.engine.scheduler.stats()
    assert stats.running == stats.waiting == 0
    assert stats.free_blocks == stats.total_blocks


def test_beside_sampled_and_greedy_traffic(served: tuple[str, LLM]) -> None:
    name, llm = served
    cases = GOLDEN[name]
    others = [references(name)[i % 3].prompt.tolist() for i in range(6)]
    wanted = [greedy(20) if i % 2 else SamplingParams(seed=i, max_tokens=20) for i in range(6)]
    alone = [llm.generate(prompt, each)[0] for prompt, each in zip(others, wanted, strict=True)]
    prompts, params = others[:3], wanted[:3]
    prompts += [prompt_of(name, case) for case in cases] + others[3:]
    params += [params_of(case) for case in cases] + wanted[3:]
    outputs = llm.generate(prompts, params)
    for output, case in zip(outputs[3:-3], cases, strict=True):
        assert_found(output, case)
    for output, before in zip([*outputs[:3], *outputs[-3:]], alone, strict=True):
        assert output.outputs[0].token_ids == before.outputs[0].token_ids
    assert llm.engine.scheduler.stats().free_blocks == SMALL["num_kv_blocks"] - 1


@pytest.mark.parametrize("caching", [True, False])
def test_a_small_cache_preempts_searches_and_loses_nothing(caching: bool) -> None:
    cases = [case for case in GOLDEN["gemma3"] if case["prompt"] == 0]
    small = {**SMALL, "num_kv_blocks": 60, "enable_prefix_caching": caching}
    with LLM(str(directory("gemma3")), **small) as llm:
        prompts = [prompt_of("gemma3", case) for case in cases]
        outputs = llm.generate(prompts, [params_of(case) for case in cases])
        stats = llm.engine.scheduler.stats()
    for output, case in zip(outputs, cases, strict=True):
        assert_found(output, case)
    assert stats.preemptions > 0
    assert stats.free_blocks == stats.total_blocks


def test_two_tensor_parallel_shards() -> None:
    with LLM(str(directory("qwen3")), tensor_parallel_size=2, **SMALL) as llm:
        cases = GOLDEN["qwen3"][:4] + GOLDEN["qwen3"][-2:]
        prompts = [prompt_of("qwen3", case) for case in cases]
        beside = [[5, 6, 7], [8, 9]]
        alone = [llm.generate(prompt, greedy())[0] for prompt in beside]
        params = [*(params_of(case) for case in cases), greedy(), greedy()]
        outputs = llm.generate([*prompts, *beside], params)
    for output, case in zip(outputs, cases, strict=False):
        assert_found(output, case)
    for output, before in zip(outputs[-2:], alone, strict=True):
        assert output.outputs[0].token_ids == before.outputs[0].token_ids


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_on_a_gpu_shard(name: str) -> None:
    """All of it but the kernels, two steps in flight; what edits logits is scored on the host."""
    shard = make_gpu_shard(directory(name))
    scheduler = Scheduler(
        shard.info.kv, max_model_len=60, max_num_seqs=16, max_num_batched_tokens=64
    )
    cases = GOLDEN[name][:10] + GOLDEN[name][-3:]
    found, tokens = searches(shard, scheduler, name, cases, beside=3)
    for each, case in zip(found, cases, strict=True):
        assert_searched(each, case)
    for index, each in enumerate(tokens):
        assert each == references(name)[index].greedy.tolist()


# --- diverse beams ----------------------------------------------------------------------------

VOCAB = 9


def table(seed: int) -> np.ndarray:
    """Log-probabilities [last token, next token] of a model that looks one token back."""
    logits = np.random.default_rng(seed).normal(scale=2.0, size=(VOCAB, VOCAB))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def reference(
    model: np.ndarray, rules: BeamSearch, stops: set[int], most: int
) -> list[tuple[list[int], float]]:
    """Diverse beam search (arXiv 1610.02424) over whole vocabularies, in plain NumPy: groups one
    after the other, each a beam search whose scores are augmented by the Hamming term."""
    size = rules.width // rules.groups
    running: list[list[tuple[list[int], float]]] = [[([0], 0.0)] for _ in range(rules.groups)]
    done: list[list[tuple[list[int], float]]] = [[] for _ in range(rules.groups)]
    for length in range(1, most + 1):
        chosen = np.zeros(VOCAB)
        for group in range(rules.groups):
            beams = running[group]
            if not beams:
                continue
            scores = np.stack(
                [score + model[tokens[-1]] - rules.diversity * chosen for tokens, score in beams]
            )
            order = np.argsort(-scores, axis=None, kind="stable")
            running[group] = []
            for place, (beam, token) in enumerate(zip(*np.divmod(order, VOCAB), strict=True)):
                extended = ([*beams[beam][0], int(token)], float(scores[beam, token]))
                if int(token) in stops or length == most:
                    if place < size:
                        final = extended[1] / length**rules.length_penalty
                        done[group].append((extended[0][1:], final))
                elif len(running[group]) < size:
                    running[group].append(extended)
            done[group] = sorted(done[group], key=lambda each: -each[1])[:size]
            if len(done[group]) == size and running[group]:
                reach = most if rules.early_stopping == "never" else length
                reach = reach if rules.length_penalty > 0 else length
                best = running[group][0][1] / reach**rules.length_penalty
                if rules.early_stopping is True or best <= done[group][-1][1]:
                    running[group] = []
            for tokens, _ in running[group]:
                chosen[tokens[-1]] += 1
    return sorted((each for group in done for each in group), key=lambda each: -each[1])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.integers(1, 3),
    size=st.integers(1, 3),
    diversity=st.sampled_from([0.0, 0.7, 3.0]),
    length_penalty=st.sampled_from([1.0, 0.0, 2.0, -1.0]),
    early_stopping=st.sampled_from([False, True, "never"]),
    stops=st.sets(st.integers(0, VOCAB - 1), max_size=2),
    most=st.integers(1, 6),
)
def test_diverse_groups_search_as_the_paper_has_it(
    seed: int, groups: int, size: int, stops: set[int], most: int, **given_rules: Any
) -> None:
    rules = BeamSearch(width=groups * size, groups=groups, **given_rules)
    model = table(seed)
    search = Search(rules, max_tokens=most, stops=frozenset(stops))

    def found(beam: Beam) -> Logprobs:
        row = model[0 if beam.entry is None else beam.entry.token]
        best = np.argsort(-row, kind="stable")[: candidates(rules, len(stops))]
        return Logprobs(int(best[0]), row[best[0]], 1, best.tolist(), row[best].tolist())

    while search.beams:
        search.advance({beam: found(beam) for beam in search.beams})
    ours = [([entry.token for entry in each.entries], each.score) for each in search.best(99)]
    theirs = reference(model, rules, stops, most)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], atol=1e-9)
    for each in search.best(99):
        steps = zip([0, *(e.token for e in each.entries)], each.entries, strict=False)
        own = sum(model[before, entry.token] for before, entry in steps)
        assert each.beam.cumulative == pytest.approx(own)  # the model's, whatever diversity cost


def test_diversity_makes_first_tokens_differ(llm: LLM) -> None:
    rules = {"use_beam_search": True, "n": 4, "max_tokens": 6, "ignore_eos": True}
    prompt = [7, 8, 9]
    params = [
        SamplingParams(**rules, beam_search_diversity_rate=rate, num_beam_groups=groups)
        for rate, groups in ((50.0, None), (50.0, 2), (0.0, None))
    ]
    each_own, two_groups, plain = [
        {answer.token_ids[0] for answer in output.outputs}
        for output in llm.generate([prompt] * 3, params)
    ]
    assert len(each_own) == 4
    assert len(two_groups) >= 2
    assert len(plain) < 4


# --- what a request may say -------------------------------------------------------------------


def test_best_of_and_beam_width_are_the_same_and_n_are_returned(llm: LLM) -> None:
    asked = {"use_beam_search": True, "max_tokens": 6, "ignore_eos": True}
    spelled = [
        SamplingParams(n=4, **asked),
        SamplingParams(n=2, best_of=4, **asked),
        SamplingParams(n=2, beam_width=4, logprobs=2, **asked),
    ]
    four, two, two_again = llm.generate([[5, 6, 7]] * 3, spelled)
    assert len(four.outputs) == 4
    best = [each.token_ids for each in four.outputs[:2]]
    assert [each.token_ids for each in two.outputs] == best
    assert [each.token_ids for each in two_again.outputs] == best
    assert four.usage.completion_tokens == 24
    for each in two_again.outputs:
        assert each.cumulative_logprob == pytest.approx(sum(t.logprob for t in each.logprobs))
        assert all(len(entry.top) == 2 for entry in each.logprobs)
    assert two.outputs[0].logprobs is None


def test_log_probabilities_are_the_models(llm: LLM) -> None:
    search = SamplingParams(use_beam_search=True, n=3, max_tokens=6, ignore_eos=True)
    prompt = [5, 6, 7]
    (found,) = llm.generate(prompt, search)
    for each in found.outputs:
        whole = prompt + each.token_ids
        (scored,) = llm.generate(whole, greedy(1, prompt_logprobs=0))
        logprobs = [entry.logprob for entry in scored.prompt_logprobs[len(prompt) :]]
        assert each.cumulative_logprob == pytest.approx(sum(logprobs), abs=1e-3)


def test_one_beam_is_greedy(llm: LLM) -> None:
    (search,) = llm.generate([5, 6, 7], SamplingParams(use_beam_search=True, max_tokens=10))
    (plain,) = llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=10))
    assert search.outputs[0].token_ids == plain.outputs[0].token_ids


def test_a_stream_brings_all_at_the_end(llm: LLM) -> None:
    params = SamplingParams(use_beam_search=True, n=3, max_tokens=6)
    (whole,) = llm.generate("in the rain", params)
    deltas = [delta for delta in llm.stream("in the rain", params) if delta.outputs]
    told = sorted((out for delta in deltas for out in delta.outputs), key=lambda out: out.index)
    assert [out.text for out in told] == [out.text for out in whole.outputs]
    assert all(out.finish_reason for out in told)


def test_a_grammar_holds_beams_too(llm: LLM) -> None:
    asked = SamplingParams(
        use_beam_search=True,
        beam_width=4,
        n=4,
        max_tokens=20,
        length_penalty=0.0,
        structured_outputs={"choice": ["rain", "train", "then"]},
    )
    (found,) = llm.generate("the ", asked)
    texts = [each.text for each in found.outputs]
    # There are three answers, so three are found, whatever many ways to spell them there are.
    assert {*texts} <= {"rain", "train", "then"}
    sums = [each.cumulative_logprob for each in found.outputs]
    assert sums == sorted(sums, reverse=True)


def test_prompts_are_scored_and_echoed(llm: LLM) -> None:
    params = SamplingParams(use_beam_search=True, n=2, max_tokens=4, prompt_logprobs=1)
    (found,) = llm.generate([5, 6, 7, 8, 9], params)
    (plain,) = llm.generate([5, 6, 7, 8, 9], greedy(4, prompt_logprobs=1))
    for ours, theirs in zip(found.prompt_logprobs[1:], plain.prompt_logprobs[1:], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"temperature": 0.7}, "temperature .* has no meaning"),
        ({"top_k": 5}, "top_k .* has no meaning"),
        ({"top_p": 0.5}, "top_p .* has no meaning"),
        ({"min_p": 0.1}, "min_p .* has no meaning"),
        ({"stop": ["x"]}, "use stop_token_ids"),
        ({"stop_token_ids": [*range(65)]}, "64 is the most"),
        ({"beam_width": 4, "best_of": 5}, "both say"),
        ({"beam_width": 2, "n": 3}, "at least n"),
        ({"beam_width": 4, "num_beam_groups": 3, "beam_search_diversity_rate": 1.0}, "divide"),
        ({"beam_width": 4, "num_beam_groups": 2}, "need each other"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"use_beam_search": False, "beam_width": 4}, "needs use_beam_search"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "needs use_beam_search"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        SamplingParams(**{"use_beam_search": True, **fields})


def test_a_models_own_temperature_is_left_out(llm: LLM) -> None:
    defaults = llm.frontend.default_params
    llm.frontend.default_params = {**defaults, "temperature": 0.6, "top_k": 64, "top_p": 0.9}
    try:
        params = llm.frontend.params(use_beam_search=True, n=2)
        assert (params.temperature, params.top_k, params.top_p) == (1.0, 0, 1.0)
        with pytest.raises(BadRequest, match="temperature"):
            llm.frontend.params(use_beam_search=True, temperature=0.6)
    finally:
        llm.frontend.default_params = defaults


def test_what_can_never_fit_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestRefused, match=r"beam_width \(17\) is more than the 16 sequences"):
        llm.generate([5], SamplingParams(use_beam_search=True, beam_width=17))
    with (
        LLM(str(directory("llama3")), **{**SMALL, "num_kv_blocks": 30}) as little,
        pytest.raises(RequestRefused, match=r"4 beams of 1 prompt tokens .* KV blocks"),
    ):
        little.generate([5], SamplingParams(use_beam_search=True, beam_width=4, max_tokens=50))
    # Prompts are shared, so that many beams of a long one fit.
    with LLM(str(directory("llama3")), **{**SMALL, "num_kv_blocks": 30}) as little:
        long = references("llama3")[0].prompt.tolist() * 2
        search = SamplingParams(use_beam_search=True, beam_width=8, max_tokens=4, n=8)
        (found,) = little.generate(long, search)
        assert len({tuple(each.token_ids) for each in found.outputs}) == 8


def test_a_beams_sampling_says_what_a_shard_reports() -> None:
    params = SamplingParams(use_beam_search=True, n=4, stop_token_ids=[5, 6])
    sampling = params.resolve([1], 100)
    assert sampling == Sampling(
        temperature=0.0,
        logprobs=7,
        beam=True,
        stop_token_ids=[5, 6, 1],
        seed=sampling.seed,
    )


# --- through the doors ------------------------------------------------------------------------


def test_as_vllm_spells_it(llm: LLM) -> None:
    asked = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    prompts = [{"prompt": "in the rain"}, {"prompt_token_ids": [5, 6, 7]}, [5, 6, 7]]
    text, ids, again = llm.beam_search(prompts, asked)
    assert ids == again
    (plain,) = llm.generate([5, 6, 7], asked.sampling_params())
    assert [each.tokens[3:] for each in ids.sequences] == [o.token_ids for o in plain.outputs]
    assert [each.cum_logprob for each in ids.sequences] == [
        o.cumulative_logprob for o in plain.outputs
    ]
    assert len(text.sequences) == 3
    assert all(each.text.startswith("in the rain") for each in text.sequences)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


async def test_over_http(model: Path) -> None:
    search = {"use_beam_search": True, "n": 3, "max_tokens": 4, "length_penalty": 0.5, "seed": 1}
    messages = [{"role": "user", "content": "Hello"}]
    async with serving(model) as (http, backend):
        url = "http://test/v1/completions"
        sent = {"prompt": ["Hello", "there"], "logprobs": 1, **search}
        answer = (await http.post(url, json=sent)).json()
        choices = answer["choices"]
        assert [each["index"] for each in choices] == list(range(6))
        sums = [sum(each["logprobs"]["token_logprobs"]) for each in choices[:3]]
        assert sums == sorted(sums, reverse=True)
        assert answer["usage"]["completion_tokens"] == 24

        streamed = await http.post(url, json={"prompt": "Hello", "stream": True, **search})
        events = [line[6:] for line in streamed.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        told = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert sorted((each["index"], each["text"]) for each in told) == [
            (each["index"], each["text"]) for each in choices[:3]
        ]

        chat = "http://test/v1/chat/completions"
        sent = {"messages": messages, "best_of": 4, **search, "early_stopping": "never"}
        answer = (await http.post(chat, json=sent)).json()
        assert len(answer["choices"]) == 3
        for fields, why in (
            ({"temperature": 0.5}, "temperature"),
            ({"stop": "x"}, "stop_token_ids"),
            ({"beam_width": 65}, "beam_width (65) is more than the 64 sequences"),
            ({"early_stopping": "soon"}, "early_stopping"),
        ):
            refused = await http.post(chat, json={"messages": messages, **search, **fields})
            assert refused.status_code == 400
            assert why in refused.json()["error"]["message"]

        triton = "http://test/v2/models/ensemble/generate"
        sent = {"text_input": "Hello", "beam_width": 3, "max_tokens": 4, "return_log_probs": True}
        answer = (await http.post(triton, json=sent)).json()
        assert len(answer["text_output"]) == len(answer["cum_log_probs"]) == 3
        assert answer["cum_log_probs"] == sorted(answer["cum_log_probs"], reverse=True)
        refused = await http.post(triton, json={**sent, "stop_words": ["x"]})
        assert refused.status_code == 400
        assert "stop_words" in refused.text
    stats = backend.engine.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks


class BreakingLink(LocalLink):
    """Breaks before the result of every step in `steps`, counted over all links."""

    taken = 0

    def __init__(self, shard: NullShard, steps: set[int]) -> None:
        super().__init__(shard, inline=True)
        self._steps = steps

    async def receive(self) -> StepResult:
        result = await super().receive()
        BreakingLink.taken += 1
        if BreakingLink.taken in self._steps:
            raise ShardError("broken on purpose")
        return result


async def collected(stream: AsyncIterator[list[Delta]]) -> dict[int, list[Delta]]:
    found: dict[int, list[Delta]] = {}
    async for deltas in stream:
        for delta in deltas:
            found.setdefault(delta.index, []).append(delta)
    return found


def request_for(n: int, *, max_tokens: int = 6) -> GenerationRequest:
    params = SamplingParams(use_beam_search=True, n=n, max_tokens=max_tokens, seed=1)
    sampling = params.resolve([], VOCAB_SIZE)
    beams = params.beam_search()
    return GenerationRequest("r", [5, 6, 7], sampling, max_tokens, n=n, beams=beams)


def engine_over(steps: set[int]) -> Engine:
    """Whose shards break before those steps' results, and are put right at once."""
    whole = null_engine()
    BreakingLink.taken = 0

    async def recover(error: ShardError, note: Callable[[str], None]) -> ShardLink:
        return BreakingLink(NullShard(whole.info), steps)

    return Engine(BreakingLink(NullShard(whole.info), steps), whole.scheduler, recover=recover)


async def test_a_lost_shard_costs_a_search_nothing() -> None:
    answers = []
    for steps in (set[int](), {1, 4, 6}):
        engine = engine_over(steps)
        await engine.start()
        found = await collected(engine.generate(request_for(3)))
        answers.append({index: [each.tokens for each in deltas] for index, deltas in found.items()})
        await engine.close()
    assert answers[0] == answers[1]
    assert sorted(answers[0]) == [0, 1, 2]


async def test_a_search_that_shards_die_of_is_given_up() -> None:
    engine = engine_over({2, 3, 4})
    await engine.start()
    found = await collected(engine.generate(request_for(3)))
    assert [deltas[-1].finish_reason for deltas in found.values()] == ["error"] * 3
    assert "3 steps that failed" in found[0][-1].error
    assert engine.scheduler.unfinished == 0
    again = await collected(engine.generate(request_for(2)))  # and others go on
    assert [deltas[-1].finish_reason for deltas in again.values()] == ["length"] * 2
    await engine.close()


async def test_a_search_that_is_cancelled_leaves_nothing() -> None:
    engine = null_engine()
    await engine.start()
    stream = engine.generate(request_for(3, max_tokens=200))
    while engine.scheduler.unfinished != 3:
        await asyncio.sleep(0)
    await stream.aclose()
    assert engine.scheduler.unfinished == 0
    stats = engine.scheduler.stats()
    assert stats.free_blocks == stats.total_blocks
    assert await collected(engine.generate(request_for(1))) != {}
    await engine.close()
