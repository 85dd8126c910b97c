"""Guessing keeps the output's distribution, by a chi-square test for each way to guess.

The model is a table: a token's successors have the distribution of its row. Whoever guesses knows
another table. So every draw has a known distribution, whichever step it came in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from helpers.eagle_tables import TableEagle
from helpers.table_models import MODEL, MOST, SMALL, VOCAB, chi_square

from tensorray.actors.lookup_drafter import look_up
from tensorray.actors.protocol import Sampling, SequenceStart
from tensorray.actors.sampler import Sampler, SamplingError

#: Draws, but for a draft model, of which there are 100,000 at any time.
DRAWS = int(os.environ.get("TENSORRAY_SOAK_DRAWS", "20000"))
ROOM = 2

Guesses = Callable[[Sampler, Sequence[int]], list[int]]


def lookup(sampler: Sampler, tokens: Sequence[int]) -> list[int]:
    return look_up(np.array(tokens[-30:], np.int32), 1, 3, ROOM)


def draft_model(sampler: Sampler, tokens: Sequence[int]) -> list[int]:
    """Each guess from the row of the one before, by the draw that will check it."""
    found, last = [], tokens[-1]
    for ahead in range(ROOM):
        last = sampler.guess(0, ahead, SMALL[last])
        found.append(last)
    return found


def heads(sampler: Sampler, tokens: Sequence[int]) -> list[int]:
    """All guesses from the newest token alone, each by a head for its distance."""
    return [sampler.guess(0, ahead, (1 - 0.3 * ahead) * SMALL[tokens[-1]]) for ahead in range(ROOM)]


def eagle() -> Guesses:
    """The guesses of `draft_model`, by the drafter of EAGLE itself: it is shown what was chosen,
    and goes on from there."""
    drafter = TableEagle(SMALL, longest=1000 + DRAWS)

    def guesses(sampler: Sampler, tokens: Sequence[int]) -> list[int]:
        found = drafter.guesses(tokens, ROOM, sampler.guess)
        assert not found or found == draft_model(sampler, tokens)
        return found

    return guesses


def generate(sampling: Sampling, guesses: Guesses | None, count: int) -> tuple[list[int], int, int]:
    """So many tokens after token 0; guesses made and guesses that were right."""
    sampler = Sampler(VOCAB)
    sampler.start(SequenceStart(0, [0], 1, 0, [], sampling))
    tokens = [0]
    drafted = accepted = 0
    while len(tokens) <= count:
        draft = [] if guesses is None else guesses(sampler, tokens)
        logits = MODEL[[tokens[-1], *draft]]
        chosen, _, failed = sampler.verify([0], [draft], logits)
        assert not failed
        tokens += chosen[0]
        drafted += len(draft)
        accepted += len(chosen[0]) - 1
    return tokens[: count + 1], drafted, accepted


@pytest.mark.parametrize(
    ("guesses", "draws"),
    [(lookup, DRAWS), (draft_model, 100_000), (heads, DRAWS), (eagle(), DRAWS // 4)],
)
def test_the_distribution_is_the_models_own(guesses: Guesses, draws: int) -> None:
    sampling = Sampling(temperature=0.8, seed=2026)
    tokens, drafted, accepted = generate(sampling, guesses, draws)
    assert 0.1 * drafted < accepted < 0.9 * drafted  # some were right, some wrong
    assert chi_square([tokens], 0.8) < MOST
    assert tokens[:3001] == generate(sampling, None, 3000)[0]


def test_the_test_would_notice_another_distribution() -> None:
    tokens, _, _ = generate(Sampling(temperature=0.8, seed=2026), None, 10_000)
    assert chi_square([tokens], 0.9) > MOST


def test_common_random_numbers_agree_more_often_than_the_likeliest_token() -> None:
    def likeliest(sampler: Sampler, tokens: Sequence[int]) -> list[int]:
        found, last = [], tokens[-1]
        for _ in range(ROOM):
            last = int(SMALL[last].argmax())
            found.append(last)
        return found

    sampling = Sampling(temperature=1.5, seed=1)
    right = [generate(sampling, how, 4000)[2] for how in (draft_model, likeliest)]
    assert right[0] > right[1]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, seed=3, repetition_penalty=1.2, frequency_penalty=0.3),
        Sampling(temperature=0.9, seed=4, top_k=3, top_p=0.8, min_p=0.05),
        Sampling(temperature=1.1, seed=5, banned_token_ids=[2], logit_bias={1: 0.5}),
        Sampling(temperature=1.0, seed=6, stop_token_ids=[4], min_tokens=40),
        Sampling(temperature=1.0, seed=7, bad_words=[[1, 3]], no_repeat_ngram_size=4),
    ],
    ids=lambda sampling: f"seed {sampling.seed}",
)
@pytest.mark.parametrize("guesses", [lookup, draft_model])
def test_each_place_is_chosen_as_if_alone(sampling: Sampling, guesses: Guesses) -> None:
    assert generate(sampling, guesses, 60)[0] == generate(sampling, None, 60)[0]


def test_what_ends_a_sequence_is_its_last_token() -> None:
    sampler = Sampler(VOCAB)
    sampling = Sampling(temperature=0.0, stop_token_ids=[3], min_tokens=1)
    sampler.start(SequenceStart(0, [0], 1, 0, [], sampling))
    logits = np.zeros((4, VOCAB), np.float32)
    logits[[0, 1, 2, 3], [3, 3, 5, 5]] = 1.0
    logits[0, 1] = 0.5  # while no stop token may come
    chosen, _, _ = sampler.verify([0], [[1, 3, 5]], logits)
    assert chosen == [[1, 3]]


def test_what_can_not_be_chosen_fails_when_it_is_next() -> None:
    sampler = Sampler(VOCAB)
    sampler.start(SequenceStart(0, [0], 1, 0, [], Sampling(temperature=0.0, logprobs=1)))
    logits = np.zeros((2, VOCAB), np.float32)
    logits[0, 1], logits[1] = 1.0, np.nan
    chosen, logprobs, failed = sampler.verify([0], [[1]], logits)
    assert (chosen, failed) == ([[1]], {})
    assert [entry.token for entry in logprobs[0]] == [1]
    chosen, _, failed = sampler.verify([0], [[]], logits[1:])
    assert chosen == [[]]
    assert "NaN" in failed[0]
    with pytest.raises(ValueError, match="not float32"):
        sampler.verify([0], [[1, 2]], logits)
    with pytest.raises(SamplingError):
        sampler.prompt_logprobs([1], logits[1:], 1)
