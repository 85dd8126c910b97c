"""The sampling kernels on a GPU against their NumPy twins, one call at a time."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.gpu_arrays import poison_new_arrays
from helpers.sampling import SPREADS, random_logits
from numpy.typing import NDArray

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
if not cupy.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from tensorray.kernels import batch_sampling as kernels  # noqa: E402
from tensorray.kernels.philox import uniform  # noqa: E402

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_new_arrays(monkeypatch)


def on_device(state: kernels.RowState) -> kernels.RowState:
    return kernels.RowState(*(cupy.asarray(array) for array in vars(state).values()))


def assert_same_state(actual: kernels.RowState, expected: kernels.RowState) -> None:
    for name, array in vars(expected).items():
        assert np.array_equal(cupy.asnumpy(getattr(actual, name)), array), name


def random_state(rng: np.random.Generator, rows: int, vocab: int, **fixed: Any) -> kernels.RowState:
    """Rows that all draw, each second one with a slot."""
    records = np.zeros(rows, kernels.ROW)
    records["repetition"] = records["top_p"] = 1.0
    records["temperature"] = rng.choice([0.0, 0.6, 1.0], rows)
    records["seed"] = rng.integers(0, 2**64, rows, np.uint64)
    records["outputs"] = rng.integers(0, 9, rows)
    records["slot"] = np.where(np.arange(rows) % 2, np.arange(rows) // 2, -1)
    for name, value in fixed.items():
        records[name] = value
    slots = rows // 2 + 1
    words = rng.integers(0, 5, (slots, vocab)).astype(np.uint32)
    words |= kernels.SEEN * (rng.random((slots, vocab)) < 0.3).astype(np.uint32)
    words |= kernels.BANNED * (rng.random((slots, vocab)) < 0.1).astype(np.uint32)
    return kernels.RowState(
        rows=records.view(np.uint8).reshape(rows, -1),
        last_tokens=rng.integers(0, vocab, rows).astype(np.int32),
        words=words,
        bias_tokens=np.zeros((slots, 4), np.int32),
        biases=np.zeros((slots, 4), np.float32),
    )


def test_rows_and_words_are_edited() -> None:
    rng, vocab, rows = np.random.default_rng(0), 700, 20
    state = random_state(rng, rows, vocab)
    device = on_device(state)
    index = rng.permutation(rows)[:7].astype(np.int32)
    records = rng.integers(0, 256, (7, kernels.ROW.itemsize)).astype(np.uint8)
    kernels.set_rows(device, cupy.asarray(index), cupy.asarray(records))
    kernels.set_rows(state, index, records)
    assert_same_state(device, state)
    places = rng.integers(0, state.words.size, 5000).astype(np.uint32)
    # A place is allowed, or otherwise edited, but not both: their order would count.
    edits = rng.choice([kernels.STOP, kernels.BIASED, kernels.SEEN, np.uint32(1)], 5000)
    edits[places % 7 == 0] = kernels.ALLOW
    kernels.edit_words(device, cupy.asarray(places), cupy.asarray(edits))
    kernels.edit_words(state, places, edits)
    assert_same_state(device, state)


def test_a_draw_takes_its_bits_from_seed_and_position() -> None:
    """Over equal logits the token is the draw itself, to 18 bits."""
    rng, vocab, rows = np.random.default_rng(1), 1 << 18, 64
    seeds = rng.integers(0, 2**64, rows, np.uint64)
    seeds[:2] = 0, 2**64 - 1
    for positions in (np.arange(rows), rng.integers(0, 2**31 - 2, rows)):
        state = on_device(
            random_state(rng, rows, vocab, temperature=1.3, seed=seeds, outputs=positions, slot=-1)
        )
        out = cupy.empty((2, rows), np.int32)
        logits = cupy.zeros((rows, vocab), np.float16)
        kernels.sample_rows(logits, cupy.arange(rows, dtype=np.int32), state, out)
        expected = (uniform(seeds, positions) * vocab).astype(int)
        assert cupy.asnumpy(out)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 33), (9, 600), (40, 9000), (3, 128256)])
@pytest.mark.parametrize(
    "fixed",
    [
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 400, "top_p": 0.9, "min_p": 0.01},
        {"repetition": 1.2, "frequency": 0.1, "presence": -0.2, "min_tokens": 5},
    ],
    ids=str,
)
def test_sampled_rows(fixed: dict[str, Any], dtype: str, rows: int, vocab: int) -> None:
    rng = np.random.default_rng(rows)
    state = random_state(rng, rows + 3, vocab, **fixed)
    logits = random_logits(rng, "normal", rows, vocab).astype(DTYPES[dtype])
    if rows > 4:
        logits[2, 5], logits[4] = np.nan, -np.inf
    index = rng.permutation(rows + 3)[:rows].astype(np.int32)
    device, out = on_device(state), cupy.empty((2, rows), np.int32)
    kernels.sample_rows(cupy.asarray(logits), cupy.asarray(index), device, out)
    expected = np.empty((2, rows), np.int32)
    kernels.sample_rows(logits, index, state, expected)
    # No draw of these seeds is a near-tie.
    assert np.array_equal(cupy.asnumpy(out), expected)
    assert_same_state(device, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", SPREADS)
def test_greedy_rows(dtype: str, spread: str) -> None:
    rng = np.random.default_rng(3)
    for rows, vocab in ((1, 1), (2, 50257), (70, 4096), (5, 151936)):
        state = random_state(rng, rows, vocab, slot=-1)
        logits = random_logits(rng, spread, rows, vocab).astype(DTYPES[dtype])
        index = rng.permutation(rows).astype(np.int32)
        device, out = on_device(state), cupy.empty((2, rows), np.int32)
        kernels.greedy_rows(cupy.asarray(logits), cupy.asarray(index), device, out)
        expected = np.empty((2, rows), np.int32)
        kernels.greedy_rows(logits, index, state, expected)
        assert np.array_equal(cupy.asnumpy(out), expected)
        assert_same_state(device, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("top", [0, 1, 17, 300, kernels.MAX_TOP])
def test_scores(top: int, spread: str, dtype: str) -> None:
    rng = np.random.default_rng(top)
    for rows, vocab in ((1, 20), (6, 2500), (4, 128256)):
        logits = random_logits(rng, spread, rows + 2, vocab).astype(DTYPES[dtype])
        index = rng.permutation(rows + 2)[:rows].astype(np.int32)
        tokens = rng.integers(0, vocab, rows + 2).astype(np.int32)
        tokens[0] = -1
        tokens[1] = logits[1].astype(np.float32).argmax()
        out = cupy.empty((rows, kernels.SCORE_HEADER + 2 * top), np.int32)
        kernels.score_rows(*(cupy.asarray(x) for x in (logits, index, tokens)), out)
        expected = np.empty(out.shape, np.int32)
        kernels.score_rows(logits, index, tokens, expected)
        for ours, theirs in zip(cupy.asnumpy(out), expected, strict=True):
            assert normalizer(ours) == pytest.approx(normalizer(theirs), abs=2e-6, rel=1e-6)
            assert ours[2:6].tolist() == theirs[2:6].tolist()
            ids, scores = (
                slice(first, first + theirs[4])
                for first in (kernels.SCORE_HEADER, kernels.SCORE_HEADER + top)
            )
            assert np.array_equal(ours[ids], theirs[ids])
            assert np.array_equal(ours[scores].view(np.float32), theirs[scores].view(np.float32))


def normalizer(score: NDArray[np.int32]) -> float:
    return float(score[:2].view(np.float64)[0])


def test_a_captured_step_goes_on_from_where_the_last_one_came_to() -> None:
    rng, vocab, rows, steps = np.random.default_rng(6), 5000, 8, 6
    fixed = {"top_p": 0.9, "frequency": 0.3, "temperature": 1.0}
    state = random_state(rng, rows, vocab, **fixed)
    logits = random_logits(rng, "normal", rows, vocab)
    index = np.arange(rows, dtype=np.int32)
    device, out = on_device(state), cupy.empty((2, rows), np.int32)
    arrays = cupy.asarray(logits), cupy.asarray(index)
    stream = cupy.cuda.Stream(non_blocking=True)
    found = []
    with stream:
        kernels.sample_rows(*arrays, on_device(state), out)  # compiles, and makes workspaces
        stream.begin_capture()
        kernels.sample_rows(*arrays, device, out)
        graph = stream.end_capture()
        for _ in range(steps):
            graph.launch()
            found.append(cupy.asnumpy(out))
    expected = np.empty((2, rows), np.int32)
    for step in range(steps):
        kernels.sample_rows(logits, index, state, expected)
        assert np.array_equal(found[step], expected)
    assert_same_state(device, state)
