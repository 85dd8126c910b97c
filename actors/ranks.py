"""A shard among the shards of its replica: what it passes on, and whom it waits for.

Tensor-parallel ranks of a stage run the same layers on parts of the weights. A stage hands the
residual stream to the next one, rank by rank. One shard *samples*: the first of the last stage. It
tells the tokens to the ranks of the first stage, which need them as the sequences' next input.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.communicator import Communicator
from tensorray.builder.model import Layout


class Ranks:
    """One shard's communicators. `tp` is None for a shard that has its stage to itself, and for
    one that needs no sums made here."""

    def __init__(self, layout: Layout, world: Communicator, *, tp: bool = True) -> None:
        self._layout = layout
        self._world = world
        stage = layout.stage(layout.pp_rank)
        self.tp = world.subgroup(stage) if tp and layout.tp_size > 1 else None
        self._listeners = [rank for rank in layout.stage(0) if rank != layout.sampler]

    def receive(self, stream: Any) -> Any:
        """Fill the residual stream `[T, hidden]` with what the stage before made of it."""
        return self._world.recv(stream, self._layout.rank - self._layout.tp_size)

    def pass_on(self, stream: Any) -> None:
        """Hand the residual stream to the stage after."""
        self._world.send(stream, self._layout.rank + self._layout.tp_size)

    def tell(self, tokens: NDArray[np.int32]) -> None:
        """From the shard that samples: a step's tokens, to those who need them."""
        for rank in self._listeners:
            self._world.send(tokens, rank)

    def hear(self, count: int) -> NDArray[np.int32]:
        """On a rank of the first stage: the tokens of the oldest step not heard of yet."""
        tokens: NDArray[np.int32] = self._world.recv(
            np.empty(count, np.int32), self._layout.sampler
        )
        return tokens

    def abort(self, reason: str) -> None:
        """Wake whoever waits for this shard: it won't go on."""
        self._world.abort(reason)
