"""Who hears what an engine does, as it does it."""

from __future__ import annotations

from typing import Protocol

from tensorray.cluster.request import FinishReason


class EngineObserver(Protocol):
    """What metrics want to hear. Times in seconds."""

    def step(self, sequences: int, tokens: int, seconds: float) -> None: ...

    def first_token(self, since_arrival: float, queued: float) -> None:
        """`queued` of the time since its arrival was before its first step."""

    def next_token(self, since_last: float) -> None: ...

    def finished(
        self, reason: FinishReason, prompt_tokens: int, generated: int, since_arrival: float
    ) -> None: ...

    def failed(self, reason: str) -> None:
        """Shards were lost."""

    def recovered(self, reason: str, seconds: float) -> None:
        """They are back, so long after they were lost; the reason is known better by now."""


class SilentObserver:
    """Hears everything, says nothing."""

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        pass

    def first_token(self, since_arrival: float, queued: float) -> None:
        pass

    def next_token(self, since_last: float) -> None:
        pass

    def finished(
        self, reason: FinishReason, prompt_tokens: int, generated: int, since_arrival: float
    ) -> None:
        pass

    def failed(self, reason: str) -> None:
        pass

    def recovered(self, reason: str, seconds: float) -> None:
        pass
