"""The definition of equality has to tell near-ties from clear choices, or every other test lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.equality import (
    Choice,
    assert_same_tokens,
    boundary_distance,
    choice,
    final_scores,
    top_two_margin,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as with_fields

from tensorray.actors.protocol import Sampling
from tensorray.kernels import sampling as kernels
from tensorray.kernels.philox import uniform

CLEAR, TIE = 1.0, 5e-5


def test_equal_sequences_need_no_margins() -> None:
    def never(position: int) -> float:
        raise AssertionError(position)

    assert_same_tokens([1, 2, 3], [1, 2, 3], never)
    assert_same_tokens([], [], [])


def test_parting_at_a_near_tie_is_excused_with_all_that_follows() -> None:
    assert_same_tokens([1, 9, 8, 7], [1, 2, 3, 4], [CLEAR, TIE, CLEAR, CLEAR])
    assert_same_tokens([1, 9], [1, 2, 3], lambda position: TIE if position == 1 else CLEAR)


@pytest.mark.parametrize(
    ("ours", "reference", "margins"),
    [
        ([1, 9, 3], [1, 2, 3], [CLEAR, CLEAR, TIE]),
        ([1, 9, 3], [1, 2, 3], [TIE, CLEAR, CLEAR]),  # a tie that both resolved alike
        ([9], [1], [1.01e-4]),
        ([1, 2], [1, 2, 3], [TIE, TIE, TIE]),
        ([1, 2, 3], [1, 2], [TIE, TIE]),
    ],
)
def test_any_other_difference_fails(
    ours: list[int], reference: list[int], margins: list[float]
) -> None:
    with pytest.raises(AssertionError):
        assert_same_tokens(ours, reference, margins)


def test_half_precision_has_the_wider_margin() -> None:
    assert_same_tokens([9], [1], [1.9e-2], dtype="float16")
    with pytest.raises(AssertionError):
        assert_same_tokens([9], [1], [2.1e-2], dtype="float16")


def test_seeded_draws_go_by_their_distance() -> None:
    assert_same_tokens([9], [1], [Choice(distance=0.9e-5)])
    with pytest.raises(AssertionError):
        assert_same_tokens([9], [1], [Choice(distance=1.1e-5)])


def test_margin_is_of_the_final_scores() -> None:
    logits = np.array([3.0, 2.5, 1.0, 2.75])
    assert top_two_margin(logits) == 0.25
    greedy = Sampling(temperature=0.0)
    assert top_two_margin(logits, with_fields(greedy, banned_token_ids=[3])) == 0.5
    assert top_two_margin(logits, with_fields(greedy, logit_bias={2: 3.5})) == 1.5
    assert top_two_margin(logits, with_fields(greedy, allowed_token_ids=[2])) == math.inf
    assert top_two_margin(logits, with_fields(greedy, repetition_penalty=3.0), [3], [0]) == 1.5
    minimum = with_fields(greedy, min_tokens=1, stop_token_ids=[0, 3])
    assert top_two_margin(logits, minimum) == 1.5
    assert top_two_margin(logits, minimum, [1]) == 0.25
    assert choice(logits, greedy, []) == Choice(margin=0.25)


def test_final_scores_follow_the_documented_order() -> None:
    sampling = Sampling(
        logit_bias={0: 1.0},
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.5,
    )
    # Bias first, so it's halved too; then the frequency of two and the presence.
    assert final_scores(np.array([3.0, -1.0]), sampling, [0, 0], [1]).tolist() == [1.0, -2.0]


def draw_at(seed: int) -> float:
    return float(uniform([seed], [0])[0])


def test_distance_to_a_boundary_without_filters() -> None:
    probabilities = np.array([0.2, 0.3, 0.5])
    for seed in range(20):
        expected = min(abs(draw_at(seed) - boundary) for boundary in (0.2, 0.5))
        found = boundary_distance(np.log(probabilities), Sampling(seed=seed), [], 0)
        assert found == pytest.approx(expected, abs=1e-12)


def test_filters_move_boundaries() -> None:
    logits = np.log([0.2, 0.3, 0.5])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.75), Sampling(min_p=0.5)):
        for seed in range(20):
            found = boundary_distance(logits, with_fields(sampling, seed=seed), [], 0)
            assert found == pytest.approx(abs(draw_at(seed) - 0.3 / 0.8), abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "sampling"),
    [
        (np.log([0.4, 0.3, 0.3 - 1e-6]), Sampling(top_k=2)),
        (np.log([0.4, 0.3, 0.3]), Sampling(top_p=0.7 + 1e-6)),
        (np.log([0.4, 0.3, 0.3]), Sampling(top_p=0.7 - 1e-6)),
        (np.log([0.4, 0.4, 0.2]), Sampling(min_p=0.5 + 1e-6)),
        (np.log([0.4, 0.4, 0.2]), Sampling(min_p=0.5 - 1e-6)),
    ],
    ids=["top-k", "top-p above", "top-p below", "min-p above", "min-p below"],
)
def test_a_filter_in_doubt_turns_its_boundaries_into_intervals(
    logits: np.ndarray, sampling: Sampling
) -> None:
    """Whether the last token is in decides what a draw between both sets of boundaries takes."""
    with_it = logits - np.log(np.exp(logits).sum())
    without = logits[:2] - np.log(np.exp(logits[:2]).sum())
    between = (math.exp(with_it[0]) + math.exp(without[0])) / 2
    draws = uniform(range(10_000), [0] * 10_000)

    def distance(seed: np.intp) -> float:
        return boundary_distance(logits, with_fields(sampling, seed=int(seed)), [], 0)

    assert distance(np.abs(draws - between).argmin()) == 0
    assert distance(np.abs(draws - 0.1).argmin()) > 0.1


def test_a_single_possible_token_has_no_boundary() -> None:
    logits = np.array([1.0, 3.0, 2.0])
    for sampling in (
        Sampling(top_k=1),
        Sampling(top_p=1e-6),
        Sampling(min_p=1.0),
        Sampling(allowed_token_ids=[2]),
    ):
        assert boundary_distance(logits, sampling, [], 0) == math.inf
    assert boundary_distance(np.array([3.0, 3.0]), Sampling(top_k=1), [], 0) == 0


@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=12),
    seed=st.integers(0, 2**32),
    noise=st.integers(0, 2**32),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.5, 1.0, 2.0]),
        top_k=st.integers(0, 5),
        top_p=st.sampled_from([1.0, 0.9, 0.5]),
        min_p=st.sampled_from([0.0, 0.2]),
    ),
)
def test_a_clear_draw_survives_rounding(
    row: list[float], seed: int, noise: int, sampling: Sampling
) -> None:
    """Logits that differ by rounding draw the same token, or the draw was a near-tie."""
    logits = np.array(row, np.float32)
    nudge = np.random.default_rng(noise).uniform(-2e-6, 2e-6, len(row)).astype(np.float32)
    sampling = with_fields(sampling, seed=seed)
    draw = draw_at(seed)

    def token(scores: np.ndarray) -> int:
        return kernels.draw(
            scores, draw, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        )

    assert_same_tokens([token(logits + nudge)], [token(logits)], [choice(logits, sampling, [])])
