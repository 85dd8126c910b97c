"""One shard, step by step: what it reports beside tokens, and what it does when logits go bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.running import RecordingShard, make_shard
from helpers.tiny_models import directory

from tensorray.actors.config import ShardConfig
from tensorray.actors.kv_cache import KVCacheError
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan
from tensorray.actors.shard import Shard

MODEL = directory("llama3")
PROMPT = [5, 17, 40, 33, 61, 8, 29, 54, 12, 71]


def start(seq: int, sampling: Sampling, tokens: list[int] = PROMPT) -> SequenceStart:
    blocks = [[1 + 4 * seq + i for i in range(4)]]
    return SequenceStart(seq, tokens, len(PROMPT), 0, blocks, sampling)


def log_softmax(row: np.ndarray) -> np.ndarray:
    row = row.astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def test_prompt_logprobs_are_those_of_the_logits_row_before_each_token():
    shard = make_shard(MODEL, kind=RecordingShard)
    sampling = Sampling(temperature=0.0, prompt_logprobs=3, logprobs=2)
    first = shard.execute(StepPlan(0, [0], [4], starts=[start(0, sampling)]))
    assert first.tokens == []
    second = shard.execute(StepPlan(1, [0], [6]))
    entries = first.prompt_logprobs[0] + second.prompt_logprobs[0]
    assert [entry.token for entry in entries] == PROMPT[1:]
    rows = [log_softmax(row) for row in shard.rows]
    assert len(rows) == len(PROMPT)  # nine prompt tokens were scored, and one was sampled
    for entry, row in zip(entries, rows, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token], abs=1e-5)
        assert entry.rank == 1 + (row > row[entry.token]).sum()
        assert entry.top_tokens == list(np.argsort(-row)[:3])
    sampled = second.logprobs[0]
    assert sampled.token == second.tokens[0] == rows[-1].argmax()
    assert sampled.logprob == pytest.approx(rows[-1].max(), abs=1e-5)


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened():
    sampling = Sampling(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, seed=11)
    shard = make_shard(MODEL)
    tokens = shard.execute(StepPlan(0, [0], [10], starts=[start(0, sampling)])).tokens
    for step in range(1, 6):
        tokens += shard.execute(StepPlan(step, [0], [1])).tokens
    again = make_shard(MODEL)
    again.execute(StepPlan(0, [0], [10], starts=[start(0, sampling)]))
    resumed = start(0, sampling, PROMPT + tokens[:3])
    result = again.execute(StepPlan(1, [0], [13], starts=[resumed], ends=[0]))
    redone = result.tokens
    for step in range(2, 4):
        redone += again.execute(StepPlan(step, [0], [1])).tokens
    assert redone == tokens[3:]


@pytest.mark.parametrize("asked", [{}, {"prompt_logprobs": 1}])
def test_logits_that_are_not_finite_fail_their_sequence_alone(asked):
    class Poisoned(Shard):
        def _logits(self, batch, hidden):
            logits = super()._logits(batch, hidden).copy()
            logits[batch.logit_rows < 10, 3] = np.nan  # the first sequence's rows
            return logits

    shard = make_shard(MODEL, kind=Poisoned)
    greedy = Sampling(temperature=0.0, **asked)
    plan = StepPlan(0, [0, 1], [10, 10], starts=[start(0, greedy), start(1, greedy)])
    result = shard.execute(plan)
    assert result.seqs == [1]
    assert len(result.tokens) == 1
    assert list(result.failed) == [0]
    assert "NaN" in result.failed[0]


def test_a_step_without_sequences_only_ends_them():
    shard = make_shard(MODEL, max_num_seqs=1)
    greedy = Sampling(temperature=0.0)
    shard.execute(StepPlan(0, [0], [10], starts=[start(0, greedy)]))
    assert shard.execute(StepPlan(1, [], [], ends=[0])).tokens == []
    # The one row there is must be free again.
    assert shard.execute(StepPlan(2, [1], [10], starts=[start(1, greedy)])).seqs == [1]


def test_load_reports_what_it_holds():
    shard = Shard.load(ShardConfig(str(MODEL), max_model_len=32, num_kv_blocks=9, block_size=8))
    assert shard.info.weight_bytes == sum(
        path.stat().st_size for path in MODEL.glob("*.safetensors")
    ) - header_bytes(MODEL / "model.safetensors")
    assert shard.info.kv.num_blocks == 9
    assert shard.info.max_model_len == 32


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_model_len": 10**6}, ValueError, "max-model-len 1000000 is more than"),
        ({"num_kv_blocks": 2, "max_model_len": 64}, KVCacheError, "--num-kv-blocks"),
        ({"model_class": "no.such.module:Model"}, ValueError, "no.such.module"),
    ],
)
def test_what_can_not_be_served_is_refused_at_load(settings, error, message):
    with pytest.raises(error, match=message):
        Shard.load(ShardConfig(str(MODEL), **settings))
