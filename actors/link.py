"""The link over which step plans reach a shard and results come back.

One small interface, so that the engine does not care where a shard runs: in its own process
(`LocalLink`), behind one TCP connection (`tcp_link.py`), or nowhere at all (`NullLink`, which
answers after a fixed time and measures everything but the model).
"""

from __future__ import annotations

from typing import Protocol

from tensorray.actors.protocol import ShardInfo, StepPlan, StepResult


class ShardError(RuntimeError):
    """The shard is gone or its state can't be trusted; carries the shard's own reason."""


class ShardLink(Protocol):
    """Plans go down in order, results come up in the same order; more than one may be in flight."""

    info: ShardInfo

    def send(self, plan: StepPlan) -> None:
        """Hand over a plan; never blocks on the step itself."""

    async def receive(self) -> StepResult:
        """The next result. Raises `ShardError` when the shard died or the step failed."""
        ...

    async def close(self) -> None: ...
