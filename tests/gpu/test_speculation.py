"""Guessed tokens on a GPU: they change no token, against the CPU's path and plain decoding.

python3 -m pytest tests/gpu/test_speculation.py -q --import-mode=importlib -p no:cacheprovider

With two GPUs, tensor-parallel shards as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.draft_cases import Ahead, assert_like_the_cpu, scheduler, texts
from helpers.equality import assert_same_tokens, choice
from helpers.host_device import HostDevice
from helpers.oracle import Oracle
from helpers.running import Arrival, run
from helpers.table_models import MOST, chi_square, write_on
from helpers.tiny_models import directory

from tensorray.actors.config import ShardConfig
from tensorray.actors.device import CudaDevice, find_device
from tensorray.actors.device_sampler import DeviceSampler
from tensorray.actors.drafter import Drafter
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.protocol import Sampling, SequenceStart, ShardInfo
from tensorray.actors.sampler import Sampler
from tensorray.actors.speculative_config import parse_speculative_config
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.llm import LLM, LoRARequest, SamplingParams
from tensorray.cluster.scheduler import Scheduler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device() is None, reason="needs a GPU that CuPy can use"),
]

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
# As if waiting for results took little, so that small models guess, too.
CHEAP: dict[str, Any] = {
    **{"row_cost": 0.01, "wait_cost": 0.1, "sequence_cost": 0.0},
    **{"round_cost": 0.0, "draft_cost": 0.0},
}


def gpu_count() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDeviceCount())


def load(
    name: str, drafter: Drafter | None = None, how: dict[str, Any] | None = None, **settings: Any
) -> GpuShard:
    """A shard, whose guesses come from `drafter` if there is one; `how` {}: without any."""
    settings = {"dtype": "float32", "num_kv_blocks": 512, **settings}
    shard = GpuShard.load(
        ShardConfig(
            str(directory(name)),
            device="cuda",
            max_model_len=64,
            block_size=4,
            max_num_seqs=8,
            max_num_batched_tokens=40,
            segment_backend="kernels",
            speculative_config=parse_speculative_config(NGRAM if how is None else how),
            **settings,
        )
    )
    if shard._drafts is not None:
        drafting = msgspec.structs.replace(shard._drafts.drafting, **CHEAP)
        shard.info = msgspec.structs.replace(shard.info, drafting=drafting)
        if drafter is not None:
            shard._drafts._drafter = drafter
    return shard


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-moe", "gpt2"])
def test_prompt_lookup_changes_no_token(name: str, eager: bool) -> None:
    shard = load(name, enforce_eager=eager)
    assert shard.info.drafting is not None
    _, plans = assert_like_the_cpu(name, shard)
    stats = plans.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens


@pytest.mark.parametrize("blocks", [34, 512])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_whatever_is_guessed_changes_no_token(name: str, blocks: int) -> None:
    wrong = Random(3)
    oracle = Oracle(texts(name), lambda seq, place: wrong.random() < 0.3)
    groups = 6 if name == "gemma3" else 1
    _, plans = assert_like_the_cpu(name, load(name, oracle, num_kv_blocks=blocks * groups))
    stats = plans.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert blocks > 34 or name == "gemma3" or stats.preemptions > 0


class Plain:
    """What greedy requests get without guesses in half precision, and how clear each choice was."""

    def __init__(self, asked: list[Arrival], **settings: Any) -> None:
        self._dtype = settings["dtype"]
        self._seen: dict[int, list[np.ndarray]] = {}
        shard = load("llama3", how={}, **settings)
        enqueue = shard._sampler.enqueue  # type: ignore[union-attr]

        def recording(seqs: list[int], rows: Any, logits: Any) -> Any:
            found = logits[: len(seqs)].astype(np.float32).get()
            for seq, row in zip(seqs, found, strict=True):
                self._seen.setdefault(seq, []).append(row)
            return enqueue(seqs, rows, logits)

        shard._sampler.enqueue = recording  # type: ignore[union-attr, method-assign]
        self.tokens = [out.tokens for out in run(Ahead(shard), scheduler(shard), asked)]

    def assert_same(self, found: list[list[int]]) -> None:
        for seq, (ours, theirs) in enumerate(zip(found, self.tokens, strict=True)):

            def clear(position: int, rows: Any = self._seen[seq]) -> Any:
                return choice(rows[position], Sampling(temperature=0.0), [])

            assert_same_tokens(ours, theirs, clear, self._dtype)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_half_precision_gives_what_it_gives_without_guesses(kv: str) -> None:
    """The decode kernel, which reads keys that the same step appends."""
    draw = Random(1)
    asked = [
        Arrival(
            i // 2, [draw.randrange(10, 250) for _ in range(9 + i)], Sampling(temperature=0.0), 40
        )
        for i in range(6)
    ]
    halves = {"dtype": "float16", "kv_cache_dtype": kv}
    plain = Plain(asked, **halves)
    whole = [each.prompt + tokens for each, tokens in zip(asked, plain.tokens, strict=True)]
    shard = load("llama3", Oracle(whole, lambda seq, place: place % 7 == 0), **halves)
    plans = scheduler(shard)
    ours = run(Ahead(shard), plans, asked, depth=shard.info.depth)
    assert plans.stats().accepted_tokens > 60
    plain.assert_same([each.tokens for each in ours])


def by(small: str) -> dict[str, Any]:
    """A small checkpoint as the draft model."""
    return {"model": str(directory(small)), "num_speculative_tokens": 4}


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_model_guesses_itself_right(name: str, eager: bool) -> None:
    """What is likeliest, and what is drawn, but where two kernels' logits are as good as tied."""
    shard = load(name, how=by(name), enforce_eager=eager)
    ahead, plans = assert_like_the_cpu(name, shard, [0, 2, 6, 7])
    stats = plans.stats()
    assert stats.accepted_tokens >= 0.95 * stats.draft_tokens > 57
    assert ahead.steps < 45


@pytest.mark.parametrize("blocks", [34, 512])
@pytest.mark.parametrize("small", ["llama3", "qwen2"])
def test_a_draft_model_changes_no_token(small: str, blocks: int) -> None:
    _, plans = assert_like_the_cpu("llama3", load("llama3", how=by(small), num_kv_blocks=blocks))
    stats = plans.stats()
    assert 0 <= stats.accepted_tokens < stats.draft_tokens
    assert (stats.preemptions > 0) == (blocks == 34)


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_a_draft_model_in_half_precision_guesses_most(kv: str) -> None:
    shard = load("llama3", how=by("llama3"), dtype="float16", kv_cache_dtype=kv)
    plans = scheduler(shard)
    asked = [
        Arrival(i // 2, [7 + i, 20, 9, 30 + i] * 4, Sampling(temperature=0.4 * (i % 3), seed=i), 40)
        for i in range(6)
    ]
    run(Ahead(shard), plans, asked, depth=shard.info.depth)
    stats = plans.stats()
    assert stats.accepted_tokens > 0.8 * stats.draft_tokens > 80


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_medusa_heads_see_what_each_token_was_chosen_from(eager: bool, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="heads are written with it")
    from helpers.medusa_heads import heads_that_know, write_heads

    asked = Arrival(0, [20, 21, 22, 23, 24], Sampling(temperature=0.0), 30)
    heads, answer = heads_that_know(directory("llama3"), asked, 3)
    how = {"method": "medusa", "model": str(write_heads(tmp_path, heads))}
    shard = load("llama3", how=how, enforce_eager=eager)
    plans = scheduler(shard)
    (found,) = run(Ahead(shard), plans, [asked], depth=shard.info.depth)
    assert found.tokens == answer
    assert plans.stats().accepted_tokens >= plans.stats().draft_tokens - 3 > 12


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_medusa_heads_in_half_precision_change_no_token(dtype: str, tmp_path: Path) -> None:
    """They guess by rounded states, so what is right of it is luck."""
    pytest.importorskip("safetensors", reason="heads are written with it")
    from helpers.medusa_heads import heads_that_know, write_heads

    asked = Arrival(0, [20, 21, 22, 23, 24], Sampling(temperature=0.0), 30)
    heads, _ = heads_that_know(directory("llama3"), asked, 3)
    how = {"method": "medusa", "model": str(write_heads(tmp_path, heads))}
    shard = load("llama3", how=how, dtype=dtype)
    plans = scheduler(shard)
    found = run(Ahead(shard), plans, [asked], depth=shard.info.depth)
    assert plans.stats().draft_tokens > 0
    Plain([asked], dtype=dtype).assert_same([each.tokens for each in found])


def test_guesses_that_are_drawn_keep_the_distribution() -> None:
    found, right = write_on(CudaDevice(), texts=64, steps=1000, room=2, temperature=0.8)
    assert sum(map(len, found)) > 100_000
    assert 0.2 < right / (64 * 2 * 999) < 0.9
    assert chi_square(found, 0.8) < MOST
    assert chi_square(found, 0.9) > MOST
    host, _ = write_on(HostDevice(), texts=64, steps=4, room=2, temperature=0.8)
    assert [ours[: len(text)] for ours, text in zip(found, host, strict=True)] == host


KINDS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.8, seed=3, top_p=0.9),
    Sampling(temperature=0.0, repetition_penalty=1.4, presence_penalty=0.6),
    Sampling(temperature=1.1, seed=4, top_k=40, logprobs=2),
    Sampling(temperature=0.0, stop_token_ids=[7], min_tokens=2),
]


@pytest.mark.parametrize("kinds", [[0] * 5, [0, 1, 2, 3, 4], [1]], ids=str)
@pytest.mark.parametrize("vocab", [272, 151936])
def test_rounds_choose_what_one_row_after_the_other_does(kinds: list[int], vocab: int) -> None:
    """Three rounds, of which sequence i stays in as its drafts are right."""
    import cupy

    device = CudaDevice()
    rng = np.random.default_rng(len(kinds))
    count = len(kinds)
    rounds = [rng.normal(0, 3, (count, vocab)).astype(np.float32) for _ in range(3)]
    rounds[1][:, 7] = rounds[0][:, 7] = 30.0  # a token that two rounds would choose, if they may
    starts = [
        SequenceStart(seq, [1, 2, 3], 3, 0, [], KINDS[kind]) for seq, kind in enumerate(kinds)
    ]
    host = Sampler(vocab)
    for start in starts:
        host.start(start)
    # What comes where all is right; then drafts of which some are wrong.
    seqs = list(range(count))
    right = [host.sample(seqs, logits)[0] for logits in rounds]
    drafts = np.array(right[:2], np.int32)
    drafts[0, 1::3] += 1
    drafts[1, 2::3] += 1
    with device.current():
        sampler = DeviceSampler(device, vocab, count)
        for row, start in enumerate(starts):
            sampler.start(start, row)
        index = [cupy.arange(count, dtype=np.int32) for _ in range(3)]
        held = [cupy.asarray(logits) for logits in rounds]
        queued = [
            sampler.enqueue(seqs, index[0], held[0]),
            *(
                sampler.enqueue_next(seqs, rows, cupy.asarray(guesses), logits)
                for rows, guesses, logits in zip(index[1:], drafts, held[1:], strict=True)
            ),
        ]
        found = [sampler.collect(each) for each in queued]
        newest = sampler.last_tokens.get().tolist()
    for seq in seqs:
        expected = [right[0][seq]]
        if drafts[0, seq] == right[0][seq]:
            expected.append(right[1][seq])
            if drafts[1, seq] == right[1][seq]:
                expected.append(right[2][seq])
        assert [tokens[seq] for tokens, _, _ in found][: len(expected)] == expected
        assert {tokens[seq] for tokens, _, _ in found[len(expected) :]} <= {-1}
        assert newest[seq] == expected[-1]
    assert not any(failed for _, _, failed in found)


PHRASES = [[(7 * i + j) % 80 + 3 for j in range(3 + i % 4)] * 3 for i in range(8)]
SMALL: dict[str, Any] = {
    **{"device": "cuda", "dtype": "float32", "num_kv_blocks": 512, "block_size": 16},
    **{"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64},
}


@pytest.fixture
def cheap_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = EngineConfig.scheduler

    def scheduler(config: EngineConfig, info: ShardInfo) -> Scheduler:
        if info.drafting is not None:
            drafting = msgspec.structs.replace(info.drafting, **CHEAP)
            info = msgspec.structs.replace(info, drafting=drafting)
        return made(config, info)

    monkeypatch.setattr(EngineConfig, "scheduler", scheduler)


def assert_guesses_change_nothing(
    name: str,
    settings: dict[str, Any],
    adapters: Sequence[LoRARequest | None] | None = None,
    how: dict[str, Any] = NGRAM,
) -> None:
    """Without `settings` and guesses, and with both."""
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=2, ignore_eos=True)
    lora = {} if adapters is None else {"enable_lora": True, "max_loras": len(adapters)}
    found = []
    for changes in ({}, {"speculative_config": how, **settings}):
        with LLM(str(directory(name)), **SMALL, **lora, **changes) as llm:
            outputs = llm.generate(PHRASES, params, lora_request=adapters)
            found.append([output.outputs[0] for output in outputs])
            right = llm.engine.scheduler.stats().accepted_tokens
    assert right > 0
    for plain, ours in zip(*found, strict=True):
        assert plain.logprobs is not None
        margins = [entry.top[0].logprob - entry.top[1].logprob for entry in plain.logprobs]
        assert_same_tokens(ours.token_ids, plain.token_ids, margins)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama3", {}),
        ("gemma3", {}),
        ("llama3", {"enforce_eager": True}),
        ("mixtral", {"enable_expert_parallel": True}),
    ],
    ids=str,
)
def test_two_gpus_run_the_same_drafts(
    name: str, settings: dict[str, Any], cheap_drafts: None
) -> None:
    if gpu_count() < 2:
        pytest.skip("needs two GPUs")
    assert_guesses_change_nothing(name, {"tensor_parallel_size": 2, **settings})


def test_another_gpu_is_handed_what_a_draft_model_guesses(cheap_drafts: None) -> None:
    if gpu_count() < 2:
        pytest.skip("needs two GPUs")
    for name in ("llama3", "gemma3"):
        assert_guesses_change_nothing(name, {"tensor_parallel_size": 2}, how=by(name))


def test_another_gpu_is_handed_what_medusa_heads_guess(tmp_path: Path, cheap_drafts: None) -> None:
    if gpu_count() < 2:
        pytest.skip("needs two GPUs")
    pytest.importorskip("safetensors", reason="heads are written with it")
    from helpers.medusa_heads import heads_that_know, write_heads

    known = Arrival(0, PHRASES[0], Sampling(temperature=0.0), 30)
    heads, _ = heads_that_know(directory("llama3"), known, 3)
    how = {"method": "medusa", "model": str(write_heads(tmp_path, heads))}
    assert_guesses_change_nothing("llama3", {"tensor_parallel_size": 2}, how=how)


@pytest.mark.parametrize("gpus", [1, 2])
def test_guesses_run_with_the_adapter_of_their_sequence(
    gpus: int, tmp_path: Path, cheap_drafts: None
) -> None:
    if gpu_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    pytest.importorskip("safetensors", reason="adapters are written with it")
    from helpers.lora_files import write_adapters

    paths = write_adapters("llama3", tmp_path)[: len(PHRASES) - 1]
    adapters = [LoRARequest(path.name, i, str(path)) for i, path in enumerate(paths, 1)]
    asked = [None] * (len(PHRASES) - len(adapters)) + adapters
    assert_guesses_change_nothing("llama3", {"tensor_parallel_size": gpus}, asked)
