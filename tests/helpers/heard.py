"""What the reader of one stream got, and when."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Heard:
    """Begins to hear when it is made."""

    tokens: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    longest_pause: float = 0.0
    _last: float = field(default_factory=time.monotonic)

    def pause_ends(self) -> None:
        """Something came. What came before the first token was no pause."""
        now = time.monotonic()
        self.longest_pause = max(self.longest_pause, now - self._last) if self.tokens else 0.0
        self._last = now

    def hear(self, tokens: Iterable[str], tops: Iterable[dict[str, float]]) -> None:
        """Tokens, and of each the likeliest ones' log-probabilities."""
        self.tokens += tokens
        for top in tops:
            best = sorted(top.values(), reverse=True)
            self.margins.append(best[0] - best[1] if len(best) > 1 else 0.0)
