"""Prefill attention on a GPU against the NumPy twin in float64, on ragged packed steps.

What no query may see is NaN in the pages, and so is what the output's memory held before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tensorray.kernels.attention import paged_attention_numpy

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from tensorray.kernels.cuda import attention, prefill  # noqa: E402

TYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8": np.dtype(ml_dtypes.float8_e4m3fn),
}
# Of the difference's norm to the result's: rounded weights and results, accumulation in float32.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}


@dataclass
class Case:
    queries: list[int]
    prefixes: list[int]
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 128
    block_size: int = 16
    dtype: str = "float16"
    cache: str = ""  # the same as dtype
    window: int | None = None
    softcap: float | None = None
    kv_scale: float = 1.0
    padded_tokens: int = 0
    padded_sequences: int = 0
    seed: int = 0


class Step:
    """A case's arrays, as NumPy has them; `run` computes them on the GPU."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        dtype, cache = TYPES[case.dtype], TYPES[case.cache or case.dtype]
        queries = np.array(case.queries + [0] * case.padded_sequences, np.int32)
        lens = queries + np.array(case.prefixes + [0] * case.padded_sequences, np.int32)
        self.query_starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
        self.seq_lens = lens
        self.used = int(self.query_starts[-1])
        tokens = self.used + case.padded_tokens
        self.q = rng.standard_normal((tokens, case.heads, case.head_dim)).astype(dtype)
        # Sharper than what random vectors give, so that a wrong key shows.
        self.scale = 1.5 * case.head_dim**-0.5
        blocks = -(-lens // case.block_size)
        total = int(blocks.sum()) + 3
        ids = rng.permutation(total)
        self.table = np.zeros((len(queries), int(blocks.max(initial=0)) + 2), np.int32)
        shape = (total, case.kv_heads, case.block_size, case.head_dim)
        self.k, self.v = (np.full(shape, np.nan, cache) for _ in "kv")
        for s, count in enumerate(blocks):
            own, ids = ids[:count], ids[count:]
            self.table[s, :count] = own
            first = 0 if case.window is None else max(0, lens[s] - queries[s] - case.window + 1)
            position = np.arange(first, lens[s])
            where = own[position // case.block_size], slice(None), position % case.block_size
            for pages in (self.k, self.v):
                values = rng.standard_normal((len(position), case.kv_heads, case.head_dim))
                pages[where] = values.astype(cache)

    def expected(self) -> Any:
        case = self.case
        out = np.zeros(self.q.shape)
        wide = [x.astype(np.float64) for x in (self.q, self.k, self.v)]
        out[: self.used] = paged_attention_numpy(
            wide[0],
            wide[1] * case.kv_scale,
            wide[2] * case.kv_scale,
            self.query_starts,
            self.seq_lens,
            self.table,
            scale=self.scale,
            window=case.window,
            softcap=case.softcap,
        )[: self.used]
        return out

    def arrays(self) -> list[Any]:
        given = (self.q, self.k, self.v, self.query_starts, self.seq_lens, self.table)
        return [on_gpu(x) for x in given]

    @property
    def options(self) -> dict[str, Any]:
        case = self.case
        options: dict[str, Any] = {"scale": self.scale, "window": case.window}
        return options | {"softcap": case.softcap, "kv_scale": case.kv_scale}

    def run(self, arrays: list[Any] | None = None, singles: int | None = None) -> Any:
        arrays = arrays or self.arrays()
        poison = cupy.full(self.q.shape, 0xFFFF, np.uint16)  # NaN of either type
        del poison  # the pool hands this memory out next
        if singles is None:
            out = prefill.paged_attention(*arrays, **self.options)
        else:
            count = cupy.asarray([singles], np.int32)
            out = attention.paged_attention(*arrays, **self.options, singles=count)
        return to_numpy(out, self.q.dtype)


def on_gpu(x: Any) -> Any:
    if x.dtype == TYPES["bfloat16"]:
        return cupy.asarray(x.view(np.uint16)).view(x.dtype)
    if x.dtype == TYPES["float8"]:
        return cupy.asarray(x.view(np.uint8))
    return cupy.asarray(x)


def to_numpy(x: Any, dtype: Any) -> Any:
    return x.view(np.uint16).get().view(dtype)


def check(case: Case, singles: int | None = None) -> None:
    step = Step(case)
    result, expected = step.run(singles=singles).astype(np.float64), step.expected()
    assert np.isfinite(result).all()
    assert (result[step.used :] == 0).all()
    norm = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(result - expected, axis=-1)
    # Of every row of every head by itself: one wrong row must not hide among many.
    tolerance = TOLERANCE[case.dtype] * 4
    assert (error <= tolerance * np.maximum(norm, 0.05)).all(), (
        f"{np.argwhere(error > tolerance * np.maximum(norm, 0.05))[:8].tolist()} of {result.shape}"
    )
    if step.used:
        assert np.linalg.norm(error) <= TOLERANCE[case.dtype] * np.linalg.norm(norm)


RAGGED = ([37, 1, 130, 64, 1, 5], [0, 300, 65, 0, 15, 16])


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_heads_share_keys(group: int, head_dim: int) -> None:
    check(Case(*RAGGED, heads=2 * group, kv_heads=2, head_dim=head_dim, seed=group))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("cache", ["", "float8"])
def test_the_kernel_for_other_gpus(
    head_dim: int, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "_WGMMA_SHAPES", {})
    check(Case(*RAGGED, heads=6, kv_heads=2, head_dim=head_dim, cache=cache, padded_tokens=9))
    check(Case(*RAGGED, head_dim=head_dim, cache=cache, window=70, softcap=9.0, dtype="bfloat16"))


@pytest.mark.parametrize("head_dim", [16, 32, 48, 80, 96, 112, 144, 160, 192, 240])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_head_sizes(head_dim: int, dtype: str) -> None:
    check(Case(*RAGGED, head_dim=head_dim, dtype=dtype, window=50))


@pytest.mark.parametrize("block_size", [16, 24, 32, 48, 64, 100, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_block_sizes(block_size: int, head_dim: int) -> None:
    case = Case(*RAGGED, head_dim=head_dim, block_size=block_size, seed=block_size)
    check(case)
    case.window = 70
    check(case)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 1000])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_windows(window: int, head_dim: int) -> None:
    check(Case([150, 1, 260, 33], [0, 500, 333, 129], head_dim=head_dim, window=window))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("softcap", [0.5, 30.0, 50.0])
def test_soft_caps(softcap: float, head_dim: int) -> None:
    check(Case(*RAGGED, head_dim=head_dim, softcap=softcap, dtype="bfloat16", window=90))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 80])
@pytest.mark.parametrize("window", [None, 77])
def test_float8_pages(dtype: str, head_dim: int, window: int | None) -> None:
    check(
        Case(*RAGGED, head_dim=head_dim, dtype=dtype, cache="float8", kv_scale=0.7, window=window)
    )


@pytest.mark.parametrize("edge", [15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lengths_about_the_edges_of_blocks_and_tiles(edge: int, head_dim: int) -> None:
    prefixes = [0, edge, 3, edge, 0, edge - 1]
    check(Case([edge, 1, edge, 2, 1, edge], prefixes, head_dim=head_dim, seed=edge))


@pytest.mark.parametrize("padded_tokens", [0, 1, 40, 300])
@pytest.mark.parametrize("padded_sequences", [0, 1, 70])
def test_padding_becomes_zeros(padded_tokens: int, padded_sequences: int) -> None:
    for head_dim in (64, 128, 256):
        case = Case(*RAGGED, head_dim=head_dim, heads=6, kv_heads=2)
        case.padded_tokens, case.padded_sequences = padded_tokens, padded_sequences
        check(case)


def test_sequences_without_queries() -> None:
    check(Case([0, 5, 0, 0, 1, 0], [40, 3, 0, 100, 20, 1], padded_tokens=2))
    check(Case([0, 0], [0, 0], padded_tokens=70))
    check(Case([1], [0]))


@pytest.mark.parametrize("seed", range(24))
def test_random_steps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    long = rng.random(count) < 0.3
    queries = np.where(long, rng.integers(2, 400, count), 1)
    prefixes = rng.integers(0, 700, count) * (rng.random(count) < 0.7)
    dtype = str(rng.choice(["float16", "bfloat16"]))
    group, kv_heads = int(rng.integers(1, 9)), int(rng.integers(1, 4))
    check(
        Case(
            queries.tolist(),
            prefixes.tolist(),
            heads=group * kv_heads,
            kv_heads=kv_heads,
            head_dim=int(rng.choice([64, 128, 256])),
            block_size=int(rng.choice([16, 32, 64])),
            dtype=dtype,
            cache=str(rng.choice([dtype, dtype, "float8"])),
            window=int(rng.integers(1, 500)) if rng.random() < 0.4 else None,
            softcap=float(rng.uniform(1, 40)) if rng.random() < 0.3 else None,
            kv_scale=float(rng.uniform(0.5, 1.5)),
            padded_tokens=int(rng.integers(0, 100)) * (seed % 2),
            padded_sequences=int(rng.integers(0, 40)) * (seed % 3 == 0),
            seed=seed,
        )
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_queries_of_many_heads(head_dim: int) -> None:
    check(Case([1300, 500], [0, 900], heads=8, kv_heads=2, head_dim=head_dim))


@pytest.mark.parametrize("heads", [71, 128, 160])
def test_more_heads_than_a_tile_has_rows(heads: int) -> None:
    check(Case([30, 1], [70, 200], heads=heads, kv_heads=1, head_dim=64))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_row_does_not_depend_on_what_else_runs(head_dim: int) -> None:
    """The last queries of a prompt give the same bits in a step of their own, and alone."""
    whole = Step(Case([700], [0], heads=8, kv_heads=2, head_dim=head_dim, seed=5))
    arrays = whole.arrays()
    result = whole.run(arrays)
    for last in (1, 10, 333):
        part = Step(Case([last], [700 - last], heads=8, kv_heads=2, head_dim=head_dim, seed=5))
        part.q = whole.q[-last:]
        own = part.arrays()
        own[1], own[2], own[5] = arrays[1], arrays[2], arrays[5]
        np.testing.assert_array_equal(part.run(own), result[-last:])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_captured_launch_follows_the_step(head_dim: int) -> None:
    """One graph, replayed for another division of its tokens into sequences."""
    first = Step(Case([200, 1, 50], [0, 90, 260], head_dim=head_dim, seed=1))
    second = Step(Case([1, 149, 71], [300, 20, 0], head_dim=head_dim, padded_tokens=30, seed=2))
    blocks = max(len(s.k) for s in (first, second))
    width = max(s.table.shape[1] for s in (first, second))
    for step in (first, second):
        step.k, step.v = (np.resize(x, (blocks, *x.shape[1:])) for x in (step.k, step.v))
        step.table = np.pad(step.table, ((0, 0), (0, width - step.table.shape[1])))
    arrays = first.arrays()
    keywords: dict[str, Any] = {"scale": first.scale}
    prefill.paged_attention(*arrays, **keywords)  # loads the module
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        out = prefill.paged_attention(*arrays, **keywords)
        graph = stream.end_capture()
    for step in (second, first):
        with stream:
            for held, new in zip(arrays, step.arrays(), strict=True):
                held[...] = new
            out.fill(float("nan"))
            graph.launch()
        stream.synchronize()
        result, expected = to_numpy(out, step.q.dtype).astype(np.float64), step.expected()
        assert np.linalg.norm(result - expected) <= 1e-3 * np.linalg.norm(expected)
        assert (result[step.used :] == 0).all()


def test_queries_within_wider_rows() -> None:
    """As a view of what the projection of queries, keys and values gave."""
    step = Step(Case(*RAGGED, heads=8, kv_heads=2))
    arrays = step.arrays()
    expected = step.run(arrays)
    wide = cupy.full((len(step.q), 12, 128), float("nan"), np.float16)
    wide[:, 2:10] = arrays[0]
    arrays[0] = wide[:, 2:10]
    np.testing.assert_array_equal(step.run(arrays), expected)


# Sequences of one query first, as a step that decodes and prefills has them.
MIXED = ([1] * 6 + [37, 1, 130], [300, 0, 65, 1200, 15, 16, 0, 40, 65])


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("singles", [0, 1, 5, 6])
def test_decodes_ahead_go_to_their_own_kernel(head_dim: int, singles: int) -> None:
    check(Case(*MIXED, heads=8, kv_heads=2, head_dim=head_dim), singles)
    case = Case(*MIXED, heads=6, kv_heads=2, head_dim=head_dim, dtype="bfloat16", window=70)
    case.padded_tokens, case.padded_sequences = 40, 300
    check(case, singles)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decodes_ahead_over_float8_pages(head_dim: int) -> None:
    check(Case(*MIXED, head_dim=head_dim, cache="float8", kv_scale=0.7, softcap=9.0), 6)


def test_decodes_alone_and_more_sequences_than_tokens() -> None:
    check(Case([1] * 40, [*range(0, 800, 20)], heads=8, kv_heads=2), 40)
    check(Case([1] * 40, [*range(0, 800, 20)], padded_tokens=24, padded_sequences=216), 40)
    check(Case([1, 3], [700, 0], padded_sequences=254), 1)
    check(Case([], [], padded_sequences=4, padded_tokens=50), 0)


def test_many_decodes_beside_a_prompt() -> None:
    check(Case([1] * 255 + [200, 57], [*range(255), 0, 120], heads=8, kv_heads=2), 255)


@pytest.mark.parametrize("head_dim", [80, 128])
def test_a_captured_step_follows_the_number_of_its_decodes(head_dim: int) -> None:
    first = Step(Case([1, 1, 1, 50], [90, 5, 260, 30], head_dim=head_dim, seed=1))
    second = Step(Case([1, 40, 1], [300, 20, 9], head_dim=head_dim, padded_tokens=11, seed=2))
    second.seq_lens = np.append(second.seq_lens, np.int32(0))
    second.query_starts = np.append(second.query_starts, second.query_starts[-1:])
    second.table = np.pad(second.table, ((0, 1), (0, 0)))
    blocks = max(len(s.k) for s in (first, second))
    width = max(s.table.shape[1] for s in (first, second))
    for step in (first, second):
        step.k, step.v = (np.resize(x, (blocks, *x.shape[1:])) for x in (step.k, step.v))
        step.table = np.pad(step.table, ((0, 0), (0, width - step.table.shape[1])))
    arrays, count = first.arrays(), cupy.zeros(1, np.int32)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        attention.paged_attention(*arrays, **first.options, singles=count)  # loads the modules
        stream.begin_capture()
        out = attention.paged_attention(*arrays, **first.options, singles=count)
        graph = stream.end_capture()
    for step, singles in ((second, 1), (first, 3), (first, 0)):
        with stream:
            for held, new in zip(arrays, step.arrays(), strict=True):
                held[...] = new
            count.fill(singles)
            out.fill(float("nan"))
            graph.launch()
        stream.synchronize()
        result, expected = to_numpy(out, step.q.dtype).astype(np.float64), step.expected()
        assert np.linalg.norm(result - expected) <= 1e-3 * np.linalg.norm(expected)
        assert (result[step.used :] == 0).all()


def test_refuses_what_it_cannot_take() -> None:
    arrays = Step(Case([5], [0])).arrays()
    with pytest.raises(ValueError, match="int32"):
        prefill.paged_attention(*arrays[:4], arrays[4].astype(np.int64), arrays[5], scale=1.0)
    with pytest.raises(ValueError, match="scale"):
        prefill.paged_attention(*arrays, scale=0.0)
    with pytest.raises(ValueError, match="contiguous"):
        prefill.paged_attention(arrays[0][:, ::2], *arrays[1:], scale=1.0)
