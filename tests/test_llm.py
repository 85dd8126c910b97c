"""LLM: the engine in this process."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest
from helpers.equality import assert_same_tokens
from helpers.tiny_models import NAMES, directory, references

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.beam_answers import BeamSearchParams
from tensorray.cluster.llm import LLM, SamplingParams

SMALL = {"max_model_len": 64, "num_kv_blocks": 128, "block_size": 4, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def llm():
    with LLM(str(directory("llama3")), **SMALL) as llm:
        yield llm


def greedy(max_tokens: int, **fields) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **fields)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_continues_prompts_as_transformers_does(name):
    cases = references(name)
    prompts = [case.prompt.tolist() for case in cases]
    settings = {**SMALL, "max_model_len": max(map(len, prompts)) + 16, "num_kv_blocks": 512}
    with LLM(str(directory(name)), **settings) as llm:
        outputs = llm.generate(prompts, greedy(16, logprobs=2))
    for case, output in zip(cases, outputs, strict=True):
        (completion,) = output.outputs
        margins = [
            float(np.subtract(*sorted((top.logprob for top in entry.top), reverse=True)[:2]))
            for entry in completion.logprobs
        ]
        assert_same_tokens(completion.token_ids, case.greedy.tolist(), margins)


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = ["one two three", "a", "the quick brown fox jumps"]
    lengths = [3, 20, 7]
    finished = []
    outputs = llm.generate(prompts, [greedy(n) for n in lengths], on_finished=finished.append)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [finished.index(output) for output in outputs] == [0, 2, 1]  # the shortest ended first


def test_prompts_may_be_written_as_vllms(llm):
    ids = [3, 14, 15]
    written = [
        ids,
        {"prompt_token_ids": ids},
        {"prompt_token_ids": ids, "prompt": "their text", "multi_modal_data": None},
    ]
    outputs = llm.generate(written, greedy(4))
    assert [output.prompt_token_ids for output in outputs] == [ids] * 3
    alone, text = llm.generate({"prompt": "abc"}, greedy(4)), llm.generate("abc", greedy(4))
    assert alone[0].outputs[0].token_ids == text[0].outputs[0].token_ids
    for wrong in ({"text": "abc"}, {"prompt": "abc", "multi_modal_data": {"image": 1}}):
        with pytest.raises(BadRequest, match="prompt"):
            llm.generate([wrong], greedy(4))


@pytest.fixture
def shown(monkeypatch):
    """The bars of progress there were: what was done, of how many, and how many were done."""
    bars = []

    @contextlib.contextmanager
    def bar(total, doing="Generating"):
        bars.append([doing, total, 0])

        def advance():
            bars[-1][-1] += 1

        yield advance

    monkeypatch.setattr("tensorray.cluster.llm.progress", bar)
    return bars


def test_progress_is_shown_beside_what_the_caller_counts(llm, shown):
    done = []
    llm.generate([[3], [4]], greedy(2), use_tqdm=True, on_finished=done.append)
    assert (shown, len(done)) == ([["Generating", 2, 2]], 2)
    llm.generate([[3], [4]], greedy(2), on_finished=done.append)
    assert (shown, len(done)) == ([["Generating", 2, 2]], 4)


def test_progress_of_what_is_not_generated(llm, shown):
    for use_tqdm in (False, True):
        llm.embed([[3], [4]], use_tqdm=use_tqdm)
        llm.encode([[3], [4], [5]], use_tqdm=use_tqdm)
        llm.score([[3]], [[4], [5], [6]], use_tqdm=use_tqdm)
        llm.beam_search([[3], [4]], BeamSearchParams(2, 3), use_tqdm=use_tqdm)
    embedded = [["Embedding", count, count] for count in (2, 3, 4)]
    assert shown == [*embedded, ["Generating", 2, 2]]


def test_a_stream_brings_the_same_text_as_a_whole_answer(llm):
    (whole,) = llm.generate("the quick brown", greedy(12))
    deltas = list(llm.stream("the quick brown", greedy(12)))
    assert len(deltas) > 1
    assert "".join(delta.outputs[0].text for delta in deltas) == whole.outputs[0].text
    assert deltas[-1].finished


def test_leaving_a_stream_early_cancels_it(llm):
    for _ in llm.stream("the quick brown", greedy(50)):
        break
    llm.generate("x", greedy(1))  # a turn of the loop later
    stats = llm.engine.scheduler.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.free_blocks == stats.total_blocks


def test_n_sequences_differ_and_a_seed_repeats_them(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate("the", params)[0] for _ in range(2))
    texts = [tuple(completion.token_ids) for completion in first.outputs]
    assert len(set(texts)) == 3
    assert texts == [tuple(completion.token_ids) for completion in second.outputs]


def test_chat_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "hello"}]
    (output,) = llm.chat(messages, greedy(4))
    assert output.prompt_token_ids == llm.frontend.chat(messages)
    assert len(output.outputs[0].token_ids) == 4


def test_it_works_inside_a_running_event_loop(llm):
    async def notebook_cell():
        return llm.generate("the", greedy(2))

    assert len(asyncio.run(notebook_cell())[0].outputs[0].token_ids) == 2


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([""], greedy(1), "empty"),
        (["fine", list(range(3, 80))], greedy(1), "64"),
        ([[100_000]], greedy(1), "100000"),
        (["fine"], greedy(64), "max_tokens"),
    ],
)
def test_bad_requests_run_nothing(llm, prompts, params, message):
    with pytest.raises(BadRequest, match=message):
        llm.generate(prompts, params)
    assert llm.engine.scheduler.unfinished == 0


def test_two_prompts_want_one_or_two_sampling_params(llm):
    with pytest.raises(ValueError, match="2 prompts but 3 sampling_params"):
        llm.generate(["a", "b"], [greedy(1)] * 3)


def test_closing_twice_is_closing_once():
    llm = LLM(str(directory("llama3")), device="null", **SMALL)
    assert len(llm.generate("the", greedy(5))[0].outputs[0].token_ids) == 5
    llm.close()
    llm.close()
