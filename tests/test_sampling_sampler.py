"""The sampler's state: what a sequence's choices may depend on, and what they must not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers.equality import assert_same_tokens, choice, final_scores
from helpers.sampling import VOCAB, logits_of, samplings, start
from hypothesis import given, settings
from numpy.typing import NDArray

from tensorray.actors.protocol import Logprobs, Sampling
from tensorray.actors.sampler import Sampler, SamplingError
from tensorray.kernels.philox import uniform


def generate(
    sampling: Sampling, count: int, seq: int = 0, restart_after: tuple[int, ...] = ()
) -> list[int]:
    """`count` tokens of one sequence alone, with preemptions after these numbers of tokens."""
    sampler, outputs = Sampler(VOCAB), list[int]()
    sampler.start(start(seq, sampling))
    for step in range(count):
        if step in restart_after:
            sampler.end(seq)
            sampler.start(start(seq, sampling, outputs=outputs))
        tokens, _, failed = sampler.sample([seq], logits_of(outputs, seq)[None])
        assert not failed
        outputs += tokens
    return outputs


def reference_choice(
    logits: NDArray[np.float32], sampling: Sampling, prompt: list[int], outputs: list[int]
) -> int:
    """Straight from the definitions, in float64, one token at a time."""
    scores = final_scores(logits, sampling, outputs, prompt).tolist()
    ranked = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if sampling.temperature == 0:
        return ranked[0]
    best = scores[ranked[0]]
    weight = [math.exp((score - best) / sampling.temperature) for score in scores]
    ranked = ranked[: sampling.top_k or None]
    total, share, nucleus = sum(weight[token] for token in ranked), 0.0, list[int]()
    for token in ranked:
        if sampling.top_p < 1 and share >= sampling.top_p:
            break
        nucleus.append(token)
        share += weight[token] / total
    kept = sorted(token for token in nucleus if weight[token] >= sampling.min_p)
    draw = uniform([sampling.seed], [len(outputs)])[0] * sum(weight[token] for token in kept)
    for token in kept:
        draw -= weight[token]
        if draw < 0:
            return token
    return kept[-1]


@settings(max_examples=150, deadline=None)
@given(sampling=samplings)
def test_a_sequence_equals_the_reference(sampling: Sampling) -> None:
    prompt = [1, 2, 2, 3]
    found = generate(sampling, 8)
    for position, token in enumerate(found):
        outputs = found[:position]
        logits = logits_of(outputs)
        assert_same_tokens(
            [token],
            [reference_choice(logits, sampling, prompt, outputs)],
            [choice(logits, sampling, outputs, prompt)],
        )


BATCH = [
    Sampling(temperature=0.0),
    Sampling(temperature=1.3, seed=5),
    Sampling(temperature=1.3, seed=5),
    Sampling(top_k=5, top_p=0.8, seed=-3, logprobs=2),
    Sampling(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5),
    Sampling(min_p=0.1, presence_penalty=1.0, seed=2**63 - 1),
    Sampling(temperature=0.0, min_tokens=6, stop_token_ids=list(range(20))),
]


def test_neither_batch_mates_nor_their_order_change_a_sequence() -> None:
    alone = [generate(sampling, 20, seq) for seq, sampling in enumerate(BATCH)]
    sampler, rng = Sampler(VOCAB), np.random.default_rng(0)
    for seq, sampling in enumerate(BATCH):
        sampler.start(start(seq, sampling))
    outputs: list[list[int]] = [[] for _ in BATCH]
    while any(len(tokens) < 20 for tokens in outputs):
        # Any subset runs in a step, in any order.
        seqs = [int(seq) for seq in rng.permutation(len(BATCH)) if len(outputs[seq]) < 20]
        seqs = seqs[: rng.integers(1, len(seqs) + 1)]
        logits = np.stack([logits_of(outputs[seq], seq) for seq in seqs])
        tokens, _, failed = sampler.sample(seqs, logits)
        assert not failed
        for seq, token in zip(seqs, tokens, strict=True):
            outputs[seq].append(token)
    assert outputs == alone


@pytest.mark.parametrize("sampling", BATCH)
def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(sampling: Sampling) -> None:
    assert generate(sampling, 90, restart_after=(1, 5, 70)) == generate(sampling, 90)


def test_the_draw_for_a_position_is_a_function_of_seed_and_position() -> None:
    uniform_logits = np.zeros((1, VOCAB), np.float32)
    for seed in (0, 7, -1, -(2**63)):
        sampler = Sampler(VOCAB)
        sampler.start(start(9, Sampling(seed=seed)))
        found = [sampler.sample([9], uniform_logits)[0][0] for _ in range(130)]
        draws = uniform([seed % 2**64] * 130, range(130))
        assert found == (draws * VOCAB).astype(int).tolist()


def test_penalties_count_output_and_repetition_the_prompt_too() -> None:
    logits = np.array([[5.0, 4.0, 3.0, 2.0]], np.float32)

    def first(count: int, prompt: list[int], **penalties: Any) -> list[int]:
        sampler, tokens = Sampler(4), list[int]()
        sampler.start(start(0, Sampling(temperature=0.0, **penalties), prompt=prompt))
        for _ in range(count):
            tokens += sampler.sample([0], logits)[0]
        return tokens

    assert first(3, [0, 0, 0], presence_penalty=1.5) == [0, 1, 0]
    assert first(4, [0, 0, 0], frequency_penalty=0.75) == [0, 0, 1, 0]
    assert first(3, [0], repetition_penalty=2.0) == [1, 2, 0]


def test_min_tokens_hold_stop_tokens_back_until_then() -> None:
    logits = np.array([[0.0, 9.0, 5.0]], np.float32)
    sampler = Sampler(3)
    sampler.start(start(0, Sampling(temperature=0.0, min_tokens=2, stop_token_ids=[1])))
    assert [sampler.sample([0], logits)[0] for _ in range(3)] == [[2], [2], [1]]
    sampler.start(start(0, Sampling(temperature=0.0, min_tokens=2, stop_token_ids=[1]), [0], [2]))
    assert [sampler.sample([0], logits)[0] for _ in range(2)] == [[2], [1]]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = np.random.default_rng(3).normal(0, 2, (2, VOCAB)).astype(np.float32)
    shaped = Sampling(
        temperature=3.0, top_k=2, logprobs=3, banned_token_ids=[0], logit_bias={7: 50.0}, seed=1
    )
    sampler = Sampler(VOCAB)
    sampler.start(start(0, shaped))
    sampler.start(start(1, Sampling(temperature=0.0, logprobs=0)))
    sampler.start(start(2, Sampling(temperature=0.0)))
    before = logits.copy()
    tokens, logprobs, _ = sampler.sample([0, 1, 2], logits[[0, 1, 1]])
    assert np.array_equal(before, logits)
    assert set(logprobs) == {0, 1}
    for seq, row in ((0, logits[0].tolist()), (1, logits[1].tolist())):
        normalizer = math.log(math.fsum(map(math.exp, row)))
        ranked = sorted(range(VOCAB), key=lambda token, row=row: -row[token])  # type: ignore[misc]
        found = logprobs[seq]
        assert found.token == tokens[seq]
        assert found.logprob == pytest.approx(row[tokens[seq]] - normalizer, abs=1e-6)
        assert found.rank == ranked.index(tokens[seq]) + 1
        assert found.top_tokens == ranked[: 3 if seq == 0 else 0]
        assert found.top_logprobs == pytest.approx(
            [row[token] - normalizer for token in found.top_tokens], abs=1e-6
        )


def test_prompt_logprobs_score_each_rows_next_token() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], np.float32))
    first, second = Sampler(3).prompt_logprobs([2, 2], logits, 2)
    assert (first.token, first.rank, first.top_tokens) == (2, 3, [0, 1])
    assert (second.token, second.rank, second.top_tokens) == (2, 1, [2, 1])
    assert first.logprob == pytest.approx(math.log(0.25))
    assert second.top_logprobs == pytest.approx([math.log(0.7), math.log(0.2)])
    assert isinstance(first, Logprobs)
    assert len(Sampler(3).prompt_logprobs([0], logits[:1], -1)[0].top_tokens) == 3


GREEDY = Sampling(temperature=0.0)
FAILURES = [
    ("NaN", GREEDY, math.nan, "NaN or infinity"),
    ("NaN drawn", Sampling(), math.nan, "NaN or infinity"),
    ("NaN masked", Sampling(allowed_token_ids=[3]), math.nan, "NaN or infinity"),
    ("infinity", GREEDY, math.inf, "NaN or infinity"),
    ("infinity drawn", Sampling(top_p=0.9), math.inf, "NaN or infinity"),
    (
        "everything excluded",
        Sampling(allowed_token_ids=[1, 2], banned_token_ids=[2], min_tokens=1, stop_token_ids=[1]),
        None,
        "no token is left to choose",
    ),
    ("penalty", Sampling(repetition_penalty=1e-300), None, "repetition_penalty"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("sampling", "poison", "reason"),
    [failure[1:] for failure in FAILURES],
    ids=[failure[0] for failure in FAILURES],
)
def test_a_failing_sequence_says_why_and_leaves_its_mates_alone(
    sampling: Sampling, poison: float | None, reason: str
) -> None:
    logits = np.stack([logits_of([], seq) for seq in range(3)])
    logits[1, 1] = 5.0
    if poison is not None:
        logits[1, 20] = poison
    sampler = Sampler(VOCAB)
    for seq, its in enumerate([GREEDY, sampling, GREEDY]):
        sampler.start(start(seq, its))
    tokens, logprobs, failed = sampler.sample([0, 1, 2], logits)
    assert tokens == [int(logits[0].argmax()), -1, int(logits[2].argmax())]
    assert list(failed) == [1]
    assert reason in failed[1]
    assert not logprobs


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_p=0.9), Sampling(logprobs=1)])
def test_a_row_of_minus_infinity_fails(sampling: Sampling) -> None:
    sampler = Sampler(VOCAB)
    sampler.start(start(0, sampling))
    tokens, _, failed = sampler.sample([0], np.full((1, VOCAB), -np.inf, np.float32))
    assert tokens == [-1]
    assert "probability zero" in failed[0]


def test_a_token_at_minus_infinity_is_just_never_chosen() -> None:
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, [4, 9]] = 0
    sampler = Sampler(VOCAB)
    sampler.start(start(0, Sampling(seed=1)))
    assert {sampler.sample([0], logits)[0][0] for _ in range(50)} == {4, 9}


@pytest.mark.parametrize("sampling", BATCH)
def test_a_failed_step_leaves_the_state_as_it_was(sampling: Sampling) -> None:
    sampler, outputs = Sampler(VOCAB), list[int]()
    sampler.start(start(0, sampling))
    for step in range(10):
        if step in (0, 4):
            _, _, failed = sampler.sample([0], np.full((1, VOCAB), np.nan, np.float32))
            assert failed
        outputs += sampler.sample([0], logits_of(outputs)[None])[0]
    assert outputs == generate(sampling, 10)


def test_logits_of_the_wrong_shape_or_type_are_refused() -> None:
    sampler = Sampler(VOCAB)
    sampler.start(start(0, GREEDY))
    refused: list[NDArray[Any]] = [
        np.zeros((2, VOCAB), np.float32),
        np.zeros((1, 3), np.float32),
        np.zeros((1, VOCAB), np.float64),
    ]
    for logits in refused:
        with pytest.raises(ValueError, match="logits are"):
            sampler.sample([0], logits)
    with pytest.raises(SamplingError, match="NaN"):
        sampler.prompt_logprobs([0], np.full((1, VOCAB), np.nan, np.float32), 1)


def test_no_sequences_no_tokens_and_an_ended_one_is_gone() -> None:
    sampler = Sampler(VOCAB)
    assert sampler.sample([], np.zeros((0, VOCAB), np.float32)) == ([], {}, {})
    sampler.start(start(0, GREEDY))
    sampler.end(0)
    sampler.end(0)
    with pytest.raises(KeyError):
        sampler.sample([0], np.zeros((1, VOCAB), np.float32))
