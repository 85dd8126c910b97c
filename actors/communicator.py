"""What ranks say to each other inside a step: one interface, whatever carries the bytes.

A replica's shards form a *world*; the tensor-parallel ranks of a stage are a subgroup of it. All
ranks of a group call the same operations in the same order. Ranks that add the same values get
the same bits: sums are made in rank order, whatever the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class CommunicatorError(RuntimeError):
    """A group that is broken for good; the message names the peer and says what became of it.

    `peer` is its rank in the world, None where it isn't one peer's doing.
    """

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer


class Communicator(Protocol):
    """A group of ranks, as one of them sees it. Ranks count from 0 within the group.

    One thread at a time may use it, and all communicators that share its connections; `abort`
    alone may be called from any other. Every operation but `abort` raises CommunicatorError when
    a peer is gone, has not answered for the group's time-out, or the group was aborted; it is of
    no use any more then, and neither are its subgroups.
    """

    rank: int
    size: int

    def all_reduce(self, x: Any) -> Any:
        """The sum over the ranks of x, which has the same shape and dtype on each: a new array."""
        ...

    def all_gather(self, x: Any) -> Any:
        """Every rank's x, of one shape and dtype: `[size, *x.shape]`."""
        ...

    def reduce_scatter(self, x: Any) -> Any:
        """x is `[size, *shape]`, a part for each rank: the sum over the ranks of this rank's."""
        ...

    def send(self, x: Any, to: int) -> None:
        """Hand x to a rank, which has to receive it; may wait until it does."""
        ...

    def recv(self, out: Any, source: int) -> Any:
        """Fill `out`, a contiguous array, with what a rank sends; returns it."""
        ...

    def broadcast(self, x: Any, root: int) -> Any:
        """Make x, a contiguous array, what it is on the root; returns it."""
        ...

    def barrier(self) -> None:
        """Return once every rank has come here."""
        ...

    def abort(self, reason: str) -> None:
        """Break the group: calls that wait, here and at the peers, end with an error."""
        ...

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        """Some of the ranks, this one among them, in their order. Each of them has to call it."""
        ...


class Alone:
    """The group of one rank."""

    rank = 0
    size = 1

    def all_reduce(self, x: Any) -> Any:
        return x

    def all_gather(self, x: Any) -> Any:
        return x[None]

    def reduce_scatter(self, x: Any) -> Any:
        return x[0]

    def send(self, x: Any, to: int) -> None:
        raise ValueError(f"rank {to} of a group of one")

    def recv(self, out: Any, source: int) -> Any:
        raise ValueError(f"rank {source} of a group of one")

    def broadcast(self, x: Any, root: int) -> Any:
        return x

    def barrier(self) -> None:
        pass

    def abort(self, reason: str) -> None:
        pass

    def subgroup(self, ranks: Sequence[int]) -> Communicator:
        if list(ranks) != [0]:
            raise ValueError(f"ranks {list(ranks)} of a group of one")
        return self
