"""From one row of logits to one token: edits, filters, a draw, log-probabilities.

The caller edits a row that it owns (`add_bias`, `keep_only`, `ban`, `penalize`, in place), then
takes its best token (`greedy`, whole batches at once) or draws one (`draw`). A vocabulary row of a
few hundred thousand entries is expensive to sort and to copy to float64, so nothing here does
either to more than the candidates a filter can keep; work goes row by row, which also keeps the
temporaries inside a core's cache.

Wherever tokens are ranked, equal logits rank by lower id first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]  # [vocab]
TokenIds = NDArray[np.int64]  # [n]
Floats = NDArray[np.floating]

_SUM_BLOCK = 512  # weights a block when a draw searches a whole vocabulary
_MAX_CHUNK = 64  # logits under one maximum when the top k are looked for
_CHUNKS_PER_PICK = 8  # at least so many maxima for each of the k
_COLDEST = 1e-30  # what a lower temperature acts as: float32 can hardly divide by less


def greedy(logits: NDArray[np.float32]) -> tuple[TokenIds, NDArray[np.float32]]:
    """Each row's best token and its logit: int64 [R], float32 [R] from float32 [R, vocab].

    A row that holds a NaN reports NaN as its best logit.
    """
    tokens = logits.argmax(axis=1)
    return tokens, logits[np.arange(len(logits)), tokens]


def add_bias(row: Row, tokens: TokenIds, bias: NDArray[np.float32]) -> None:
    """Adds bias[i] to the logit of tokens[i]; each token is named once."""
    row[tokens] += bias


def keep_only(row: Row, tokens: TokenIds) -> None:
    """Every token but these gets logit -inf."""
    kept = row[tokens]
    row.fill(-np.inf)
    row[tokens] = kept


def keep_masked(row: Row, mask: NDArray[np.int32]) -> Row:
    """A copy of the row in which every token whose bit is not set has logit -inf.

    mask: int32 [ceil(vocab / 32)], in which a token's bit is bit `token % 32` of word
    `token // 32`.
    """
    words = mask.astype("<i4", copy=False).view(np.uint8)
    allowed = np.unpackbits(words, count=row.size, bitorder="little").view(np.bool_)
    return np.where(allowed, row, np.float32(-np.inf))


def ban(row: Row, tokens: TokenIds) -> None:
    """These tokens get logit -inf."""
    row[tokens] = -np.inf


def penalize(
    row: Row,
    tokens: TokenIds,
    generated: NDArray[np.int64],
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """Penalizes tokens seen before; `tokens` are distinct, `generated[i]` how often tokens[i] was.

    Repetition (CTRL, arXiv 1909.05858, with the sign-aware form that Hugging Face gave it) divides
    positive logits and multiplies the others, for every token in `tokens`: prompt and output.
    Frequency and presence (OpenAI's definition) subtract `frequency * generated` and, where
    anything was generated, `presence`.
    """
    seen = row[tokens].astype(np.float64)
    with np.errstate(over="ignore"):  # to infinity, which the caller must look for
        seen = np.where(seen > 0, seen / repetition, seen * repetition)
        row[tokens] = seen - frequency * generated - presence * (generated > 0)


def largest(scores: Row, k: int) -> TokenIds:
    """Ids of the k largest scores, best first; fewer when fewer are above -inf. No NaN allowed."""
    ids = _contenders(scores, k)
    # One sort of (falling score, rising id) packed into an integer: many times faster than a
    # stable argsort.
    bits = (scores[ids] + np.float32(0)).view(np.uint32)  # + 0: -0.0 ties with 0.0
    falling = np.where(bits >> np.uint32(31), bits, bits ^ np.uint32(0x7FFFFFFF))
    keys = falling.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64)
    keys.sort()
    best: NDArray[np.int64] = (keys[:k] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return best


@np.errstate(over="ignore")  # of differences over a tiny temperature to -inf, which weighs 0
def draw(
    scores: Row,
    uniform: float,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """One token from softmax(scores / temperature) after its filters, by inverting the CDF.

    The CDF runs over the kept tokens in id order, in float64; the draw takes the first token whose
    cumulative share exceeds `uniform`, in [0, 1). Filters, each over what the one before it kept:
    top-k (0: off) keeps the k best; top-p (arXiv 1904.09751, 1: off) the fewest best tokens whose
    share reaches top_p, so always one; min-p (arXiv 2407.01082, 0: off) those at least min_p times
    as likely as the best one. `temperature` is above 0; `scores` hold neither NaN nor +inf, and at
    least one is above -inf.
    """
    best = scores.max()
    temperature = max(temperature, _COLDEST)
    limit_k, limit_p = 0 < top_k < scores.size, top_p < 1
    if not (limit_k or limit_p or min_p > 0):
        return _invert(_weights(scores, best, temperature), uniform)

    # `ids`, rising, hold every token the filters may keep, and few others.
    mass = 0.0
    if limit_k:
        ids = _contenders(scores, top_k)
    elif limit_p:
        everything = _weights(scores, best, temperature)
        mass = float(everything.sum(dtype=np.float64))
        # Together the weights below this come to less than 1 - top_p, so no nucleus needs them.
        ids = (everything >= (1 - top_p) * mass / scores.size).nonzero()[0]
    else:
        ids = (scores >= best + temperature * math.log(min_p)).nonzero()[0]
    weights = _weights(scores[ids].astype(np.float64), best, temperature)

    if limit_k or limit_p:
        ranked = np.sort(weights)[::-1][: top_k if limit_k else None]
        kept = len(ranked)
        if limit_p:
            shares = ranked.cumsum()
            reach = top_p * (shares[-1] if limit_k else mass)
            kept = min(int(shares.searchsorted(reach)) + 1, kept)
        if min_p > 0:
            kept = min(kept, int(np.count_nonzero(ranked >= min_p)))
        chosen = _best(weights, ranked[kept - 1], kept)
        ids, weights = ids[chosen], weights[chosen]
    return int(ids[_invert(weights, uniform)])


class TokenScore(NamedTuple):
    """One token under a row's softmax, and the row's best tokens; natural logarithms."""

    logprob: float
    rank: int  # 1: the best token
    top_tokens: list[int]
    top_logprobs: list[float]


@np.errstate(over="ignore")
def score(row: Row, token: int, top: int) -> TokenScore:
    """The log-softmax of `row` at `token` and at its `top` best tokens (-1: all above -inf).

    `row` holds neither NaN nor +inf, and at least one entry is above -inf.
    """
    normalizer = log_normalizer(row)
    mine = row[token]
    rank = 1 + np.count_nonzero(row > mine) + np.count_nonzero(row[:token] == mine)
    tokens = largest(row, row.size if top < 0 else top) if top else np.empty(0, np.int64)
    logprobs = row[tokens].astype(np.float64) - normalizer
    return TokenScore(float(mine) - normalizer, int(rank), tokens.tolist(), logprobs.tolist())


@np.errstate(over="ignore")
def log_normalizer(row: Row) -> float:
    """The logarithm of the sum of exp(row), of a row as `score` takes it."""
    best = row.max()
    return float(best) + math.log(float(_weights(row, best, 1.0).sum(dtype=np.float64)))


def _weights(scores: Floats, best: np.float32, temperature: float) -> Floats:
    """exp((scores - best) / temperature), in the dtype of `scores`; the best token weighs 1."""
    shifted = scores - best
    if temperature != 1.0:
        shifted /= temperature
    weights: Floats = np.exp(shifted, out=shifted)
    return weights


def _contenders(scores: Row, k: int) -> TokenIds:
    """Ids, rising, of all scores above -inf that can be among the k largest, and of few others.

    Each of the k best chunks of the row holds a score at or above the k-th best chunk maximum, so
    the k best scores reach it too. Chunks are strided: NumPy's maximum over axis 0 runs at full
    vector width.
    """
    size = scores.size
    chunk = min(size // (_CHUNKS_PER_PICK * max(k, 1)), _MAX_CHUNK)
    if chunk > 1:
        chunks = size // chunk
        maxima = scores[: chunk * chunks].reshape(chunk, chunks).max(axis=0)
        floor = np.partition(maxima, chunks - k)[chunks - k]
    else:
        floor = np.float32(-np.inf)
    ids: TokenIds = (scores >= floor if floor > -np.inf else scores > -np.inf).nonzero()[0]
    return ids


def _best(weights: Floats, lowest: float, count: int) -> TokenIds:
    """Rising indices of the `count` largest weights, of which the least is `lowest`; of several
    equal to it the first ones stay."""
    indices: TokenIds = (weights >= lowest).nonzero()[0]
    if surplus := len(indices) - count:
        stays = np.ones(len(indices), bool)
        ties = (weights[indices] == lowest).nonzero()[0]
        stays[ties[-surplus:]] = False
        indices = indices[stays]
    return indices


def _invert(weights: Floats, uniform: float) -> int:
    """The first index whose cumulative weight exceeds uniform times the total.

    Many weights are summed by blocks, and only one block's one by one: a float64 running sum over
    a whole vocabulary costs more than everything else in a draw.
    """
    if weights.size <= _SUM_BLOCK:
        inside = weights.cumsum(dtype=np.float64)
        return _first_above(inside, uniform * inside[-1])
    whole = weights.size // _SUM_BLOCK
    blocks = np.empty(whole + 1)
    weights[: whole * _SUM_BLOCK].reshape(whole, _SUM_BLOCK).sum(
        axis=1, dtype=np.float64, out=blocks[:whole]
    )
    blocks[whole] = weights[whole * _SUM_BLOCK :].sum(dtype=np.float64)
    ends = blocks.cumsum()
    target = uniform * ends[-1]
    block = _first_above(ends, target)
    inside = weights[block * _SUM_BLOCK : (block + 1) * _SUM_BLOCK].cumsum(dtype=np.float64)
    if block:
        inside += ends[block - 1]
    return block * _SUM_BLOCK + _first_above(inside, target)


def _first_above(cumulative: NDArray[np.float64], target: float) -> int:
    """The first index whose cumulative sum is above `target`, or, should rounding leave none, the
    last one that added anything; never an index of weight 0."""
    index = cumulative.searchsorted(target, side="right")
    if index == len(cumulative):
        index = cumulative.searchsorted(cumulative[-1])
    return int(index)
