"""The GPU shard on NumPy arrays, against the CPU shard: all of it but CUDA and its kernels."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.equality import assert_same_tokens, choice
from helpers.gpu_shards import ArrayRunners, StepwiseShard, make_gpu_shard
from helpers.host_device import HostDevice
from helpers.running import Arrival, RecordingShard, make_shard, run
from helpers.tiny_models import NAMES, directory

from tensorray.actors.gpu_shard import GraphSizes, Limits
from tensorray.actors.link import PendingStep
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan, StepResult
from tensorray.cluster.scheduler import Scheduler
from tensorray.kernels import batch_sampling

LIMITS = Limits(max_model_len=64, max_num_seqs=8, step_tokens=40)
EAGER = GraphSizes([], [])
GREEDY = Sampling(temperature=0.0)


def arrivals(count: int = 12) -> list[Arrival]:
    """Prompts of all lengths, half of them with a common prefix, greedy and drawn in turn."""
    rng = np.random.default_rng(5)
    found = []
    for i in range(count):
        prompt = rng.integers(3, 90, rng.integers(1, 30)).tolist()
        if i % 4 < 2:
            prompt = [*range(3, 20), *prompt[:20]]
        sampling = GREEDY
        if i % 2:
            sampling = Sampling(
                temperature=0.9, top_k=12, seed=i, repetition_penalty=1.2, frequency_penalty=0.3
            )
        found.append(Arrival(i // 2, prompt, sampling, 16, cancel_after=9 if i == 5 else None))
    return found


def scheduler(shard: Any, *, caching: bool = True, max_num_seqs: int = 8) -> Scheduler:
    return Scheduler(
        shard.info.kv,
        max_model_len=64,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=40,
        enable_prefix_caching=caching,
    )


class Ahead:
    """Reads each result only after the next step was started, as an engine does."""

    def __init__(self, shard: StepwiseShard) -> None:
        self.info = shard.info
        self._shard = shard

    def execute(self, plan: StepPlan) -> Any:
        return Late(self._shard.submit(plan))


class Late:
    """A result that is waited for when it is looked at."""

    def __init__(self, pending: PendingStep) -> None:
        self._pending = pending
        self._result: StepResult | None = None

    def __getattr__(self, name: str) -> Any:
        if self._result is None:
            self._result = self._pending()
        return getattr(self._result, name)


def assert_like_the_cpu(path: Path, shard: StepwiseShard, **options: Any) -> None:
    ours = run(Ahead(shard), scheduler(shard, **options), arrivals(), depth=shard.info.depth)
    for our, arrival in zip(ours, arrivals(), strict=True):
        cpu = make_shard(path, kind=RecordingShard)
        lone = Arrival(0, arrival.prompt, arrival.sampling, arrival.max_tokens)
        (alone,) = run(cpu, scheduler(cpu, max_num_seqs=1), [lone])
        expected = alone.tokens
        if arrival.cancel_after is not None:
            expected = expected[: len(our.tokens)]

        def clear(position: int, a: Any = arrival, cpu: Any = cpu, alone: Any = alone) -> Any:
            return choice(cpu.rows[position], a.sampling, alone.tokens[:position], a.prompt)

        assert_same_tokens(our.tokens, expected, clear)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_cpu_shard_s(name: str) -> None:
    path = directory(name)
    assert_like_the_cpu(path, make_gpu_shard(path, limits=LIMITS))


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_tokens_without_graphs_and_with_few_blocks(name: str) -> None:
    path = directory(name)
    shard = make_gpu_shard(path, limits=LIMITS, graphs=EAGER, num_blocks=90)
    assert_like_the_cpu(path, shard, caching=False)


def test_steps_are_padded_to_few_sizes_and_recorded_once() -> None:
    device, runners = HostDevice(), ArrayRunners()
    graphs = GraphSizes([2, 8], [16, 40])
    shard = make_gpu_shard(
        directory("qwen3"), limits=LIMITS, graphs=graphs, device=device, runners=runners
    )
    assert device.recorded == 2 + 2 + 2  # decodes, layers over mixed steps, heads of those
    run(shard, scheduler(shard), arrivals())
    assert device.recorded == 6
    assert runners.rows == {2, 8, 16, 40}


class Pools(HostDevice):
    """Knows whether what is allocated comes from the memory that the start took."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.taken = True
        yield
        self.taken = False


def test_steps_without_graphs_and_scored_prompts_take_no_more_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, found = Pools(), []
    shard = make_gpu_shard(directory("qwen3"), limits=LIMITS, graphs=EAGER, device=device)
    runner = shard._forward._runner

    def noting(name: str) -> None:
        run = getattr(runner, name)

        def noted(*arguments: Any) -> Any:
            found.append((name, device.taken))
            return run(*arguments)

        monkeypatch.setattr(runner, name, noted)

    for name in ("body", "head", "head_of"):
        noting(name)
    sampling = Sampling(temperature=0.0, prompt_logprobs=1)
    shard.execute(StepPlan(0, [0], [30], starts=[start(0, list(range(3, 33)), sampling)]))
    assert found == [("body", True), ("head", True), ("head_of", True), ("head", True)]
    assert not device.taken


def test_graphs_are_reckoned_with_before_the_cache_is_sized() -> None:
    for graphs, count in ((EAGER, 0), (GraphSizes([1, 2], [16, 40]), 6)):  # two of them heads
        device = HostDevice(memory=1 << 30)
        make_gpu_shard(directory("qwen3"), limits=LIMITS, graphs=graphs, device=device)
        assert device.offered == (1 << 30) - count * 2**20


def test_the_start_takes_what_sampling_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(batch_sampling, "prepare", lambda *arguments: taken.append(arguments))
    make_gpu_shard(directory("qwen3"), limits=LIMITS)
    ((state, dtype, scored),) = taken
    assert (len(state.rows), dtype, scored) == (8, np.float32, 40)


def test_sizes_follow_from_limits_or_what_is_asked() -> None:
    chosen = GraphSizes.choose(LIMITS, (), eager=False)
    assert chosen.decodes == [1, 2, 4, 8]
    assert chosen.bodies == [16, 32, 40]
    assert GraphSizes.choose(LIMITS, (4, 30, 99), eager=False) == GraphSizes([4], [4, 30])
    assert GraphSizes.choose(LIMITS, (4, 30, 99), eager=True) == EAGER


def start(seq: int, tokens: list[int], sampling: Sampling) -> SequenceStart:
    return SequenceStart(
        seq, tokens, len(tokens), 0, [[1 + 8 * seq + i for i in range(8)]], sampling
    )


def test_prompt_logprobs_are_the_cpu_shard_s() -> None:
    path = directory("llama3")
    prompt = list(range(3, 33))
    found = []
    for shard in (make_gpu_shard(path, limits=LIMITS), make_shard(path)):
        sampling = Sampling(temperature=0.0, prompt_logprobs=3, logprobs=2)
        first = shard.execute(StepPlan(0, [0], [11], starts=[start(0, prompt, sampling)]))
        second = shard.execute(StepPlan(1, [0], [19]))
        found.append((first.prompt_logprobs[0] + second.prompt_logprobs[0], second.logprobs[0]))
    (ours, our_choice), (theirs, their_choice) = found
    assert [entry.token for entry in ours] == prompt[1:]
    for our, their in zip([*ours, our_choice], [*theirs, their_choice], strict=True):
        assert our.token == their.token
        assert our.rank == their.rank
        assert our.top_tokens == their.top_tokens
        assert our.logprob == pytest.approx(their.logprob, abs=1e-5)
        assert our.top_logprobs == pytest.approx(their.top_logprobs, abs=1e-5)


def test_an_fp8_cache_takes_a_byte_a_value_and_stays_close() -> None:
    prompt = list(range(3, 33))
    found = []
    for kv_dtype in ("float32", "uint8"):
        shard = make_gpu_shard(directory("qwen3"), limits=LIMITS, kv_dtype=kv_dtype)
        logprobs = Sampling(temperature=0.0, logprobs=-1)
        plan = StepPlan(0, [0], [30], starts=[start(0, prompt, logprobs)])
        entry = shard.execute(plan).logprobs[0]
        scores = dict(zip(entry.top_tokens, entry.top_logprobs, strict=True))
        found.append((shard.info.kv_cache_bytes, [scores[token] for token in sorted(scores)]))
    (exact_bytes, exact), (rough_bytes, rough) = found
    assert exact_bytes == 4 * rough_bytes
    assert exact != rough
    assert np.abs(np.subtract(rough, exact)).max() < 0.5


@pytest.mark.parametrize("asked", [{}, {"prompt_logprobs": 1}])
def test_logits_that_are_not_finite_fail_their_sequence_alone(asked: dict[str, int]) -> None:
    shard = make_gpu_shard(directory("llama3"), limits=LIMITS, graphs=EAGER)
    head = shard._forward._runner.head

    def poisoned(rows: Any) -> Any:
        logits = head(rows)
        logits[:1, 3] = np.nan  # the first packed row, and the first sequence's logits
        return logits

    shard._forward._runner.head = poisoned  # type: ignore[method-assign]
    sampling = Sampling(temperature=0.0, **asked)
    starts = [start(0, [5, 6, 7], sampling), start(1, [8, 9, 10], GREEDY)]
    result = shard.execute(StepPlan(0, [0, 1], [3, 3], starts=starts))
    assert result.seqs == [1]
    assert len(result.tokens) == 1
    assert list(result.failed) == [0]
    assert "NaN" in result.failed[0]


def test_a_step_without_sequences_only_ends_them() -> None:
    shard = make_gpu_shard(directory("llama3"), limits=Limits(64, 1, 40))
    shard.execute(StepPlan(0, [0], [3], starts=[start(0, [5, 6, 7], GREEDY)]))
    assert shard.execute(StepPlan(1, [], [], ends=[0])).tokens == []
    # The one row there is must be free again.
    again = StepPlan(2, [1], [3], starts=[start(1, [5, 6, 7], GREEDY)])
    assert shard.execute(again).seqs == [1]


def test_a_new_router_finds_an_empty_shard() -> None:
    path = directory("llama3")
    shard = make_gpu_shard(path, limits=LIMITS)
    shard.submit(StepPlan(0, [7], [2], starts=[start(7, [5, 6, 7], GREEDY)]))  # in mid-prompt
    shard.reset()
    assert_like_the_cpu(path, shard)


def test_what_the_shard_reports() -> None:
    shard = make_gpu_shard(directory("llama3"), limits=LIMITS, num_blocks=77)
    assert shard.info.depth == 2
    assert shard.info.step_tokens == 40
    assert shard.info.kv.num_blocks == 77
    assert shard.info.max_model_len == 64
    assert shard.info.device == "NumPy"


def test_a_closed_shard_holds_no_arrays() -> None:
    shard = make_gpu_shard(directory("llama3"), limits=LIMITS)
    run(shard, scheduler(shard), arrivals(3))
    pages = weakref.ref(shard._forward._ops.kv[0].k_pages)
    weights = weakref.ref(shard._forward._runner)
    shard.close()
    assert pages() is None
    assert weights() is None
