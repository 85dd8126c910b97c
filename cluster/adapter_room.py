"""Which LoRA adapters run, and whether there is room for another one."""

from __future__ import annotations

from collections.abc import Iterable

from tensorray.cluster.sequence import Sequence


class AdapterRoom:
    """The adapters of sequences that run, while others are admitted."""

    __slots__ = ("_full", "_most", "_running", "_sequences")

    def __init__(self, most: int, sequences: Iterable[Sequence]) -> None:
        self._most = most
        self._sequences = sequences  # that run already; looked at if anyone wants an adapter
        self._running: set[int] | None = None
        self._full = False

    def take(self, s: Sequence) -> bool:
        """Whether the sequence can be admitted. While one waits for room, no other with an
        adapter passes it, so that its turn comes."""
        adapter = s.request.adapter
        if not adapter:
            return True
        if self._running is None:
            self._running = {each.request.adapter for each in self._sequences} - {0}
        self._full |= adapter not in self._running and len(self._running) >= self._most
        if self._full:
            return False
        self._running.add(adapter)
        return True
