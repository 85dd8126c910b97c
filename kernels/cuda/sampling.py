"""Sampling on the device: what kernels/batch_sampling.py says, on CuPy arrays.

The launches are for one stream at a time: blocks that share a row wait for each other, which all
of them being on the device allows.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tensorray.kernels import batch_sampling as twin
from tensorray.kernels.batch_sampling import RowState
from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.dtypes import ctype

_WORDS = ("BANNED", "STOP", "BIASED", "SEEN", "COUNT", "ALLOW")
_NUMBERS = ("OK", "NOT_FINITE", "ALL_EXCLUDED", "NONE_LEFT", "OVERFLOW", "SCORE_HEADER")
_CONSTANTS: dict[str, int | str] = {
    **{name: f"{int(getattr(twin, name)):#x}u" for name in _WORDS},
    **{name: getattr(twin, name) for name in _NUMBERS},
}
CONSTANT_SETS = {
    "sampling.cu": [
        {"LOGIT": logit, **_CONSTANTS} for logit in ("__half", "__nv_bfloat16", "float")
    ],
    "sampling_state.cu": [_CONSTANTS],
}

# As in sampling.cu.
_THREADS = 512
_GREEDY_THREADS = 256
_VECTOR = 8
_SLAB = 512
_BINS = _LIST = 2048
_HISTOGRAMS, _COUNTERS = 3, 8

_BLOCKS_PER_PROCESSOR = 2  # of those that wait for each other, at once
_GREEDY_BLOCKS_PER_PROCESSOR = 4


def prepare(state: RowState, dtype: Any, scored: int) -> None:
    """See `tensorray.kernels.batch_sampling.prepare`."""
    for name in ("greedy_rows", "sample_rows", "score_rows"):
        _function(name, ctype(np.empty(0, dtype)))
    for name in ("set_rows", "edit_words", "keep_right"):
        _function(name)
    rows, vocab = len(state.rows), state.words.shape[1]
    _workspace(max(rows, scored), vocab)
    _greedy_workspace(rows)


def set_rows(state: RowState, index: Any, records: Any) -> None:
    """See `tensorray.kernels.batch_sampling.set_rows`."""
    words = records.shape[1] // 4
    _function("set_rows")((len(index),), (32,), state.rows, index, records, words, overlap=True)


def edit_words(state: RowState, index: Any, edits: Any) -> None:
    """See `tensorray.kernels.batch_sampling.edit_words`."""
    blocks = min(-(-len(index) // 256), 256)
    _function("edit_words")((blocks,), (256,), state.words, index, edits, len(index), overlap=True)


def keep_right(index: Any, tokens: Any, drafts: Any) -> None:
    """See `tensorray.kernels.batch_sampling.keep_right`."""
    blocks = -(-len(index) // 256)
    _function("keep_right")((blocks,), (256,), index, tokens, drafts, len(index), overlap=True)


def greedy_rows(logits: Any, index: Any, state: RowState, out: Any) -> None:
    """See `tensorray.kernels.batch_sampling.greedy_rows`."""
    count, vocab = len(index), logits.shape[1]
    most = -(-vocab // (_GREEDY_THREADS * _VECTOR))
    parts = min(max(_GREEDY_BLOCKS_PER_PROCESSOR * compiler.multiprocessors() // count, 1), most)
    best, arrived = _greedy_workspace(count)
    _function("greedy_rows", ctype(logits))(
        (parts, count),
        (_GREEDY_THREADS,),
        *_described(logits),
        *(index, state.rows, best, arrived, state.last_tokens, out),
        overlap=True,
    )


def sample_rows(
    logits: Any,
    index: Any,
    state: RowState,
    out: Any,
    masks: Any = None,
    mask_rows: Any = None,
) -> None:
    """See `tensorray.kernels.batch_sampling.sample_rows`."""
    count = len(index)
    mask_words = 0 if masks is None else masks.shape[1]
    workspace, stride = _workspace(count, logits.shape[1])
    _function("sample_rows", ctype(logits))(
        (_parts(count, logits.shape[1]), count),
        (_THREADS,),
        *_described(logits),
        *(index, state.rows, state.words, state.bias_tokens, state.biases),
        *(state.biases.shape[1], masks, mask_rows, mask_words),
        *(workspace, stride, state.last_tokens, out),
        overlap=True,
    )


def score_rows(logits: Any, index: Any, tokens: Any, out: Any) -> None:
    """See `tensorray.kernels.batch_sampling.score_rows`."""
    count, vocab = len(index), logits.shape[1]
    top = (out.shape[1] - twin.SCORE_HEADER) // 2
    workspace, stride = _workspace(count, vocab)
    _function("score_rows", ctype(logits))(
        (_parts(count, vocab), count),
        (_THREADS,),
        *_described(logits),
        *(index, tokens, top, workspace, stride, out),
        overlap=True,
    )


def _function(name: str, logit: str | None = None) -> compiler.Function:
    """A kernel for a type of logits; None: one of the state's."""
    return _loaded(_device(), name, logit)


@functools.cache
def _loaded(device: int, name: str, logit: str | None) -> compiler.Function:
    if logit is None:
        module = compiler.load("sampling_state.cu", None, **_CONSTANTS)
    else:
        module = compiler.load("sampling.cu", None, LOGIT=logit, **_CONSTANTS)
    return module.function(name)


def _described(logits: Any) -> tuple[Any, ...]:
    """The logits as the kernels take them: array, pitch, vocabulary, whether vectors are whole."""
    vocab, itemsize = logits.shape[1], logits.itemsize
    pitch = logits.strides[0] // itemsize
    wide = vocab % _VECTOR == 0 and pitch % _VECTOR == 0 and logits.data.ptr % 16 == 0
    return logits, np.int64(pitch), vocab, int(wide)


def _parts(count: int, vocab: int) -> int:
    """Blocks that share a row: as many as run at once, and find a slab for each warp."""
    most = -(-vocab // (_SLAB * _THREADS // 32))
    return min(max(_BLOCKS_PER_PROCESSOR * compiler.multiprocessors() // count, 1), most)


_WORKSPACES: dict[tuple[int, int], Any] = {}
_GREEDY_WORKSPACES: dict[int, tuple[Any, Any]] = {}


def _device() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def _workspace(count: int, vocab: int) -> tuple[Any, int]:
    """Scratch for `count` rows, whose counters are zero between launches; bytes a row."""
    import cupy

    slabs = -(-vocab // _SLAB)
    wide = 8 * (slabs + _LIST + _HISTOGRAMS * _BINS)
    stride = -(-(wide + 4 * (_HISTOGRAMS * _BINS + _COUNTERS + 3 * slabs)) // 16) * 16
    key = _device(), stride
    found = _WORKSPACES.get(key)
    if found is None or len(found) < count:
        found = _WORKSPACES[key] = cupy.zeros((count, stride), np.uint8)
    return found, stride


def _greedy_workspace(count: int) -> tuple[Any, Any]:
    import cupy

    found = _GREEDY_WORKSPACES.get(_device())
    if found is None or len(found[0]) < count:
        found = cupy.zeros(count, np.uint64), cupy.zeros(count, np.uint32)
        _GREEDY_WORKSPACES[_device()] = found
    return found
