"""One token for each of many rows of logits, from state that stays on the device.

What `kernels/sampling.py` does to one row on the host, done to all rows of a step where the logits
are: on a GPU by kernels/cuda/sampling.cu, on NumPy arrays by the twins here, which call it row by
row. A *row* of the state is a running sequence's: its parameters, how many tokens it has generated
and its newest token, so that the next step can be queued before the host has read this one.

Sequences that edit their logits (bias, allowed and banned tokens, a minimum length, penalties)
have a *slot* as well, with one word for every token of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.kernels import sampling
from tensorray.kernels.device import is_cuda
from tensorray.kernels.philox import uniform

# A row's parameters, as sampling.cu reads them. The fields mean what actors/protocol.py's
# `Sampling` says; temperature 0 is greedy, top_k 0 off, min_tokens 0 without stop tokens.
ROW = np.dtype(
    [
        ("repetition", np.float64),
        ("frequency", np.float64),
        ("presence", np.float64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("seed", np.uint64),
        ("top_k", np.int32),
        ("min_tokens", np.int32),
        ("outputs", np.int32),  # generated so far; the device counts on
        ("slot", np.int32),  # -1: logits are taken as they are
        ("biased", np.int32),  # entries of the slot's bias
        ("unused", np.int32),
    ]
)

assert ROW.fields is not None
_SLOT_AT = ROW.fields["slot"][1] // 4  # in int32 words

# A word of a slot: what holds for a token, and how often it was generated in the low bits.
BANNED = np.uint32(1 << 31)
STOP = np.uint32(1 << 30)  # banned until `min_tokens`
BIASED = np.uint32(1 << 29)  # named in the slot's bias
SEEN = np.uint32(1 << 28)  # in the prompt
COUNT = np.uint32((1 << 28) - 1)
ALLOW = np.uint32(0xFFFFFFFF)  # not a word, but an edit of one: not banned any more

# What became of a row.
OK, NOT_FINITE, ALL_EXCLUDED, NONE_LEFT, OVERFLOW = range(5)

# Words of a score before the best tokens' ids and logits: the row's log-normalizer (float64) and
# the token's logit (float32), its rank, how many best tokens follow, and what became of the row.
SCORE_HEADER = 6
# The best tokens that a score can name.
MAX_TOP = 512


@dataclass
class RowState:
    """The sequences' state on the device: N rows and, for those that edit logits, S slots."""

    rows: Any  # uint8 [N, ROW.itemsize]
    last_tokens: Any  # int32 [N]
    words: Any  # uint32 [S, vocab]
    bias_tokens: Any  # int32 [S, B], rising
    biases: Any  # float32 [S, B]


def prepare(state: RowState, dtype: Any, scored: int) -> None:
    """Make what the functions here make at first use, for logits of a dtype; at most so many rows
    are scored at once."""
    if is_cuda(state.rows):
        from tensorray.kernels.cuda import sampling as cuda

        cuda.prepare(state, dtype, scored)


def set_rows(state: RowState, index: Any, records: Any) -> None:
    """Row `index[i]` becomes `records[i]`: int32 [n], distinct, and uint8 [n, ROW.itemsize]."""
    if is_cuda(index):
        from tensorray.kernels.cuda import sampling as cuda

        cuda.set_rows(state, index, records)
    else:
        state.rows[index] = records


def copy_unedited(source: RowState, target: RowState) -> None:
    """Have the rows of one state be those of another, but for what edits logits. No slot is used,
    so the target needs none."""
    target.rows[...] = source.rows
    target.rows.view(np.int32)[:, _SLOT_AT] = -1


def edit_words(state: RowState, index: Any, edits: Any) -> None:
    """Edit words of slots: uint32 [n] flat places (slot * vocab + token) and uint32 [n] edits.

    An edit is flags to set, or a number to add to the count, or `ALLOW`.
    """
    if is_cuda(index):
        from tensorray.kernels.cuda import sampling as cuda

        cuda.edit_words(state, index, edits)
        return
    words = state.words.reshape(-1)
    words[index[edits == ALLOW]] &= ~BANNED
    flags = (edits != ALLOW) & (edits > COUNT)
    np.bitwise_or.at(words, index[flags], edits[flags])
    counts = edits <= COUNT
    np.add.at(words, index[counts], edits[counts])


def keep_right(index: Any, tokens: Any, drafts: Any) -> None:
    """Leave out, of the rows that go on after a draft, those whose token is another: index[i]
    becomes -1 where tokens[i] is not drafts[i]. All int32 [n]."""
    if is_cuda(index):
        from tensorray.kernels.cuda import sampling as cuda

        cuda.keep_right(index, tokens, drafts)
    else:
        index[tokens != drafts] = -1


def greedy_rows(logits: Any, index: Any, state: RowState, out: Any) -> None:
    """Each row's best token, for sequences that neither draw nor edit.

    logits [>= n, vocab], float32, float16 or bfloat16, the last axis dense; index int32 [n], the
    rows of the state that the logits belong to, distinct, or below 0: to be left out. out int32
    [2, n] gets the tokens, -1 for a row without one, and what became of each row (`OK`, …). Where a
    token was chosen it becomes the row's newest, and the row's count of outputs goes up by one.
    """
    if is_cuda(logits):
        from tensorray.kernels.cuda import sampling as cuda

        cuda.greedy_rows(logits, index, state, out)
        return
    for i, row in enumerate(index):
        if row < 0:
            out[:, i] = -1, OK
            continue
        scores = logits[i].astype(np.float32)
        status = _status(scores.max())
        out[:, i] = (-1 if status else scores.argmax()), status
        if not status:
            _append(state, row, int(out[0, i]))


def sample_rows(
    logits: Any,
    index: Any,
    state: RowState,
    out: Any,
    masks: Any = None,
    mask_rows: Any = None,
) -> None:
    """One token for each row as its parameters say; otherwise like `greedy_rows`.

    masks uint32 [m, ceil(vocab / 32)], mask_rows int32 [n]: row i may choose only tokens whose bit
    (token % 32 of word token // 32, low bits first) is set in masks[mask_rows[i]]; -1: any token.
    """
    if is_cuda(logits):
        from tensorray.kernels.cuda import sampling as cuda

        cuda.sample_rows(logits, index, state, out, masks, mask_rows)
        return
    for i, row in enumerate(index):
        if row < 0:
            out[:, i] = -1, OK
            continue
        mask = None
        if mask_rows is not None and mask_rows[i] >= 0:
            bits = np.ascontiguousarray(masks[mask_rows[i]]).view(np.uint8)
            mask = np.unpackbits(bits, bitorder="little")[: logits.shape[1]].astype(bool)
        token, status = _sample(logits[i].astype(np.float32), _record(state, row), state, mask)
        out[:, i] = token, status
        if not status:
            _append(state, row, token)


def score_rows(logits: Any, index: Any, tokens: Any, out: Any) -> None:
    """How likely tokens are, and which ones are best, under the softmax of raw logits.

    Row i scores tokens[index[i]] by logits[index[i]]; index int32 [m]. out int32 [m, SCORE_HEADER +
    2 * top] gets the header and then the ids, best first, and the logits (float32) of the `top` at
    most `MAX_TOP` best tokens above -inf. A row whose token is below 0, or whose logits admit no
    choice, gets a status alone.
    """
    if is_cuda(logits):
        from tensorray.kernels.cuda import sampling as cuda

        cuda.score_rows(logits, index, tokens, out)
        return
    top = (out.shape[1] - SCORE_HEADER) // 2
    out.fill(0)
    for i, row in enumerate(index):
        scores, token = logits[row].astype(np.float32), int(tokens[row])
        out[i, 5] = status = _status(scores.max())
        if status or token < 0:
            continue
        scored = sampling.score(scores, token, 0)
        best = sampling.largest(scores, top) if top else np.empty(0, np.int64)
        out[i, :2] = np.array([sampling.log_normalizer(scores)]).view(np.int32)
        out[i, 2] = scores[token : token + 1].view(np.int32)[0]
        out[i, 3:5] = scored.rank, len(best)
        out[i, SCORE_HEADER : SCORE_HEADER + len(best)] = best
        first = SCORE_HEADER + top
        out[i, first : first + len(best)] = scores[best].view(np.int32)


def _status(best: Any) -> int:
    if np.isfinite(best):
        return OK
    return ALL_EXCLUDED if best == -np.inf else NOT_FINITE


def _record(state: RowState, row: int) -> Any:
    return state.rows[row].view(ROW)[0]


def _append(state: RowState, row: int, token: int) -> None:
    record = _record(state, row)
    state.rows[row].view(ROW)["outputs"] += 1
    state.last_tokens[row] = token
    if _penalizes(record):
        state.words[record["slot"], token] += np.uint32(1)


def _penalizes(record: Any) -> bool:
    return bool(
        record["slot"] >= 0
        and (record["repetition"] != 1 or record["frequency"] != 0 or record["presence"] != 0)
    )


def _sample(
    scores: NDArray[np.float32], record: Any, state: RowState, mask: NDArray[np.bool_] | None
) -> tuple[int, int]:
    """The token and the status of one row, whose scores are edited in place."""
    if status := _status(scores.max()):
        return -1, status
    if record["slot"] >= 0 or mask is not None:
        _edit(scores, record, state, mask)
        best = scores.max()
        if not np.isfinite(best):
            return -1, NONE_LEFT if best == -np.inf else OVERFLOW
    if record["temperature"] == 0:
        return int(scores.argmax()), OK
    draw = uniform([int(record["seed"])], [int(record["outputs"])])[0]
    temperature, top_k = float(record["temperature"]), int(record["top_k"])
    top_p, min_p = float(record["top_p"]), float(record["min_p"])
    return sampling.draw(scores, draw, temperature, top_k, top_p, min_p), OK


def _edit(
    scores: NDArray[np.float32], record: Any, state: RowState, mask: NDArray[np.bool_] | None
) -> None:
    slot = record["slot"]
    if slot >= 0:
        words, biased = state.words[slot], record["biased"]
        sampling.add_bias(scores, state.bias_tokens[slot, :biased], state.biases[slot, :biased])
        held_back = BANNED | (STOP if record["outputs"] < record["min_tokens"] else np.uint32(0))
        scores[words & held_back != 0] = -np.inf
    if mask is not None:
        scores[~mask] = -np.inf
    if _penalizes(record):
        seen = np.flatnonzero(words & (SEEN | COUNT))
        generated = (words[seen] & COUNT).astype(np.int64)
        by = (float(record[name]) for name in ("repetition", "frequency", "presence"))
        sampling.penalize(scores, seen, generated, *by)
