"""Low-rank additions to a product by each row's own adapter, for adapters that lie stacked on a
device (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

In two parts: `shrink` multiplies rows by A, `expand` adds what B makes of that. Both take each
row's slot from the device's memory, so a recorded graph serves any mix of adapters, and skip what
an adapter does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tensorray.kernels.device import is_cuda

#: The stacked rank is a multiple of this.
RANKS = 8


@dataclass(frozen=True)
class Stack:
    """What all slots' adapters add to one weight `[out, in]`, of P modules side by side.

    An adapter's part is `B @ A` for each module: its scale is in B, ranks above its own are zero.
    Slots lie apart in memory, what belongs to one is dense.
    """

    a: Any  # [slots, P * rank, in]: each module's A
    b: Any  # [slots, out, rank]: each module's B in its rows
    ranks: Any  # int32 [slots, P]: the adapter's own, 0 where it has nothing for a module
    starts: Any  # int32 [P + 1]: where each module's outputs start, and the end
    grain: int = 1  # all of `starts` are multiples of it


def shrink(x: Any, stack: Stack, slots: Any) -> Any:
    """`x @ A.T` with each row's A: x `[T, in]` of the stack's dtype, slots int32 `[T]`, of which -1
    is none -> float32 `[T, P * rank]`, set as far as the ranks of the rows' adapters reach."""
    if is_cuda(x):
        from tensorray.kernels.cuda import lora

        return lora.shrink(x, stack, slots)
    return shrink_numpy(x, stack, slots)


def expand(y: Any, inner: Any, stack: Stack, slots: Any) -> None:
    """Add to y `[T, out]`, in place, what each row's B makes of `inner`, which is `shrink`'s.

    Sums are float32, rounded once to y's dtype. Rows without an adapter are left alone.
    """
    if is_cuda(y):
        from tensorray.kernels.cuda import lora

        lora.expand(y, inner, stack, slots)
    else:
        expand_numpy(y, inner, stack, slots)


def shrink_numpy(x: Any, stack: Stack, slots: Any) -> Any:
    """The twin of `shrink`; zero where that leaves values unset."""
    wide = np.result_type(x.dtype, np.float32)
    inner = np.zeros((len(x), stack.a.shape[1]), wide)
    for slot in np.unique(slots[slots >= 0]):
        rows = slots == slot
        inner[rows] = x[rows].astype(wide) @ stack.a[slot].astype(wide).T
    return inner


def expand_numpy(y: Any, inner: Any, stack: Stack, slots: Any) -> None:
    """The twin of `expand`."""
    most = stack.b.shape[2]
    for slot in np.unique(slots[slots >= 0]):
        rows = np.flatnonzero(slots == slot)
        for module, rank in enumerate(stack.ranks[slot]):
            outputs = slice(stack.starts[module], stack.starts[module + 1])
            b = stack.b[slot, outputs, :rank].astype(inner.dtype)
            own = inner[rows, module * most : module * most + rank]
            y[rows, outputs] = (y[rows, outputs] + own @ b.T).astype(y.dtype)
