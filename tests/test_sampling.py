"""The sampling kernels against slow references that read like the definitions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tensorray.kernels import sampling
from tensorray.kernels.philox import uniform

CLOSE = 1e-6  # of probability: nearer to a boundary than this, float32 weights may differ


def skip_if_close(value: float, boundary: float) -> None:
    """Skips an example that rounding decides."""
    if abs(value - boundary) < CLOSE:
        reject()


def reference_kept(
    scores: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> list[int]:
    """Ids that pass the filters, rising."""
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    best = max(scores)
    weight = [math.exp((score - best) / temperature) for score in scores]
    if top_k:
        ranked = ranked[:top_k]
    if top_p < 1:
        total = math.fsum(weight[token] for token in ranked)
        share, nucleus = 0.0, []
        for token in ranked:
            skip_if_close(share, top_p)
            if share >= top_p:
                break
            nucleus.append(token)
            share += weight[token] / total
        ranked = nucleus
    if min_p > 0:
        for token in ranked[1:]:
            skip_if_close(weight[token] / min_p, 1.0 if weight[token] < 1 else math.inf)
        ranked = [token for token in ranked if weight[token] >= min_p]
    return sorted(ranked)


def reference_draw(
    scores: list[float], draw: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    kept = reference_kept(scores, temperature, top_k, top_p, min_p)
    best = max(scores)
    weight = {token: math.exp((scores[token] - best) / temperature) for token in kept}
    total, below = math.fsum(weight.values()), 0.0
    for token in kept:
        below += weight[token]
        if token != kept[-1]:
            skip_if_close(below / total, draw)
        if below / total > draw:
            return token
    return kept[-1]


def small_vocabulary() -> st.SearchStrategy[list[float]]:
    """Scores on a coarse grid, so that exact ties are common, and some tokens masked."""
    score = st.integers(-40, 40).map(lambda eighths: eighths / 8) | st.just(-math.inf)
    return st.lists(score, min_size=1, max_size=12).filter(lambda row: max(row) > -math.inf)


filters = {
    "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    "top_k": st.integers(0, 14),
    "top_p": st.just(1.0) | st.floats(1e-6, 1.0),
    "min_p": st.just(0.0) | st.floats(1e-6, 1.0),
}


@settings(max_examples=400, deadline=None)
@given(scores=small_vocabulary(), draw=st.floats(0, 1, exclude_max=True), **filters)
def test_draw_equals_the_reference(
    scores: list[float], draw: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    expected = reference_draw(scores, draw, temperature, top_k, top_p, min_p)
    row = np.array(scores, np.float32)
    assert sampling.draw(row, draw, temperature, top_k, top_p, min_p) == expected
    assert np.array_equal(row, np.array(scores, np.float32))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([511, 512, 513, 2048, 5000]),
    draw=st.floats(0, 1, exclude_max=True),
    temperature=filters["temperature"],
    top_k=st.sampled_from([0, 1, 5, 64, 600, 4999, 5001]),
    top_p=st.sampled_from([1.0, 0.95, 0.3, 1e-9]),
    min_p=st.sampled_from([0.0, 0.02, 1.0]),
)
def test_draw_equals_the_reference_on_a_larger_vocabulary(
    seed: int,
    vocab: int,
    draw: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    """Long enough to be summed in blocks and searched in chunks; rounded so that ties occur."""
    row = np.random.default_rng(seed).normal(0, 3, vocab).round(1).astype(np.float32)
    expected = reference_draw(row.tolist(), draw, temperature, top_k, top_p, min_p)
    assert sampling.draw(row, draw, temperature, top_k, top_p, min_p) == expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 6, 1.0, 0.0),
        (1.0, 0, 0.85, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.3, 9, 0.9, 0.05),
    ],
    ids=["plain", "top-k", "top-p", "min-p", "all"],
)
def test_draws_follow_the_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = np.random.default_rng(7).normal(0, 1.5, 16).astype(np.float32)
    draws = uniform(np.full(50_000, 2024, np.uint64), np.arange(50_000)).tolist()
    seen = Counter(sampling.draw(scores, draw, temperature, top_k, top_p, min_p) for draw in draws)
    kept = reference_kept(scores.tolist(), temperature, top_k, top_p, min_p)
    assert set(seen) == set(kept)
    weights = np.exp(scores[kept].astype(np.float64) / temperature)
    expected = weights / weights.sum() * len(draws)
    found = np.array([seen[token] for token in kept])
    degrees = len(kept) - 1
    # 99.9 % of chi-square by Wilson and Hilferty's approximation.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert ((found - expected) ** 2 / expected).sum() < limit


def kept_by(row: list[float], **filters: float) -> set[int]:
    """The tokens that evenly spaced draws reach."""
    scores = np.array(row, np.float32)
    options = {"temperature": 1.0, **filters}
    return {sampling.draw(scores, i / 1000, **options) for i in range(1000)}  # type: ignore[arg-type]


def test_filters_break_exact_ties_by_lower_id() -> None:
    row = [1.0, 2.0, 2.0, 2.0, 2.0, 0.0]
    assert kept_by(row, top_k=2) == {1, 2}
    assert kept_by([0.0] * 4, top_p=0.5) == {0, 1}  # two of four reach a half exactly
    assert kept_by([0.0] * 4, top_p=0.51) == {0, 1, 2}  # the crossing token stays
    assert kept_by([0.0, -0.0, 0.0], top_k=1) == {0}
    assert kept_by([-0.0, 0.0, 0.0], top_k=2) == {0, 1}


def test_extreme_filters_keep_at_least_the_best_token() -> None:
    row = [0.5, 3.0, 2.9, -1.0]
    assert kept_by(row, top_p=1e-300) == {1}
    assert kept_by(row, min_p=1.0) == {1}
    assert kept_by(row, top_k=1) == {1}
    assert kept_by([3.0, 3.0, 0.0], min_p=1.0) == {0, 1}
    assert kept_by(row, top_k=10**9) == {0, 1, 2, 3}
    assert kept_by(row, top_k=4) == {0, 1, 2, 3}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_tiny_temperatures_neither_overflow_nor_stray(
    temperature: float, options: dict[str, float]
) -> None:
    assert kept_by([3e38, -3e38, 0.0, -math.inf], temperature=temperature, **options) == {0}
    assert kept_by([1.0, 2.0, 1.5, 2.0], temperature=temperature, **options) == {1, 3}


def test_high_temperature_flattens() -> None:
    assert kept_by([1.0, 2.0, 1.5], temperature=100.0) == {0, 1, 2}


@pytest.mark.parametrize("vocab", [3, 700])
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_take_the_first_and_last_possible_token(
    vocab: int, draw: float
) -> None:
    row = np.full(vocab, -np.inf, np.float32)
    row[1:-1] = 0.1
    assert sampling.draw(row, draw, 1.0) == (1 if draw == 0 else vocab - 2)


def test_rounding_at_a_block_border_never_draws_a_masked_token() -> None:
    """A block's sum and its running sum may differ in the last bits; a draw can fall between."""
    for seed in range(200):
        row = np.random.default_rng(seed).normal(0, 8, 1500).astype(np.float32)
        row[[511, 512, 1023, 1024]] = -np.inf
        weights = np.exp(row - row.max())
        border = weights[:512].sum(dtype=np.float64) / weights.sum(dtype=np.float64)
        for ulps in range(-8, 9):
            token = sampling.draw(row, border + ulps * np.spacing(border), 1.0)
            assert row[token] > -np.inf


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 7, 100, 1000, 4097]),
    k=st.sampled_from([1, 2, 5, 64, 5000]),
    masked=st.sampled_from([0.0, 0.5, 0.999]),
)
def test_largest_orders_by_score_then_id(seed: int, vocab: int, k: int, masked: float) -> None:
    rng = np.random.default_rng(seed)
    row = rng.normal(0, 2, vocab).round(1).astype(np.float32)
    row[rng.random(vocab) < masked] = -np.inf
    possible = [token for token in range(vocab) if row[token] > -np.inf]
    expected = sorted(possible, key=lambda token: (-row[token], token))[:k]
    assert sampling.largest(row, k).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(row=small_vocabulary(), data=st.data(), top=st.integers(-1, 14))
def test_score_equals_the_reference(row: list[float], data: st.DataObject, top: int) -> None:
    possible = [token for token in range(len(row)) if row[token] > -math.inf]
    token = data.draw(st.sampled_from(possible))
    found = sampling.score(np.array(row, np.float32), token, top)
    normalizer = math.log(math.fsum(math.exp(score) for score in row))
    ranked = sorted(possible, key=lambda token: (-row[token], token))
    assert found.rank == 1 + ranked.index(token)
    assert found.logprob == pytest.approx(row[token] - normalizer, abs=1e-6)
    assert found.top_tokens == (ranked if top < 0 else ranked[:top])
    assert found.top_logprobs == pytest.approx(
        [row[token] - normalizer for token in found.top_tokens], abs=1e-6
    )


@settings(max_examples=200, deadline=None)
@given(
    row=small_vocabulary(),
    data=st.data(),
    repetition=st.floats(0.1, 10),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
)
def test_penalties_equal_the_reference(
    row: list[float], data: st.DataObject, repetition: float, frequency: float, presence: float
) -> None:
    token = st.integers(0, len(row) - 1)
    generated = data.draw(st.dictionaries(token, st.integers(0, 5)))
    expected = list(row)
    for seen, count in generated.items():
        if expected[seen] > 0:
            expected[seen] /= repetition
        else:
            expected[seen] *= repetition
        expected[seen] -= count * frequency
        if count > 0:
            expected[seen] -= presence
    found = np.array(row, np.float32)
    sampling.penalize(
        found,
        np.array(list(generated), np.int64),
        np.array(list(generated.values()), np.int64),
        repetition,
        frequency,
        presence,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_bias_and_masks() -> None:
    row = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    sampling.add_bias(row, np.array([0, 2]), np.array([100.0, -100.0], np.float32))
    assert row.tolist() == [100.0, 1.0, -98.0, 3.0]
    sampling.ban(row, np.array([0, 0]))
    assert row.tolist() == [-math.inf, 1.0, -98.0, 3.0]
    sampling.keep_only(row, np.array([2, 0, 2]))
    assert row.tolist() == [-math.inf, -math.inf, -98.0, -math.inf]


def test_greedy_takes_the_lowest_id_of_equals_and_reports_nan() -> None:
    logits = np.array([[1, 3, 3, 0], [2, 2, 2, 2], [0, np.nan, 9, 1]], np.float32)
    tokens, best = sampling.greedy(logits)
    assert tokens[:2].tolist() == [1, 0]
    assert best[:2].tolist() == [3, 2]
    assert np.isnan(best[2])
