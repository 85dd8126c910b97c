"""Shards in processes of their own: as in one, and heard when they fail or die."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from helpers.equality import assert_same_tokens
from helpers.tiny_models import directory

from tensorray.actors.kv_cache import KVCacheError
from tensorray.actors.shard_process import ShardProcess
from tensorray.cluster import llm as llm_module
from tensorray.cluster.assembly import GenerationFailed
from tensorray.cluster.llm import LLM, SamplingParams

SMALL: dict[str, Any] = {"num_kv_blocks": 128, "block_size": 4, "max_num_batched_tokens": 24}
SMALL |= {"max_num_seqs": 8, "max_model_len": 64, "num_threads": 1}
TP2 = {"tensor_parallel_size": 2}
PROMPTS = [[(7 * i + j) % 80 + 3 for j in range(3 + 4 * (i % 6))] for i in range(6)]


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have layouts' shards in processes, as they are on GPUs."""
    monkeypatch.setattr(llm_module, "_on_gpus", lambda config: True)


def processes(llm: LLM) -> list[ShardProcess]:
    holders = llm._shards[0].holders
    found = [each for each in holders if isinstance(each, ShardProcess)]
    assert len(found) == len(holders)
    return found


def test_they_answer_as_threads_do_and_the_loss_of_one_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2, ignore_eos=True)
    model = str(directory("llama3"))
    with LLM(model, **SMALL, **TP2) as llm:
        found = llm.generate(PROMPTS, params)
        shards = processes(llm)
        assert len({os.getpid(), *(shard.pid for shard in shards)}) == 3
        os.kill(shards[1].pid, signal.SIGKILL)
        with pytest.raises(GenerationFailed):
            llm.generate(PROMPTS, params)
        with pytest.raises(RuntimeError, match="process of shard 1 has ended: signal SIGKILL"):
            shards[1].adapters()
        assert shards[0].adapters() == []
    with monkeypatch.context() as patch:
        patch.setattr(llm_module, "_on_gpus", lambda config: False)
        with LLM(model, **SMALL, **TP2) as llm:
            expected = llm.generate(PROMPTS, params)
    for one, other in zip(found, expected, strict=True):
        (ours,), (theirs,) = one.outputs, other.outputs
        assert theirs.logprobs is not None
        margins = [entry.top[0].logprob - entry.top[1].logprob for entry in theirs.logprobs]
        assert_same_tokens(ours.token_ids, theirs.token_ids, margins)


def test_what_keeps_one_from_loading_is_raised_here() -> None:
    with pytest.raises(KVCacheError, match="num-kv-blocks"):
        LLM(str(directory("llama3")), **SMALL | {"num_kv_blocks": 2}, **TP2)
