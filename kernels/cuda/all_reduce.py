"""The sum of a small array over GPUs that map each other's memory, in one kernel, which adds it to
the residual stream and norms that where rows are few.

For what decoding adds up, where a collective library's rounds take longer than the bytes. A rank
writes to each of the others, so the bytes it sends grow with their number; of two ranks each sends
no more than in a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.dtypes import ctype
from tensorray.kernels.cuda.layout import aligned, stride

_BLOCKS = 128
_THREADS = 512
# The most threads of a block, a pack of 16 bytes each: the longest row that is summed and normed.
_PACKS = 1024
# What a rank sends at most where each four bytes go beside a call's number; no more than a pack a
# thread of all blocks.
_SMALL_SENT_BYTES = _BLOCKS * _THREADS * 16
#: What a rank sends at most; its own memory, for two calls' parts from every rank, is 2.3 (of 8
#: ranks) to 4 times (of 2) as large, and 8 MiB larger for the small calls of each.
_SENT_BYTES = 16 << 20

CONSTANT_SETS = {
    "all_reduce.cu": [
        {"ELEMENT": kind, "STREAM": stream, "RANKS": ranks, "SHARE": share}
        | {"BLOCKS": _BLOCKS, "PACKS": _PACKS}
        for kind, stream, ranks, share in (
            ("__half", "float", 2, 131072),
            ("__half", "__half", 2, 131072),
            ("__nv_bfloat16", "__nv_bfloat16", 8, 18720),
            ("float", "float", 4, 43680),
        )
    ]
}


@dataclass(frozen=True)
class PeerMemory:
    """Memory of `ranks` GPUs, each of which has `bytes_needed(ranks)`, zeros at first.

    `addresses` are those memories as this rank's GPU maps them, its own among them. `stop` is the
    address of a uint32 in the host's memory that GPUs may read; 0 there lets ranks wait.
    """

    rank: int
    addresses: Sequence[int]
    stop: int

    @property
    def ranks(self) -> int:
        return len(self.addresses)


def fits(multiprocessors: int, threads: int) -> bool:
    """Whether a GPU, with so many threads a multiprocessor, holds all blocks of a sum at once."""
    return multiprocessors * (threads // _THREADS) >= _BLOCKS


def most_bytes(ranks: int) -> int:
    """The largest array that `all_reduce` takes."""
    return _BLOCKS * _share(ranks)


def bytes_needed(ranks: int) -> int:
    """Each rank's memory, in bytes."""
    counts = (ranks + 2) * _BLOCKS * 4
    lines = 2 * ranks * _BLOCKS * 2 * _PACKS * 16
    return counts + 2 * ranks * most_bytes(ranks) + lines


def takes(x: Any, ranks: int) -> bool:
    """Whether an array is one that `all_reduce` can add up."""
    whole = x.nbytes % 16 == 0 and x.data.ptr % 16 == 0 and x.flags.c_contiguous
    return bool(whole and 0 < x.nbytes <= most_bytes(ranks))


def all_reduce(x: Any, memory: PeerMemory) -> Any:
    """The sum of every rank's x, in rank order, in float32: a new array like x.

    All ranks call it, with arrays of one shape and dtype, in the same order, on one stream each.
    """
    import cupy

    out = cupy.empty_like(x)
    packs = x.nbytes // 16
    module = _module(x, x, memory)
    # A pack a thread, as long as there are blocks for it, and shares that fit.
    blocks = max(min(_BLOCKS, -(-packs // _THREADS)), -(-x.nbytes // _share(memory.ranks)))
    small = x.nbytes * (memory.ranks - 1) <= _SMALL_SENT_BYTES
    module.function("all_reduce_small" if small else "all_reduce")(
        (blocks,),
        (_THREADS,),
        *(x, out, packs, _addresses(memory), memory.rank, np.uint64(memory.stop)),
        overlap=True,
    )
    return out


def takes_rows(x: Any, delta: Any, weight: Any, ranks: int) -> bool:
    """Whether arrays are such as `all_reduce_norm` takes: few rows, none of them too long, and a
    weight like what is added."""
    if delta.ndim != 2 or x.shape != delta.shape or weight.dtype != delta.dtype:
        return False
    if len(x) > _BLOCKS or not takes(delta, ranks):
        return False
    row_bytes = delta.nbytes // len(delta)
    small = delta.nbytes * (ranks - 1) <= _SMALL_SENT_BYTES and row_bytes <= _PACKS * 16
    return bool(small and row_bytes % 16 == 0 and x.strides[1] == x.itemsize and aligned(x))


def all_reduce_norm(
    x: Any,
    delta: Any,
    weight: Any,
    eps: float,
    memory: PeerMemory,
    *,
    delta_weight: Any | None = None,
) -> tuple[Any, Any]:
    """`tensorray.kernels.norm.add_rms_norm` of x and the sum of every rank's delta, as `all_reduce`
    makes it. Both `[T, n]`, weights `[n]` in delta's dtype."""
    import cupy

    total, y = cupy.empty(x.shape, x.dtype), cupy.empty(x.shape, delta.dtype)
    columns = x.shape[1]
    packs = columns * delta.itemsize // 16
    _module(delta, x, memory).function("all_reduce_norm")(
        (len(x),),
        (-(-packs // 32) * 32,),
        *(x, delta, delta_weight, weight, total, y, columns, stride(x), float(eps)),
        *(_addresses(memory), memory.rank, np.uint64(memory.stop)),
        overlap=True,
    )
    return total, y


def _module(x: Any, stream: Any, memory: PeerMemory) -> compiler.Module:
    return compiler.load(
        "all_reduce.cu",
        ELEMENT=ctype(x),
        STREAM=ctype(stream),
        RANKS=memory.ranks,
        BLOCKS=_BLOCKS,
        SHARE=_share(memory.ranks),
        PACKS=_PACKS,
    )


def _addresses(memory: PeerMemory) -> Any:
    """A `struct Peers`, as a structured scalar."""
    values = np.zeros(1, np.dtype([("at", np.uint64, (memory.ranks,))]))
    values["at"] = memory.addresses
    return values[0]


def _share(ranks: int) -> int:
    """Bytes that a block handles at most."""
    return _SENT_BYTES // max(1, ranks - 1) // _BLOCKS // 16 * 16
