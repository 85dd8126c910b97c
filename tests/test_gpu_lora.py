"""LoRA adapters of a GPU shard on NumPy arrays: all of them but CUDA and its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.equality import assert_same_tokens
from helpers.gpu_shards import StepwiseShard, make_gpu_shard
from helpers.host_device import HostDevice
from helpers.lora_cases import (
    GREEDY,
    LORA,
    assert_same,
    first_choice,
    margins_of,
    merged_answers,
    requests,
)
from helpers.lora_files import (
    merge,
    prompt,
    read_files,
    write_adapter,
    write_adapters,
    write_files,
)
from helpers.quantized_files import gptq, quantize_model, write_plain
from helpers.tiny_models import directory

from tensorray.actors import shard_host
from tensorray.actors.adapter import Adapter
from tensorray.actors.config import ShardConfig
from tensorray.actors.device_drafts import DeviceDrafts
from tensorray.actors.gpu_shard import GraphSizes, Limits
from tensorray.actors.lookup_drafter import LookupDrafter
from tensorray.actors.protocol import Drafting, Sampling, SequenceStart, StepPlan
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.cluster import llm as llm_module
from tensorray.cluster.assembly import GenerationFailed
from tensorray.cluster.llm import LLM, LoRARequest, SamplingParams
from tensorray.cluster.outputs import RequestOutput
from tensorray.kernels.lora import Stack, expand_numpy, shrink_numpy

GOLDEN = Path(__file__).parent / "fixtures" / "lora"
LIMITS = Limits(max_model_len=64, max_num_seqs=16, step_tokens=48)
GRAPHS = GraphSizes([1, 4, 16], [16, 48])


@contextmanager
def on_arrays(
    monkeypatch: pytest.MonkeyPatch,
    model: Path,
    slots: int = 8,
    drafting: Drafting | None = None,
    **settings: Any,
) -> Iterator[tuple[LLM, list[StepwiseShard]]]:
    """An LLM on GPU shards that are NumPy arrays, with adapters; with `drafting`, guesses too."""
    made: list[StepwiseShard] = []

    def load(config: ShardConfig, gpu: int) -> StepwiseShard:
        drafts = None
        if drafting is not None:
            samples = config.rank == config.layout.sampler
            drafter = LookupDrafter(1, 5) if samples else None
            drafts = DeviceDrafts(drafter, drafting, measured=True)
        shard = make_gpu_shard(
            Path(config.model),
            limits=LIMITS,
            graphs=GRAPHS if drafts is None else replace(GRAPHS, chains=[12, 36]),
            layout=config.layout,
            adapters=config.max_loras,
            drafts=drafts,
        )
        made.append(shard)
        return shard

    with monkeypatch.context() as patch:
        for module in (llm_module, shard_host):
            patch.setattr(module, "load_executor", load)
        with LLM(str(model), **LORA, max_loras=slots, **settings) as llm:
            assert len(made) == llm.config.num_shards
            yield llm, made


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[list[Path], list[RequestOutput]]]:
    """A family's adapters, and what the base and each of them merged into it answer."""

    @cache
    def make(name: str) -> tuple[list[Path], list[RequestOutput]]:
        root = tmp_path_factory.mktemp(name)
        adapters = write_adapters(name, root)
        return adapters, merged_answers(name, adapters, root / "merged")

    return make


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama3", {}),
        ("llama3", {"pipeline_parallel_size": 2}),
        ("gpt2", {"tensor_parallel_size": 2}),
    ],
    ids=["llama3", "llama3-PP2", "gpt2-TP2"],
)
def test_adapters_in_one_batch_answer_as_merged_ones(
    monkeypatch: pytest.MonkeyPatch,
    answers: Callable[[str], tuple[list[Path], list[RequestOutput]]],
    name: str,
    layout: dict[str, int],
) -> None:
    """Chunks and decodes mixed, from graphs; with two slots the eight take turns."""
    adapters, expected = answers(name)
    asked = [None, *requests(adapters)]
    for slots in (8, 2) if not layout else (8,):
        with on_arrays(monkeypatch, directory(name), slots, **layout) as (llm, _):
            for _ in range(2):
                outputs = llm.generate([prompt(name)] * 9, GREEDY, lora_request=asked)
                for ours, reference in zip(outputs, expected, strict=True):
                    assert_same(ours, reference)


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2}], ids=["TP1", "TP2"])
def test_guessed_tokens_run_with_the_adapter_of_their_sequence(
    monkeypatch: pytest.MonkeyPatch,
    answers: Callable[[str], tuple[list[Path], list[RequestOutput]]],
    layout: dict[str, int],
) -> None:
    adapters, expected = answers("llama3")
    asked = [None, *requests(adapters)]
    drafting = Drafting(max_tokens=3, row_cost=0.01, draft_cost=0.0, wait_cost=0.01)
    with on_arrays(monkeypatch, directory("llama3"), drafting=drafting, **layout) as (llm, _):
        outputs = llm.generate([prompt("llama3")] * 9, GREEDY, lora_request=asked)
        stats = llm.engine.scheduler.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    for ours, reference in zip(outputs, expected, strict=True):
        assert_same(ours, reference)


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2}], ids=["TP1", "TP2"])
def test_the_output_layer_and_prompts_have_their_adapter(
    monkeypatch: pytest.MonkeyPatch, layout: dict[str, int]
) -> None:
    """What PEFT saved: rows whose logits are wanted and rows whose logits are scored differ."""
    for name in ("qwen3", "gemma3"):
        with np.load(GOLDEN / name / "reference.npz") as arrays:
            tokens, logits, greedy = (arrays[key] for key in ("prompt", "logits", "greedy"))
        params = SamplingParams(
            temperature=0, max_tokens=len(greedy), ignore_eos=True, logprobs=2, prompt_logprobs=1
        )
        lora = LoRARequest("golden", 1, str(GOLDEN / name))
        with on_arrays(monkeypatch, directory(name), **layout) as (llm, _):
            plain, output = llm.generate([tokens.tolist()] * 2, params, lora_request=[None, lora])
        assert first_choice(plain) != pytest.approx(first_choice(output), abs=0.01), "no matter"
        entries = output.outputs[0].logprobs
        assert entries is not None
        assert_same_tokens(output.outputs[0].token_ids, greedy.tolist(), margins_of(entries))
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        assert output.prompt_logprobs is not None
        for i, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            assert entry.logprob == pytest.approx(expected[i, tokens[i + 1]], abs=1e-4)


def test_adapters_are_added_to_quantized_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, plain = tmp_path / "quantized", tmp_path / "plain"
    values = quantize_model(directory("llama3"), base, gptq(act_order=True, symmetric=False))
    write_plain(directory("llama3"), plain, values)
    adapter = write_adapter(directory("llama3"), tmp_path / "adapter", seed=3)
    with LLM(str(merge(plain, adapter, tmp_path / "merged")), device="cpu", **LORA) as llm:
        (expected,) = llm.generate([prompt("llama3")], GREEDY)
    with on_arrays(monkeypatch, base) as (llm, _):
        (output,) = llm.generate([prompt("llama3")], GREEDY, lora_request=requests([adapter])[0])
    assert_same(output, expected)


def test_a_sequence_whose_adapter_is_lost_fails_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = write_adapter(directory("llama3"), tmp_path / "adapter", seed=0)
    (lora,) = requests([adapter])
    with on_arrays(monkeypatch, directory("llama3")) as (llm, (shard,)):
        llm.generate([prompt("llama3")], GREEDY, lora_request=lora)
        shard.remove_adapter(shard.adapters()[0].id)
        with pytest.raises(GenerationFailed, match="load the adapter again"):
            llm.generate([[5, 6, 7]] * 2, GREEDY, lora_request=[None, lora])
        assert llm.generate([[5, 6, 7]], GREEDY)[0].finished


class Steps:
    """Steps of single sequences of one shard, whose results are read one step late."""

    def __init__(self, slots: int = 2) -> None:
        self.shard = make_gpu_shard(
            directory("llama3"), limits=LIMITS, graphs=GRAPHS, adapters=slots
        )
        self._number = 0
        self._free = list(range(16))[::-1]
        self._place: dict[int, int] = {}

    def __call__(
        self, run: dict[int, int], starts: dict[int, int] | None = None, ends: Any = ()
    ) -> list[int]:
        """Tokens of the step; `run` is each sequence's number of tokens, `starts` the adapters."""
        self._free += [self._place.pop(seq) for seq in ends]
        begun = []
        for seq, adapter in (starts or {}).items():
            at = self._place[seq] = self._free.pop()
            blocks = [[1 + 8 * at + i for i in range(8)]]
            sampling = Sampling(temperature=0.0)
            begun.append(
                SequenceStart(seq, [5, 9, 14, 20], 4, 0, blocks, sampling, adapter=adapter)
            )
        plan = StepPlan(self._number, list(run), list(run.values()), starts=begun, ends=list(ends))
        self._number += 1
        return self.shard.submit(plan)().tokens


def adapters_for(tmp_path: Path, count: int) -> list[Adapter]:
    return [
        Adapter(
            f"a{i}", i, str(write_adapter(directory("llama3"), tmp_path / str(i), seed=i, rank=i))
        )
        for i in range(1, count + 1)
    ]


def alone(adapter: Adapter | None, count: int = 4) -> list[int]:
    """The tokens of a sequence that has its shard for itself."""
    step = Steps()
    if adapter is not None:
        step.shard.add_adapter(adapter)
    found = step({0: 4}, starts={0: adapter.id if adapter else 0})
    for _ in range(count - 1):
        found += step({0: 1})
    return found


def test_what_runs_keeps_an_adapter_that_is_unloaded_and_overwrites_no_other(
    tmp_path: Path,
) -> None:
    one, two, three = adapters_for(tmp_path, 3)
    expected = [alone(each) for each in (one, two, three)]
    assert len({tuple(each) for each in (alone(None), *expected)}) == 4
    step = Steps()
    for adapter in (one, two):
        step.shard.add_adapter(adapter)
    found = {seq: [token] for seq, token in enumerate(step({0: 4, 1: 4}, starts={0: 1, 1: 2}))}
    step.shard.remove_adapter(1)
    step.shard.add_adapter(three)
    assert [each.id for each in step.shard.adapters()] == [2, 3]
    found[0] += step({0: 1})  # alone: the other one's slot is not this step's
    first, second = step({0: 1, 1: 1})
    found[0].append(first)
    found[1].append(second)
    # The slot of the one that ends is the third's, in the same plan.
    found[2], second = ([token] for token in step({2: 4, 1: 1}, starts={2: 3}, ends=[0]))
    found[1] += second
    for _ in range(3):
        third, *rest = step({2: 1, 1: 1} if len(found[1]) < 4 else {2: 1})
        found[2].append(third)
        found[1] += rest
    assert [found[0], found[1], found[2]] == [expected[0][:3], expected[1], expected[2]]


def test_an_adapter_in_its_slot_is_not_copied_again(tmp_path: Path) -> None:
    one, two, three = adapters_for(tmp_path, 3)
    step = Steps()
    for adapter in (one, two, three):
        step.shard.add_adapter(adapter)
    device = step.shard._device
    size = step.shard._adapters.nbytes // 2

    def copies(seq: int, adapter: Adapter) -> int:
        device.uploaded.clear()
        step({seq: 4}, starts={seq: adapter.id}, ends=[seq - 1] if seq else [])
        return device.uploaded.count(size)

    order = [one, two, one, two, three, two, one]
    assert [copies(i, each) for i, each in enumerate(order)] == [1, 1, 0, 0, 1, 0, 1]


def test_more_adapters_at_once_than_slots_contradict_the_books(tmp_path: Path) -> None:
    step = Steps(slots=1)
    for adapter in adapters_for(tmp_path, 2):
        step.shard.add_adapter(adapter)
    with pytest.raises(IndexError, match="more than 1 adapters"):
        step({0: 4, 1: 4}, starts={0: 1, 1: 2})


def test_steps_without_adapters_run_as_if_there_were_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = Steps()
    (one,) = adapters_for(tmp_path, 1)
    step.shard.add_adapter(one)
    plain = make_gpu_shard(directory("llama3"), limits=LIMITS, graphs=GRAPHS)
    assert step.shard._device.recorded == 2 * plain._device.recorded
    step({0: 4}, starts={0: 1})
    ran: list[Any] = []
    run = step.shard._adapted.run
    monkeypatch.setattr(step.shard._adapted, "run", lambda each: ran.append(each) or run(each))
    device = step.shard._device
    device.uploaded.clear()
    step({1: 4}, starts={1: 0})
    step({1: 1})
    size = 4 * (LIMITS.step_tokens + LIMITS.max_num_seqs)
    assert not ran
    assert device.uploaded.count(size) == 0
    step({0: 1, 1: 1})
    step({0: 1, 1: 1})
    assert len(ran) == 2
    assert device.uploaded.count(size) == 1  # slots of rows that stay need no second upload


def test_room_for_adapters_has_to_be_there() -> None:
    with pytest.raises(ValueError, match="lower --max-loras or --max-lora-rank"):
        make_gpu_shard(directory("llama3"), limits=LIMITS, adapters=8, device=HostDevice(1 << 16))


def test_a_shard_without_adapters_takes_none() -> None:
    shard = make_gpu_shard(directory("llama3"), limits=LIMITS)
    with pytest.raises(ValueError, match="--enable-lora"):
        shard.add_adapter(Adapter("a", 1, "/nowhere"))
    shard.remove_adapter(1)
    assert shard.adapters() == []


def test_values_that_the_dtype_does_not_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = write_adapter(directory("llama3"), tmp_path / "a", seed=0)
    config, tensors = read_files(adapter)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] = 1e30
    write_files(adapter, config, tensors)
    shard = make_gpu_shard(directory("llama3"), limits=LIMITS, adapters=2)
    shard.add_adapter(Adapter("a", 1, str(adapter)))
    monkeypatch.setattr(shard._adapters._layout, "dtype", np.dtype(np.float16))
    with pytest.raises(CheckpointError, match="beyond float16"):
        shard.add_adapter(Adapter("a", 2, str(adapter)))
    assert [each.id for each in shard.adapters()] == [1]


def test_the_twins_add_each_row_s_own_product() -> None:
    rng = np.random.default_rng(0)
    slots, modules, rank, inner = 3, [5, 0, 7], 8, 12
    ranks = np.array([[3, 0, 8], [0, 0, 1], [8, 0, 0]], np.int32)
    starts = np.cumsum([0, *modules]).astype(np.int32)
    a = rng.standard_normal((slots, 3 * rank, inner))
    b = rng.standard_normal((slots, starts[-1], rank))
    of = np.array([2, -1, 0, 0, 1, 2], np.int32)
    x, y = rng.standard_normal((6, inner)), rng.standard_normal((6, starts[-1]))
    expected = y.copy()
    for row, slot in enumerate(of):
        for module in range(3) if slot >= 0 else ():
            outputs = slice(starts[module], starts[module + 1])
            r = ranks[slot, module]
            own = a[slot, module * rank : module * rank + r]
            expected[row, outputs] += b[slot, outputs, :r] @ own @ x[row]
    stack = Stack(a, b, ranks, starts)
    expand_numpy(y, shrink_numpy(x, stack, of), stack, of)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
