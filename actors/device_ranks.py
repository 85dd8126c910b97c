"""A GPU shard among the shards of its replica: what ranks.py is to one on a CPU.

What the ranks of a stage add up, and the residual stream that stages hand on, go from device to
device, queued on the stream like every other work. Tokens go two ways. Where one stage is the whole
model, a step may start before the last one's tokens are known to any host, so they are passed on
between devices as well. With more stages a sequence's token takes longer than the step of another
one's, so it comes over the host, from shard to shard: its next plan is there already.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.communicator import Communicator, CommunicatorError
from tensorray.actors.device import Device
from tensorray.actors.ranks import Ranks
from tensorray.builder.model import Layout

# How long the device may take to let go of a broken group.
_ABORT_SECONDS = 30.0


class DeviceRanks:
    """One shard's communicators: `host` as it met the others, and the same ranks by device.

    All calls but `abort` belong inside `device.current()`. `tp` is None for a shard that has its
    stage to itself. Raises CommunicatorError, from any call, once the group is broken.
    """

    def __init__(self, device: Device, layout: Layout, host: Communicator) -> None:
        self._device = device
        self._layout = layout
        self._host = Ranks(layout, host, tp=False)
        self._world = device.communicator(host)
        self.tp: Communicator | None = None
        if layout.tp_size == layout.size:
            self.tp = self._world
        elif layout.tp_size > 1:
            self.tp = self._world.subgroup(layout.stage(layout.pp_rank))
        self._reason: str | None = None
        self._lock = threading.Lock()
        self._aborting: threading.Thread | None = None

    def receive(self, stream: Any) -> None:
        """Fill the residual stream `[T, hidden]` with what the stage before made of it."""
        self._world.recv(stream, self._layout.rank - self._layout.tp_size)

    def pass_on(self, stream: Any) -> None:
        """Hand the residual stream to the stage after."""
        self._world.send(stream, self._layout.rank + self._layout.tp_size)

    def share(self, last_tokens: Any) -> None:
        """In a single stage: have every rank know the newest tokens of the one that samples."""
        if self.tp is not None:
            self.tp.broadcast(last_tokens, 0)

    def tell(self, tokens: NDArray[np.int32]) -> None:
        """From the shard that samples, over the host: a step's tokens, to the first stage."""
        self._host.tell(tokens)

    def hear(self, count: int) -> NDArray[np.int32]:
        """On a rank of the first stage: the tokens of the oldest step not heard of yet."""
        return self._host.hear(count)

    def check(self) -> None:
        """Raise CommunicatorError if the group is broken: what the device made is worth nothing."""
        if self._reason is not None:
            raise CommunicatorError(f"aborted: {self._reason}")

    def abort(self, reason: str) -> None:
        """Wake whoever waits for this shard, here and elsewhere; from any thread.

        A device may only let go once recorded work that uses the group is gone, which another
        thread sees to: so it does that on a thread of its own, and `close` waits for it.
        """
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            self._host.abort(reason)
            self._aborting = threading.Thread(target=self._let_go, args=(reason,), daemon=True)
            self._aborting.start()

    def close(self) -> None:
        """End the group. Recorded work that uses it must be gone.

        Raises CommunicatorError if the device does not let go of it.
        """
        self.abort("its replica starts anew")
        assert self._aborting is not None
        self._aborting.join(_ABORT_SECONDS)
        if self._aborting.is_alive():
            raise CommunicatorError(
                f"the device has not let go of its group for {_ABORT_SECONDS:g} s"
            )

    def _let_go(self, reason: str) -> None:
        with self._device.current():
            for group in (self.tp, self._world):
                if group is not None:
                    group.abort(reason)


class Rehearsal:
    """Stands in for a stage's ranks before they have met: results of the right shape and size,
    which is what a device's memory is measured by."""

    def __init__(self, xp: Any, size: int) -> None:
        self._xp = xp
        self._size = size

    def all_reduce(self, x: Any) -> Any:
        return x.copy()

    def all_gather(self, x: Any) -> Any:
        return self._xp.stack([x] * self._size)
