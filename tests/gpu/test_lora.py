"""LoRA adapters on a GPU: their kernels against NumPy twins, whole batches against merged bases.

python3 -m pytest tests/gpu/test_lora.py -q --import-mode=importlib -p no:cacheprovider
"""

from __future__ import annotations

from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.equality import assert_same_tokens, choice
from helpers.gpu_arrays import DTYPES, normal, poison_new_arrays, relative_error, wide
from helpers.running import Arrival, RecordingShard, make_shard, run
from helpers.tiny_models import directory

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)
pytest.importorskip("safetensors", reason="adapters are written with it")

from helpers.lora_files import merge, prompt, write_adapters  # noqa: E402

from tensorray.actors.adapter import Adapter  # noqa: E402
from tensorray.actors.config import ShardConfig  # noqa: E402
from tensorray.actors.gpu_shard import GpuShard  # noqa: E402
from tensorray.actors.protocol import Sampling, SequenceStart, StepPlan, StepResult  # noqa: E402
from tensorray.cluster.scheduler import Scheduler  # noqa: E402
from tensorray.kernels.lora import Stack, expand, expand_numpy, shrink, shrink_numpy  # noqa: E402

# Of y + x A B, whose last rounding is to the dtype.
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6}
GREEDY = Sampling(temperature=0.0)

# Inputs, outputs of each module, highest rank: of models, and odd ones.
SHAPES = [
    (4096, [4096, 1024, 1024], 16),
    (14336, [4096], 16),
    (1024, [3072, 3072], 64),
    (640, [100, 1, 31], 8),
    (12, [5], 16),
    (7, [3, 130], 24),
]


def random_stack(
    rng: np.random.Generator, shape: tuple[int, list[int], int], slots: int, dtype: str
) -> Stack:
    """Adapters of all ranks, some with nothing for a module, apart in memory as slots are."""
    inner, modules, rank = shape
    ranks = rng.integers(0, rank + 1, (slots, len(modules))).astype(np.int32)
    ranks[rng.random(ranks.shape) < 0.2] = 0
    starts = np.cumsum([0, *modules]).astype(np.int32)
    a = rng.standard_normal((slots, len(modules), rank, inner)) / inner**0.5
    b = rng.standard_normal((slots, starts[-1], rank))
    for slot in range(slots):
        for module, own in enumerate(ranks[slot]):
            a[slot, module, own:] = 0
            b[slot, starts[module] : starts[module + 1], own:] = 0
    sizes = [-(-each[0].size // 64) * 64 for each in (a, b)]
    memory = cupy.full((slots, sum(sizes)), np.nan, DTYPES[dtype])
    views = []
    for values, first in ((a.reshape(slots, -1, inner), 0), (b, sizes[0])):
        flat = values.reshape(slots, -1).astype(DTYPES[dtype])
        memory[:, first : first + flat.shape[1]] = cupy.asarray(flat)
        strides = (memory.strides[0], values.shape[2] * memory.itemsize, memory.itemsize)
        views.append(cupy.lib.stride_tricks.as_strided(memory[:, first:], values.shape, strides))
    apart = cupy.asarray(np.pad(ranks, ((0, 0), (0, 5))))[:, : len(modules)]
    return Stack(*views, apart, cupy.asarray(starts), gcd(*starts.tolist()))


def on_host(stack: Stack) -> Stack:
    return Stack(wide(stack.a), wide(stack.b), stack.ranks.get(), stack.starts.get())


def slots_of(rng: np.random.Generator, kind: str, rows: int, slots: int) -> np.ndarray:
    if kind == "each its own":
        return rng.integers(-1, slots, rows).astype(np.int32)
    if kind == "none":
        return np.full(rows, -1, np.int32)
    runs = rng.integers(-1, slots, rows)  # as sequences' chunks are
    return np.repeat(runs, rng.integers(1, 40, rows))[:rows].astype(np.int32)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["each its own", "in runs", "none"])
def test_rows_get_what_their_adapters_add(
    monkeypatch: pytest.MonkeyPatch, kind: str, shape: tuple[int, list[int], int], dtype: str
) -> None:
    poison_new_arrays(monkeypatch)
    rng = np.random.default_rng(len(kind) + shape[0])
    stack = random_stack(rng, shape, 5, dtype)
    host = on_host(stack)
    for rows in (1, 3, 16, 64, 65, 300):
        slots = slots_of(rng, kind, rows, 5)
        packed = normal(rng, rows, shape[0] + 16, dtype=dtype)
        for x in (packed[:, 8 : 8 + shape[0]], normal(rng, rows, shape[0], dtype=dtype)):
            y = normal(rng, rows, sum(shape[1]), dtype=dtype)
            before, expected = y.copy(), wide(y)
            expand_numpy(expected, shrink_numpy(wide(x), host, slots), host, slots)
            on_device = cupy.asarray(slots)
            expand(y, shrink(x, stack, on_device), stack, on_device)
            assert relative_error(y, expected) < TOLERANCE[dtype]
            assert (y[slots < 0] == before[slots < 0]).all(), "rows without one are left alone"


def test_a_graph_takes_slots_and_adapters_from_memory() -> None:
    rng = np.random.default_rng(1)
    stack, other = (random_stack(rng, SHAPES[0], 4, "float16") for _ in range(2))
    x = normal(rng, 16, 4096, dtype="float16")
    y, slots = cupy.zeros((16, 6144), "float16"), cupy.full(16, -1, np.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        expand(y, shrink(x, stack, slots), stack, slots)
        pool = cupy.cuda.MemoryPool()
        with cupy.cuda.using_allocator(pool.malloc):
            shrink(x, stack, slots)
            stream.begin_capture()
            expand(y, shrink(x, stack, slots), stack, slots)
            graph = stream.end_capture()
        for source in (stack, other):
            stack.a[...], stack.b[...] = source.a, source.b
            stack.ranks[...] = source.ranks
            for _ in range(3):
                own = rng.integers(-1, 4, 16).astype(np.int32)
                slots[...] = cupy.asarray(own)
                y.fill(0)
                graph.launch(stream)
                expected = np.zeros((16, 6144))
                host = on_host(source)
                expand_numpy(expected, shrink_numpy(wide(x), host, own), host, own)
                assert relative_error(y, expected) < TOLERANCE["float16"]


class Recording(GpuShard):
    """Waits for each step."""

    def execute(self, plan: StepPlan) -> StepResult:
        return self.submit(plan)()


def load(name: str, **settings: Any) -> Recording:
    settings = {"dtype": "float32", "segment_backend": "kernels", "max_loras": 8, **settings}
    return Recording.load(
        ShardConfig(
            str(directory(name)),
            device="cuda",
            enable_lora=True,
            max_model_len=64,
            block_size=4,
            num_kv_blocks=512,
            max_num_seqs=16,
            max_num_batched_tokens=48,
            **settings,
        )
    )


def scheduler(shard: Any, max_adapters: int) -> Scheduler:
    return Scheduler(
        shard.info.kv,
        max_model_len=64,
        max_num_seqs=16,
        max_num_batched_tokens=48,
        max_adapters=max_adapters,
    )


class WithAdapters(Scheduler):
    """Gives the i-th sequence adapter i; 0 is none."""

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        if plan is None:
            return None
        starts = [msgspec.structs.replace(start, adapter=start.seq) for start in plan.starts]
        return msgspec.structs.replace(plan, starts=starts)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def make(name: str) -> tuple[list[Path], list[tuple[list[int], list[np.ndarray]]]]:
        """Adapters, and what the base and each of them merged into it says, with its logits."""
        root = tmp_path_factory.mktemp(name)
        adapters = write_adapters(name, root)
        models = [directory(name)]
        models += [merge(directory(name), each, root / f"merged-{each.name}") for each in adapters]
        answers = []
        for model in models:
            shard = make_shard(model, kind=RecordingShard)
            (outcome,) = run(shard, scheduler(shard, 1), [Arrival(0, prompt(name), GREEDY, 12)])
            answers.append((outcome.tokens, shard.rows))
        return adapters, answers

    return make


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2"])
def test_eight_adapters_in_one_batch_answer_as_merged_ones(
    made: Any, name: str, eager: bool
) -> None:
    adapters, answers = made(name)
    shard = load(name, enforce_eager=eager)
    for i, each in enumerate(adapters, start=1):
        shard.add_adapter(Adapter(each.name, i, str(each)))
    for _ in range(2):
        shard.reset()
        batch = [Arrival(i // 4, prompt(name), GREEDY, 12) for i in range(9)]
        plans = WithAdapters(
            shard.info.kv,
            max_model_len=64,
            max_num_seqs=16,
            max_num_batched_tokens=48,
            enable_prefix_caching=False,
        )
        for outcome, (tokens, rows) in zip(run(shard, plans, batch), answers, strict=True):

            def clear(position: int, rows: Any = rows, tokens: Any = tokens) -> Any:
                return choice(rows[position], GREEDY, tokens[:position], prompt(name))

            assert_same_tokens(outcome.tokens, tokens, clear)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_with_an_adapter_are_within_rounding(made: Any, dtype: str) -> None:
    """Adapters take turns in two slots, loaded and unloaded between steps."""
    adapters, answers = made("llama3")
    shard = load("llama3", dtype=dtype, max_loras=2)
    seen: list[Any] = []
    enqueue = shard._sampler.enqueue

    def recording(seqs: Any, rows: Any, logits: Any) -> Any:
        seen.append(wide(logits[0]))
        return enqueue(seqs, rows, logits)

    shard._sampler.enqueue = recording  # type: ignore[method-assign, union-attr]
    tokens = prompt("llama3")
    blocks = [[1 + i for i in range(15)]]
    for seq, adapter in enumerate([0, 3, 2, 4, 0, 6]):
        version = 10 * seq + adapter if adapter else 0
        if adapter:
            shard.add_adapter(Adapter("x", version, str(adapters[adapter - 1])))
        start = SequenceStart(seq, tokens, len(tokens), 0, blocks, GREEDY, adapter=version)
        shard.execute(StepPlan(0, [seq], [len(tokens)], starts=[start]))
        shard.remove_adapter(version)
        shard.execute(StepPlan(1, [], [], ends=[seq]))
        expected = answers[adapter][1][0].astype(np.float64)
        error = np.linalg.norm(seen.pop() - expected) / np.linalg.norm(expected)
        assert error < {"float16": 1e-2, "bfloat16": 8e-2}[dtype], f"adapter {adapter}"
        others = [np.linalg.norm(each[1][0] - expected) for each in answers]
        assert sorted(others)[1] > 0.1 * np.linalg.norm(expected), "it does not matter"
