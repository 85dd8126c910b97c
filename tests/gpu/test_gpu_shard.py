"""The GPU shard against the CPU's, on small checkpoints of every family.

python3 -m pytest tests/gpu/test_gpu_shard.py -q --import-mode=importlib -p no:cacheprovider
"""

from __future__ import annotations

import gc
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.beam_cases import GOLDEN, assert_searched, searches
from helpers.device_memory import used_by_process, used_of_device
from helpers.dummy_models import make_dummy_model
from helpers.equality import DType, assert_same_tokens, choice
from helpers.running import Arrival, make_shard, run
from helpers.tiny_models import NAMES, directory, references

from tensorray.actors.config import ShardConfig
from tensorray.actors.device import find_device
from tensorray.actors.gpu_shard import GpuShard
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan, StepResult
from tensorray.cluster.llm import LLM, SamplingParams
from tensorray.cluster.scheduler import Scheduler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_device() is None, reason="needs a GPU that CuPy can use"),
]

# Relative error of the norm, over all logits of a prompt.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
GREEDY = Sampling(temperature=0.0)


class Recording(GpuShard):
    """Keeps every row of logits it sampled from, by sequence."""

    def submit(self, plan: StepPlan) -> Any:
        if not hasattr(self, "seen"):
            self.seen: dict[int, list[np.ndarray]] = {}
            enqueue = self._sampler.enqueue

            def recording(seqs: list[int], rows: Any, logits: Any) -> Any:
                made = logits[: len(seqs)].astype(np.float32).get()
                for seq, row in zip(seqs, made, strict=True):
                    self.seen.setdefault(seq, []).append(row)
                return enqueue(seqs, rows, logits)

            self._sampler.enqueue = recording  # type: ignore[method-assign]
        return super().submit(plan)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.submit(plan)()


def load(name: str, kind: type[Recording] = Recording, **settings: Any) -> Recording:
    settings = {"dtype": "float32", "segment_backend": "kernels", **settings}
    return kind.load(
        ShardConfig(
            str(directory(name)),
            device="cuda",
            max_model_len=64,
            block_size=4,
            num_kv_blocks=512,
            max_num_seqs=16,
            max_num_batched_tokens=64,
            **settings,
        )
    )


def scheduler(shard: Any, budget: int = 64, max_num_seqs: int = 16) -> Scheduler:
    return Scheduler(
        shard.info.kv,
        max_model_len=64,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
    )


def arrivals(count: int = 12, sampled: bool = True) -> list[Arrival]:
    rng = np.random.default_rng(7)
    found = []
    for i in range(count):
        prompt = rng.integers(3, 90, rng.integers(1, 40)).tolist()
        draws = sampled and i % 2
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=i) if draws else GREEDY
        found.append(Arrival(i // 3, prompt, sampling, 18))
    return found


@cache
def alone_on_the_cpu(name: str, index: int) -> tuple[list[int], list[np.ndarray]]:
    from helpers.running import RecordingShard

    shard = make_shard(directory(name), kind=RecordingShard)
    arrival = arrivals()[index]
    lone = Arrival(0, arrival.prompt, arrival.sampling, arrival.max_tokens)
    (outcome,) = run(shard, scheduler(shard), [lone])
    return outcome.tokens, shard.rows


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_cpu_path_s(name: str, eager: bool) -> None:
    shard = load(name, enforce_eager=eager)
    outcomes = run(shard, scheduler(shard), arrivals())
    for index, (outcome, arrival) in enumerate(zip(outcomes, arrivals(), strict=True)):
        tokens, rows = alone_on_the_cpu(name, index)

        def clear(position: int, arrival: Any = arrival, rows: Any = rows, tokens: Any = tokens):
            return choice(rows[position], arrival.sampling, tokens[:position], arrival.prompt)

        assert_same_tokens(outcome.tokens, tokens, clear)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_within_rounding(name: str, dtype: str) -> None:
    shard = load(name, dtype=dtype)
    for seq, reference in enumerate(references(name)[:3]):
        prompt = reference.prompt[:40]
        # Prefixes of it: logits after few and many tokens.
        for length in sorted({1, max(1, len(prompt) // 2), len(prompt)}):
            seq_id = 100 * seq + length
            start = SequenceStart(
                seq_id, prompt[:length].tolist(), length, 0, blocks(shard, length), GREEDY
            )
            shard.execute(StepPlan(0, [seq_id], [length], starts=[start]))
            shard.execute(StepPlan(1, [], [], ends=[seq_id]))
            (row,) = shard.seen[seq_id]
            expected = reference.logits[length - 1].astype(np.float64)
            error = np.linalg.norm(row - expected) / np.linalg.norm(expected)
            assert error < TOLERANCE[dtype], f"{length} tokens"


def blocks(shard: GpuShard, tokens: int) -> list[list[int]]:
    count = -(-tokens // shard.info.kv.block_size)
    groups = len(shard.info.kv.windows)
    return [[1 + group * count + i for i in range(count)] for group in range(groups)]


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_graphs_give_what_eager_steps_give(name: str, dtype: DType) -> None:
    by_graphs, eagerly = (load(name, dtype=dtype, enforce_eager=eager) for eager in (False, True))
    ours = run(by_graphs, scheduler(by_graphs), arrivals(sampled=False))
    theirs = run(eagerly, scheduler(eagerly), arrivals(sampled=False))
    for seq, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        rows = eagerly.seen[seq]

        def clear(position: int, rows: Any = rows):
            return choice(rows[position], GREEDY, [])

        assert_same_tokens(our.tokens, their.tokens, clear, dtype)


def test_two_steps_in_flight_give_what_one_gives() -> None:
    shard = load("llama3")
    one = run(shard, scheduler(shard), arrivals())
    shard.reset()
    results, plans = [], scheduler(shard)
    two = run(_Ahead(shard), plans, arrivals(), depth=2)
    assert [each.tokens for each in two] == [each.tokens for each in one]
    assert results == []


class _Ahead:
    """Results are read only after the next step has been started."""

    def __init__(self, shard: GpuShard) -> None:
        self.info = shard.info
        self._shard = shard

    def execute(self, plan: StepPlan) -> Any:
        return _Late(self._shard.submit(plan))


class _Late:
    """A result that is waited for when it is looked at."""

    def __init__(self, pending: Any) -> None:
        self._pending = pending
        self._result: StepResult | None = None

    def __getattr__(self, name: str) -> Any:
        if self._result is None:
            self._result = self._pending()
        return getattr(self._result, name)


def test_prompt_logprobs_are_the_cpu_path_s() -> None:
    shard, cpu = load("qwen3"), make_shard(directory("qwen3"))
    prompt = list(range(3, 53))
    sampling = Sampling(temperature=0.0, prompt_logprobs=3, logprobs=2)
    for each in (shard, cpu):
        start = SequenceStart(
            0, prompt, 50, 0, [list(range(1, 14))] * len(each.info.kv.windows), sampling
        )
        first = each.execute(StepPlan(0, [0], [20], starts=[start]))
        second = each.execute(StepPlan(1, [0], [30]))
        scores = first.prompt_logprobs[0] + second.prompt_logprobs[0]
        if each is shard:
            ours, sampled = scores, second.logprobs[0]
    assert [entry.token for entry in ours] == prompt[1:]
    for our, their in zip(ours, scores, strict=True):
        assert our.logprob == pytest.approx(their.logprob, abs=1e-3)
        assert our.top_logprobs == pytest.approx(their.top_logprobs, abs=1e-3)
    assert sampled.top_logprobs == pytest.approx(second.logprobs[0].top_logprobs, abs=1e-3)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_beam_searches_find_what_transformers_does(name: str) -> None:
    shard = load(name)
    found, tokens = searches(shard, scheduler(shard), name, GOLDEN[name], beside=3)
    for each, case in zip(found, GOLDEN[name], strict=True):
        assert_searched(each, case)
    cpu = make_shard(directory(name))
    _, expected = searches(cpu, scheduler(cpu), name, [], beside=3)
    assert tokens == expected


def test_an_fp8_cache_stays_close() -> None:
    exact, rough = (load("qwen3", dtype="float16", kv_cache_dtype=kv) for kv in ("auto", "fp8"))
    assert rough.info.kv_cache_bytes * 2 == exact.info.kv_cache_bytes
    for shard in (exact, rough):
        run(shard, scheduler(shard), arrivals(3, sampled=False))
    for seq in range(3):
        ours, theirs = rough.seen[seq][0], exact.seen[seq][0]
        # On NumPy arrays the same rounding makes 0.03 to 0.06 on heads of this size.
        assert np.linalg.norm(ours - theirs) < 0.12 * np.linalg.norm(theirs)


def test_memory_does_not_grow() -> None:
    import cupy

    used = used_by_process() or cupy.get_default_memory_pool().total_bytes
    shard = load("mixtral", dtype="float16", kind=GpuShard)  # type: ignore[arg-type]
    stepwise = _Ahead(shard)
    run(stepwise, scheduler(stepwise), arrivals(12), depth=2)
    gc.collect()
    before = used()
    for _ in range(10):
        shard.reset()
        run(stepwise, scheduler(stepwise), arrivals(12), depth=2)
    assert used() - before < 4 << 20


def test_serving_takes_no_memory_that_the_start_did_not(tmp_path: Path) -> None:
    """At a published vocabulary: many at once, drawn, penalized, with log-probabilities, scored."""
    model = make_dummy_model("Qwen3-0.6B", tmp_path)
    settings: dict[str, Any] = {"load_format": "dummy", "num_kv_blocks": 4000, "dtype": "float16"}
    with LLM(str(model), device="cuda", max_model_len=512, **settings) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0))
        used = used_by_process() or used_of_device
        before = used()
        params = [
            SamplingParams(
                max_tokens=8,
                seed=i,
                temperature=0.7 * (i % 3),
                frequency_penalty=0.1 * (i % 2),
                logprobs=i % 4,
                prompt_logprobs=5 if i % 8 == 0 else None,
                ignore_eos=True,
            )
            for i in range(400)
        ]
        llm.generate([[300 + i] * (1 + i % 200) for i in range(400)], params)
        assert used() - before < 4 << 20
