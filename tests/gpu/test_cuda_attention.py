"""Decode attention, and the plain kernel, on a GPU against the NumPy twin in float64.

What no query may see is NaN in the pages, and so is what the output's memory held before.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.gpu_arrays import DTYPES, poison_new_arrays, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorray.kernels import attention, rope
from tensorray.kernels.attention import paged_attention_numpy

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from tensorray.kernels.cuda import attention as cuda  # noqa: E402
from tensorray.kernels.cuda import scratch  # noqa: E402

CACHES = DTYPES | {"float8": np.dtype(ml_dtypes.float8_e4m3fn)}
# Of the difference's norm to the result's: rounded weights and results, accumulation in float32.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 2e-6}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_arrays(monkeypatch)


@dataclass(frozen=True)
class Case:
    lens: tuple[int, ...]  # 0: a padded sequence
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "float16"
    cache: str = ""  # the same as dtype
    window: int | None = None
    softcap: float | None = None
    kv_scale: float = 1.0
    queries: tuple[int, ...] = ()  # one each


class Step:
    """A case's arrays."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
        cache = CACHES[case.cache or case.dtype]
        lens = np.array(case.lens, np.int32)
        queries = np.array(case.queries or [1] * len(lens), np.int32)
        self.starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        self.lens = lens
        rows = int(self.starts[-1])
        self.q = rng.standard_normal((rows, case.heads, case.head_dim)).astype(DTYPES[case.dtype])
        # Sharper than what random vectors give, so that a wrong key shows.
        self.scale = 1.5 * case.head_dim**-0.5
        blocks = -(-lens // case.block_size)
        ids = rng.permutation(int(blocks.sum()) + 3)
        self.table = np.zeros((len(lens), int(blocks.max()) + 2), np.int32)
        shape = (len(ids), case.kv_heads, case.block_size, case.head_dim)
        self.k, self.v = np.full(shape, np.nan, cache), np.full(shape, np.nan, cache)
        for s, count in enumerate(blocks):
            own, ids = ids[:count], ids[count:]
            self.table[s, :count] = own
            first = 0
            if case.window is not None:
                first = max(0, lens[s] - queries[s] - case.window + 1)
            position = np.arange(first, lens[s])
            where = own[position // case.block_size], slice(None), position % case.block_size
            for pages in (self.k, self.v):
                values = rng.standard_normal((len(position), case.kv_heads, case.head_dim))
                pages[where] = (values / case.kv_scale).astype(cache)

    @property
    def options(self) -> dict[str, Any]:
        case = self.case
        options = {"window": case.window, "softcap": case.softcap, "kv_scale": case.kv_scale}
        return options | {"scale": self.scale}

    def expected(self) -> Any:
        """The twin's result in float64, zeros for padded sequences."""
        out = np.zeros(self.q.shape)
        for s in np.flatnonzero(self.lens):
            rows = slice(self.starts[s], self.starts[s + 1])
            out[rows] = paged_attention_numpy(
                self.q[rows].astype(np.float64),
                *(pages.astype(np.float64) for pages in (self.k, self.v)),
                np.array([0, rows.stop - rows.start]),
                self.lens[s : s + 1],
                self.table[s : s + 1],
                **self.options,
            )
        return out

    def arrays(self) -> list[Any]:
        pages = [on_gpu(pages) for pages in (self.k, self.v)]
        metadata = [cupy.asarray(x) for x in (self.starts, self.lens, self.table)]
        return [cupy.asarray(self.q), *pages, *metadata]

    def check(self, out: Any) -> None:
        error = relative_error(out, self.expected())
        assert error < TOLERANCE[self.case.dtype], f"{self.case}: {error:.1e}"


def on_gpu(pages: Any) -> Any:
    return cupy.asarray(pages.view(np.uint8) if pages.itemsize == 1 else pages)


def check(case: Case, **chosen: Any) -> None:
    step = Step(case)
    q, k, v, starts, lens, table = step.arrays()
    if chosen:
        step.check(cuda.decode(q, k, v, lens, table, **step.options, **chosen))
    else:
        step.check(
            attention.paged_attention(q, k, v, starts, lens, table, **step.options, max_query=1)
        )


LENS = (1, 15, 16, 17, 0, 255, 256, 257, 64, 700, 1, 1023)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(d, "float16") for d in (8, 64, 72, 96, 112, 128, 192, 256)]
    + [(d, "bfloat16") for d in (64, 80, 128, 256)],
)
def test_head_sizes(head_dim: int, dtype: str) -> None:
    check(Case(LENS, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [(1, 1), (4, 1), (8, 8), (14, 2), (32, 8), (16, 1), (20, 2), (71, 1), (36, 4)],
)
def test_groups(heads: int, kv_heads: int) -> None:
    check(Case(LENS, heads=heads, kv_heads=kv_heads, head_dim=64))


@pytest.mark.parametrize("block_size", [1, 4, 8, 16, 24, 32, 48, 64, 256])
def test_block_sizes(block_size: int) -> None:
    check(Case(LENS, block_size=block_size))
    check(Case(LENS, block_size=block_size, window=100))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 250, 512, 5000])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_windows(window: int, head_dim: int) -> None:
    check(Case((*LENS, 2500), window=window, head_dim=head_dim))


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "float16"), (96, "float16"), (128, "float16"), (128, "bfloat16"), (256, "bfloat16")],
)
def test_cache_of_8_bits(head_dim: int, dtype: str) -> None:
    check(Case(LENS, head_dim=head_dim, dtype=dtype, cache="float8", kv_scale=0.25))


@pytest.mark.parametrize("cap", [0.5, 5.0, 50.0])
def test_softcap(cap: float) -> None:
    check(Case(LENS, softcap=cap))
    check(Case(LENS, softcap=cap, window=70, head_dim=256, dtype="bfloat16", kv_scale=2.0))


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("warps", [2, 4, 8])
def test_any_number_of_splits(splits: int, warps: int) -> None:
    case = Case((1, 2500, 0, 100, 640), heads=4, kv_heads=1)
    for split_tiles in (1, 4):
        constants = {"WARPS": warps, "MIN_BLOCKS": 1, "SPLIT_TILES": split_tiles}
        check(case, splits=splits, constants=constants)
        check(replace(case, window=300), splits=splits, constants=constants)


def test_long_sequences() -> None:
    check(Case((20_000, 3, 9_999), kv_heads=1, heads=4))


def test_one_call_after_another_leaves_the_counters_right() -> None:
    """Splits are counted in by a buffer that calls share, of whatever shapes."""
    for case in (Case((1500, 5)), Case((700,) * 4), Case((1500, 5)), Case((2500,))):
        check(case)


def test_scores_of_large_size() -> None:
    """Softmax subtracts the peak first, tile by tile: rising scores, and then falling."""
    step = Step(Case((900, 900)))
    position = np.arange(900) // 16
    for s, factors in enumerate((position + 1, 60 - position)):
        for block, factor in zip(step.table[s, :57], factors[::16], strict=True):
            step.k[block] = (step.k[block].astype(np.float64) * factor).astype(np.float16)
    q, k, v, starts, lens, table = step.arrays()
    out = attention.paged_attention(q, k, v, starts, lens, table, **step.options, max_query=1)
    step.check(out)


def test_strided_queries_and_table() -> None:
    step = Step(Case(LENS))
    q, k, v, starts, lens, table = step.arrays()
    packed = cupy.full((len(q), 12, 128), cupy.nan, "float16")
    packed[:, :8] = q
    wide_table = cupy.full((len(table), 100), 1 << 30, "int32")
    wide_table[:, : table.shape[1]] = table
    out = attention.paged_attention(
        *(packed[:, :8], k, v, starts, lens, wide_table[:, : table.shape[1]]),
        **step.options,
        max_query=1,
    )
    step.check(out)
    odd = cupy.full((len(q), 8 * 128 + 1), cupy.nan, "float16")[:, 1:].reshape(q.shape)
    odd[:] = q
    step.check(
        attention.paged_attention(odd, k, v, starts, lens, table, **step.options, max_query=1)
    )


def test_a_captured_graph_follows_new_lengths() -> None:
    """Launch shapes come from the table's width, not from the lengths at capture."""
    steps = [Step(Case(lens, kv_heads=1, heads=4)) for lens in ((3000, 1), (17, 2900), (0, 640))]
    width = max(step.table.shape[1] for step in steps)
    blocks = max(len(step.k) for step in steps)
    q, k, v, starts, lens, _ = steps[0].arrays()
    k, v = (cupy.zeros((blocks, *x.shape[1:]), x.dtype) for x in (k, v))
    table = cupy.zeros((2, width), "int32")
    options = steps[0].options
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        attention.paged_attention(q, k, v, starts, lens, table, **options, max_query=1)
        stream.begin_capture()
        out = attention.paged_attention(q, k, v, starts, lens, table, **options, max_query=1)
        graph = stream.end_capture()
        for step in steps * 2:
            q[...], lens[...] = cupy.asarray(step.q), cupy.asarray(step.lens)
            k[: len(step.k)], v[: len(step.v)] = cupy.asarray(step.k), cupy.asarray(step.v)
            table[:, : step.table.shape[1]] = cupy.asarray(step.table)
            out.fill(cupy.nan)
            graph.launch()
            stream.synchronize()
            step.check(out)


SHAPES = [  # few, since each is compiled
    {"heads": 8, "kv_heads": 2, "head_dim": 128, "block_size": 16},
    {"heads": 6, "kv_heads": 2, "head_dim": 80, "block_size": 8, "dtype": "bfloat16"},
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lens = draw(st.lists(st.integers(0, 600), min_size=1, max_size=6).filter(any))
    return Case(
        tuple(lens),
        **draw(st.sampled_from(SHAPES)),
        window=draw(st.one_of(st.none(), st.integers(1, 700))),
        softcap=draw(st.sampled_from([None, 20.0])),
    )


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_random_steps(case: Case) -> None:
    check(case)


# --- rotated, appended and attended in one kernel ---------------------------------------------


def check_fused(case: Case, *, normed: bool = False, rotary: int | None = None) -> None:
    """`rope_attention` where one kernel does it (or not: rotary), in attention and in the pages."""
    step = Step(case)
    rng = np.random.default_rng(len(case.lens))
    sequences, dtype = len(case.lens), DTYPES[case.dtype]
    rotary = rotary or case.head_dim
    angles = rng.uniform(0, 6, (50, rotary // 2))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    positions = rng.integers(0, 50, sequences).astype(np.int32)
    packed = rng.standard_normal((sequences, case.heads + 2 * case.kv_heads, case.head_dim))
    packed = packed.astype(dtype)
    cut = [case.heads, case.heads + case.kv_heads]
    slots = np.full(sequences, -1, np.int64)
    for s in np.flatnonzero(step.lens):
        block, offset = divmod(int(step.lens[s]) - 1, case.block_size)
        slots[s] = int(step.table[s, block]) * case.block_size + offset
        for pages in (step.k, step.v):
            pages[step.table[s, block], :, offset] = np.nan
    norms = {}
    if normed:
        norms = {name: rng.standard_normal(case.head_dim).astype(dtype) for name in NORMS}

    k_pages, v_pages = on_gpu(step.k), on_gpu(step.v)
    out = rope.rope_attention(
        *cupy.split(cupy.asarray(packed), cut, axis=1),
        *(cupy.asarray(table), cupy.asarray(positions), k_pages, v_pages, cupy.asarray(slots)),
        *map(cupy.asarray, (step.starts, step.lens, step.table)),
        **step.options,
        **{name: cupy.asarray(weight) for name, weight in norms.items()},
        eps=1e-5,
        max_query=1,
    )

    exact_k, exact_v = (pages.astype(np.float64) for pages in (step.k, step.v))
    step.q = rope.rope_append_numpy(
        *np.split(packed.astype(np.float64), cut, axis=1),
        *(table.astype(np.float64), positions, exact_k, exact_v, slots),
        kv_scale=case.kv_scale,
        **{name: weight.astype(np.float64) for name, weight in norms.items()},
        eps=1e-5,
    )
    kept = [cupy.asnumpy(pages).view(step.k.dtype) for pages in (k_pages, v_pages)]
    rounding = 0.07 if step.k.itemsize == 1 else 0.02
    for pages, exact in zip(kept, (exact_k, exact_v), strict=True):
        np.testing.assert_allclose(pages.astype(np.float64), exact, rtol=rounding, atol=rounding)
    # What was rounded into the cache is what is attended to.
    step.k, step.v = kept
    step.check(out)


NORMS = ("q_norm", "k_norm")


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 2), (20, 2)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_attention(normed: bool, heads: int, kv_heads: int) -> None:
    check_fused(Case(LENS, heads=heads, kv_heads=kv_heads), normed=normed)
    check_fused(Case((600,), heads=heads, kv_heads=kv_heads), normed=normed)


def test_many_sequences() -> None:
    """More blocks than multiprocessors, of 4 warps each and not 8."""
    lens = (1, 15, 16, 17, 0, 255, 257, 64, 700, 300)
    check(Case(lens * 14))
    check_fused(Case(lens * 14), normed=True)
    check_fused(Case(lens * 14, cache="float8", kv_scale=0.5, window=100))


@pytest.mark.parametrize("head_dim", [64, 192, 256])
def test_rope_attention_head_sizes(head_dim: int) -> None:
    check_fused(Case((*LENS, 2500), head_dim=head_dim, dtype="bfloat16"), normed=True)
    check_fused(Case((*LENS, 2500), head_dim=head_dim, dtype="bfloat16", window=70), normed=True)


@pytest.mark.parametrize("block_size", [8, 16, 48])
def test_rope_attention_with_a_cache_of_8_bits(block_size: int) -> None:
    check_fused(Case((*LENS, 2500), cache="float8", kv_scale=0.25, block_size=block_size))


def test_rope_attention_where_it_takes_two_kernels() -> None:
    check_fused(Case(LENS), normed=True, rotary=64)
    check_fused(Case(LENS, head_dim=80, dtype="bfloat16"))
    check_fused(Case(LENS, dtype="float32", head_dim=64))


@given(lens=st.lists(st.integers(0, 600), min_size=1, max_size=6).filter(any))
@settings(max_examples=30, deadline=None)
def test_rope_attention_at_any_length(lens: list[int]) -> None:
    check_fused(Case(tuple(lens), heads=4, kv_heads=2), normed=True)


# --- the plain kernel -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(d, "float32") for d in (5, 64, 100, 128, 256)] + [(20, "float16"), (288, "bfloat16")],
)
def test_simple_head_sizes(head_dim: int, dtype: str) -> None:
    case = Case((9, 0, 40, 130, 1), head_dim=head_dim, dtype=dtype, queries=(9, 3, 5, 1, 1))
    check_simple(case)
    check_simple(replace(case, window=7, softcap=3.0, block_size=5))


def test_simple_cache_of_8_bits() -> None:
    check_simple(Case((70, 3), dtype="float32", cache="float8", kv_scale=0.5, queries=(7, 2)))


def check_simple(case: Case) -> None:
    step = Step(case)
    q, k, v, starts, lens, table = step.arrays()
    step.check(cuda.simple(q, k, v, starts, lens, table, **step.options))


def test_float32_takes_the_plain_kernel_and_rows_of_no_sequence_are_zeros() -> None:
    step = Step(Case((9, 40), dtype="float32", queries=(9, 3)))
    q, k, v, starts, lens, table = step.arrays()
    padded = cupy.concatenate([q, cupy.full((3, *q.shape[1:]), 7.0, "float32")])
    out = attention.paged_attention(padded, k, v, starts, lens, table, **step.options)
    assert not out[len(q) :].any()
    step.check(out[: len(q)])


def test_metadata_of_another_type_is_refused() -> None:
    q, k, v, starts, lens, table = Step(Case((9,))).arrays()
    with pytest.raises(TypeError, match="seq_lens must be int32"):
        attention.paged_attention(
            *(q, k, v, starts, lens.astype("int64"), table), scale=1.0, max_query=1
        )


def test_what_blocks_count_by_is_not_in_memory_that_graphs_write_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph that was recorded before goes on writing to what its allocator has free since."""
    monkeypatch.setattr(scratch, "_counters", {})
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)

    def work() -> None:
        cupy.ndarray((1 << 21,), np.uint8).fill(0xFF)

    with stream, cupy.cuda.using_allocator(pool.malloc):
        work()
        stream.begin_capture()
        work()
        graph = stream.end_capture()
        counters = [scratch.counters("one", 16), scratch.counters("other", 2)]
        graph.launch()
    stream.synchronize()
    for counter in counters:
        assert not counter.any()
