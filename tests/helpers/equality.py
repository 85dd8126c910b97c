"""When two runs chose the same tokens: the project's one definition of equality.

Rounding differs with batch shape, chunking and device, so two correct runs may part where a choice
hangs by a thread. Hence:

    Two token sequences are equal if they agree up to the first choice that is a near-tie.
    A greedy choice is a near-tie when its top two final scores are less than 1e-4 (float32), 2e-2
    (float16) or 1.6e-1 (bfloat16, of three bits less) apart. A seeded draw is a near-tie when it
    lies within 1e-5 of a boundary.

Final scores are logits after bias, masks and penalties; a gap between two of them is a gap between
log-probabilities. Boundaries are the steps of the cumulative distribution that the draw inverts,
over the tokens left by the filters, in id order; see `boundary_distance` for filters that are
themselves near-ties. What follows a near-tie isn't compared: from there on the contexts differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.protocol import Sampling
from tensorray.kernels.philox import uniform

DType = Literal["float32", "float16", "bfloat16"]

MARGIN: dict[DType, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.6e-1}  # of logits
DRAW_MARGIN = 1e-5  # of probability

_GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Choice:
    """How clear one choice was; infinite: that measure has no bearing on it."""

    margin: float = inf  # between the top two final scores, of a greedy choice
    distance: float = inf  # of the draw to the nearest boundary, of a seeded one

    def is_near_tie(self, dtype: DType = "float32") -> bool:
        return self.margin < MARGIN[dtype] or self.distance < DRAW_MARGIN


Choices = Sequence["float | Choice"] | Callable[[int], "float | Choice"]


def assert_same_tokens(
    ours: Sequence[int], reference: Sequence[int], choices: Choices, dtype: DType = "float32"
) -> None:
    """Fails unless the sequences are equal in this module's sense.

    `choices` says how clear the reference's choice at each output position was: a sequence, or a
    function of the position, called only where the sequences part. Plain floats are greedy
    margins. Parting is excused at a near-tie only; one that both runs resolved alike is no licence
    for what comes later.
    """
    for position, (our, their) in enumerate(zip(ours, reference, strict=False)):
        if our == their:
            continue
        found = choices(position) if callable(choices) else choices[position]
        choice = found if isinstance(found, Choice) else Choice(margin=found)
        assert choice.is_near_tie(dtype), (
            f"token {our} instead of {their} at output position {position}, where the choice was "
            f"clear: {choice}"
        )
        return
    assert len(ours) == len(reference), (
        f"{len(ours)} tokens instead of {len(reference)}; those of the shorter one agree"
    )


def choice(
    logits: NDArray[Any],
    sampling: Sampling,
    outputs: Sequence[int],
    prompt: Sequence[int] = (),
    dtype: DType = "float32",
) -> Choice:
    """How clear the choice after `outputs` is, from the model's raw logits [vocab]."""
    if sampling.temperature == 0:
        return Choice(margin=top_two_margin(logits, sampling, outputs, prompt))
    distance = boundary_distance(
        logits, sampling, outputs, len(outputs), prompt=prompt, dtype=dtype
    )
    return Choice(distance=distance)


def top_two_margin(
    logits: NDArray[Any],
    sampling: Sampling = _GREEDY,
    outputs: Sequence[int] = (),
    prompt: Sequence[int] = (),
) -> float:
    """The gap between the top two final scores of raw logits [vocab]."""
    second, first = np.partition(final_scores(logits, sampling, outputs, prompt), -2)[-2:]
    return float(first - second)


def final_scores(
    logits: NDArray[Any], sampling: Sampling, outputs: Sequence[int], prompt: Sequence[int] = ()
) -> NDArray[np.float64]:
    """Raw logits [vocab] after bias, masks and penalties, in float64, as `Sampling` orders them.

    `outputs` are the tokens generated so far; `prompt` matters to the repetition penalty only.
    """
    scores = np.array(logits, np.float64)
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    if sampling.allowed_token_ids is not None:
        others = np.ones(len(scores), bool)
        others[sampling.allowed_token_ids] = False
        scores[others] = -inf
    scores[sampling.banned_token_ids] = -inf
    if len(outputs) < sampling.min_tokens:
        scores[sampling.stop_token_ids] = -inf
    for token in {*prompt, *outputs}:
        by = sampling.repetition_penalty
        scores[token] = scores[token] / by if scores[token] > 0 else scores[token] * by
    for token, count in Counter(outputs).items():
        scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return scores


def boundary_distance(
    logits: NDArray[Any],
    sampling: Sampling,
    outputs: Sequence[int],
    position: int,
    *,
    prompt: Sequence[int] = (),
    dtype: DType = "float32",
) -> float:
    """How far the draw at output `position` lies from the nearest boundary, in probability.

    A filter can be a near-tie too, and a token that drops out moves every boundary. A token's
    membership is in doubt when it and a token on the other side of a top-k or top-p cut are less
    than the dtype's margin apart; when the share of the tokens before it is within 1e-5 of top_p;
    or when its score is within the dtype's margin of the min-p threshold. Each boundary is then an
    interval, from its place with every doubtful token before it out and every one after it in, to
    its place the other way round; inside an interval the distance is 0. With nothing in doubt the
    intervals are points. A draw with a single possible token is infinitely far from any boundary.
    """
    draw = float(uniform([sampling.seed & (2**64 - 1)], [position])[0])
    scores = final_scores(logits, sampling, outputs, prompt)
    certain, possible = _membership(scores, sampling, MARGIN[dtype])
    weights = np.exp((scores - scores.max()) / sampling.temperature)
    sure = np.cumsum(weights * certain)
    doubtful = np.cumsum(weights * (possible & ~certain))
    ends = np.flatnonzero(possible & (weights > 0))[:-1]  # behind the last token is no boundary
    if not len(ends):
        return inf
    before, after = doubtful[ends], doubtful[-1] - doubtful[ends]
    lowest = sure[ends] / (sure[-1] + after)
    highest = (sure[ends] + before) / (sure[-1] + before)
    return float(np.maximum(np.maximum(lowest - draw, draw - highest), 0.0).min())


def _membership(
    scores: NDArray[np.float64], sampling: Sampling, margin: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tokens pass the filters for sure, and which may: two bool [vocab]."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    weights = np.exp((ranked - ranked[0]) / sampling.temperature)
    certain, possible = weights > 0, weights > 0
    kept = len(ranked)
    if 0 < sampling.top_k < kept:
        kept = sampling.top_k
        inside, within_reach = _best(ranked, kept, margin)
        certain, possible = certain & inside, possible & within_reach
    if sampling.top_p < 1:
        shares = np.cumsum(weights[:kept]) / weights[:kept].sum()
        share_before = np.concatenate([[0.0], shares[:-1]])
        count = int(np.count_nonzero(share_before < sampling.top_p))
        inside, within_reach = _best(ranked, count, margin)
        close = 1 + np.flatnonzero(np.abs(share_before[1:] - sampling.top_p) < DRAW_MARGIN)
        inside[close], within_reach[close] = False, True
        certain, possible = certain & inside, possible & within_reach
    if sampling.min_p > 0:
        above = ranked - (ranked[0] + sampling.temperature * log(sampling.min_p))
        certain, possible = certain & (above >= margin), possible & (above > -margin)
    if ranked[0] - ranked[1] >= margin:
        certain[0] = True  # whatever the filters, they keep the best token

    by_id = np.empty_like(order)
    by_id[order] = np.arange(len(order))
    return certain[by_id], possible[by_id]


def _best(
    ranked: NDArray[np.float64], count: int, margin: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the falling scores are among the `count` best for sure, and which may be."""
    inside = np.arange(len(ranked)) < count
    if count == len(ranked):
        return inside, inside.copy()
    with np.errstate(invalid="ignore"):  # between tokens at -inf, which weigh nothing
        clear_in = ranked - ranked[count] >= margin
        clear_out = ranked[count - 1] - ranked >= margin
    return inside & clear_in, inside | ~clear_out
