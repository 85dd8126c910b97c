"""GPU shards of one replica, on NumPy arrays and host collectives, choose one shard's tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import odd_tokens
from helpers.gpu_shards import StepwiseShard, make_gpu_shard
from helpers.host_device import HostDevice
from helpers.tiny_models import directory

from tensorray.actors import shard_host
from tensorray.actors.communicator import CommunicatorError
from tensorray.actors.config import ShardConfig
from tensorray.actors.gpu_shard import GraphSizes, Limits
from tensorray.actors.logits_processors import load_registry
from tensorray.cluster.assembly import GenerationFailed
from tensorray.cluster.llm import LLM, SamplingParams

SMALL: dict[str, Any] = {"num_kv_blocks": 512, "block_size": 4, "max_num_batched_tokens": 24}
SMALL |= {"max_num_seqs": 8, "max_model_len": 64}
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
PP3 = {"pipeline_parallel_size": 3}
LIMITS = Limits(max_model_len=64, max_num_seqs=8, step_tokens=24)


def on_arrays(config: ShardConfig) -> StepwiseShard:
    """A GPU shard on NumPy arrays; the ranks' caches differ in size, as GPUs' free memory does."""
    return make_gpu_shard(
        Path(config.model),
        limits=LIMITS,
        layout=config.layout,
        device=HostDevice(),
        graphs=GraphSizes([1, 2, 4, 8], [8, 16, 24]),
        num_blocks=60 + config.layout.rank,
        vocabulary=config.vocabulary,
        processors=load_registry(config.logits_processors),
    )


@contextmanager
def gpus(
    monkeypatch: pytest.MonkeyPatch, name: str, **layout: Any
) -> Iterator[tuple[LLM, list[StepwiseShard]]]:
    made: list[StepwiseShard] = []

    def load(config: ShardConfig, gpu: int) -> StepwiseShard:
        assert gpu == len(made) == config.rank
        made.append(on_arrays(config))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(shard_host, "load_executor", load)
        with LLM(str(directory(name)), **SMALL, **layout) as llm:
            yield llm, made


PROMPTS = [[(7 * i + j) % 80 + 3 for j in range(3 + 4 * (i % 6))] for i in range(12)]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama3", TP2),
        ("llama3", PP2),
        ("gemma3", TP2),
        ("gemma3", PP3),
        ("mixtral", TP2 | {"enable_expert_parallel": True}),
        ("llama3", TP2 | PP2),
    ],
    ids=str,
)
def test_a_layout_chooses_the_tokens_of_one_shard(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: Any
) -> None:
    """Greedy and drawn, chunks and decodes mixed, from graphs; ends at any time."""
    params = [
        SamplingParams(
            temperature=0.9 * (i % 2),
            seed=i,
            repetition_penalty=1.1,
            max_tokens=4 + 3 * (i % 5),
            logprobs=1,
            prompt_logprobs=1 if i % 3 == 0 else None,
            ignore_eos=True,
        )
        for i in range(len(PROMPTS))
    ]
    with LLM(str(directory(name)), device="cpu", **SMALL) as llm:
        expected = llm.generate(PROMPTS, params)
    with gpus(monkeypatch, name, **layout) as (llm, shards):
        found = llm.generate(PROMPTS, params)
        # All agree on the smallest cache, and met before they recorded their graphs.
        assert {shard.info.kv.num_blocks for shard in shards} == {60}
        assert all(shard._device.recorded > 0 for shard in shards)
        stats = llm.engine.scheduler.stats()
        assert stats.free_blocks == stats.total_blocks
    for ours, theirs in zip(found, expected, strict=True):
        (one,), (other,) = ours.outputs, theirs.outputs
        assert one.token_ids == other.token_ids
        if theirs.prompt_logprobs is not None:
            assert ours.prompt_logprobs is not None
            for a, b in zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
                assert a is not None
                assert b is not None
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


STEERED: list[dict[str, Any]] = [
    {"logits_processors": [{"name": "Odd"}]},
    {"bad_words": [[5, 6], [7]]},
    {"no_repeat_ngram_size": 2},
    {},
]


@pytest.mark.parametrize(
    ("name", "layout"), [("llama3", PP2), ("gemma3", PP3), ("llama3", TP2 | PP2)], ids=str
)
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_pipeline_goes_on_while_its_last_stage_waits_for_logits(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: Any, at_once: int
) -> None:
    """What steers a sequence has to see its last token, or its logits, before the next choice:
    and these come only if the first stage is told the tokens of the step before."""
    steering = {"logits_processors": [f"{odd_tokens.__file__}:Odd"]}
    params = [
        SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, **each) for each in STEERED
    ]
    with LLM(str(directory(name)), device="cpu", **SMALL, **steering) as llm:
        expected = llm.generate(PROMPTS[:4], params)
    with gpus(monkeypatch, name, **steering, **layout) as (llm, _):
        found = [
            output
            for i in range(0, 4, at_once)
            for output in llm.generate(PROMPTS[i : i + at_once], params[i : i + at_once])
        ]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids


def _aborted(shard: StepwiseShard) -> bool:
    assert shard._ranks is not None
    try:
        shard._ranks.check()
    except CommunicatorError as error:
        return "aborted" in str(error)
    return False


def test_a_shard_that_fails_wakes_the_others_and_all_join_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with gpus(monkeypatch, "llama3", **TP2) as (llm, shards):
        run = shards[1]._forward.run

        def fail(step: Any) -> Any:
            raise MemoryError("out of luck")

        shards[1]._forward.run = fail  # type: ignore[method-assign]
        with pytest.raises(GenerationFailed, match="out of luck"):
            llm.generate(PROMPTS, params)
        # The client hears of it from the first shard that tells; the others may still be aborting.
        deadline = time.monotonic() + 60
        while not all(map(_aborted, shards)):
            assert time.monotonic() < deadline, "a shard was not woken"
            time.sleep(0.01)
        shards[1]._forward.run = run  # type: ignore[method-assign]

        recorded = [shard._device.recorded for shard in shards]
        members = [host.loaded.peers for host in llm._shards[0].holders]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda host: host.join(1, members, 60), llm._shards[0].holders))
        for shard, before in zip(shards, recorded, strict=True):
            assert shard._device.recorded == 2 * before
            assert shard._ranks is not None
            shard._ranks.check()
