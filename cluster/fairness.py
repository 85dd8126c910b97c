"""Who is admitted next: priority levels, and within one level users in turn by service received.

A user's account counts the tokens computed for them, generated ones double: the virtual token
counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). The user with the
smallest account goes next, so one user's thousand requests do not hold up another's one. Who
comes back from a pause starts no lower than the lowest of those waiting: idleness saves up nothing.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict

from tensorray.cluster.sequence import Sequence

PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2
#: Accounts of users with nobody waiting that are kept at least.
_KEPT_ACCOUNTS = 512


class _Level:
    """The waiting sequences of one priority."""

    __slots__ = ("preempted", "queues")

    def __init__(self) -> None:
        self.preempted: list[Sequence] = []  # by rank; they go before anyone new
        self.queues: dict[str, OrderedDict[int, Sequence]] = {}  # per user, in order of arrival


class AdmissionQueue:
    """The waiting sequences, in the order in which they should be admitted."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}
        self._accounts: dict[str, int] = {}
        self._last_admitted = ""
        self._size = 0
        self.tokens = 0  # that are to be computed of those who wait, as far as is known
        self.known_tokens = 0  # all that those who wait have: what they take of memory

    def __len__(self) -> int:
        return self._size

    def add(self, s: Sequence) -> None:
        """Queue a new sequence behind its user's others."""
        user = s.request.user
        queues = self._level(s).queues
        if user not in queues:
            self._accounts[user] = max(self._accounts.get(user, 0), self._floor(queues))
            queues[user] = OrderedDict()
            if len(self._accounts) > 2 * (self._size + _KEPT_ACCOUNTS):
                self._drop_accounts()
        queues[user][s.seq] = s
        self._size += 1
        self.tokens += _to_compute(s)
        self.known_tokens += len(s.tokens)

    def put_back(self, s: Sequence) -> None:
        """Queue a sequence that was at the head before, or running: ahead of the new ones."""
        level = self._level(s)
        if s.order >= 0:
            insort(level.preempted, s, key=lambda other: other.rank)
        else:
            queue = level.queues.setdefault(s.request.user, OrderedDict())
            queue[s.seq] = s
            queue.move_to_end(s.seq, last=False)
        self._size += 1
        self.tokens += _to_compute(s)
        self.known_tokens += len(s.tokens)

    def head(self) -> Sequence | None:
        """The sequence to admit next; it stays in the queue."""
        if not self._levels:
            return None
        level = self._levels[min(self._levels)]
        if level.preempted:
            return level.preempted[0]
        user = min(level.queues, key=self._accounts.__getitem__)
        return next(iter(level.queues[user].values()))

    def remove(self, s: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        level = self._levels[s.level]
        if s.order >= 0:
            level.preempted.remove(s)
        else:
            queue = level.queues[s.request.user]
            del queue[s.seq]
            if not queue:
                del level.queues[s.request.user]
        if not level.preempted and not level.queues:
            del self._levels[s.level]
        self._size -= 1
        self.tokens -= _to_compute(s)
        self.known_tokens -= len(s.tokens)

    def charge_admission(self, s: Sequence, tokens: int) -> None:
        """The sequence was admitted, with that many prompt tokens to compute."""
        user = self._last_admitted = s.request.user
        self._accounts[user] = self._accounts.get(user, 0) + PROMPT_TOKEN_COST * tokens

    def charge_output(self, s: Sequence) -> None:
        """Charge what the sequence generated since it was charged last."""
        tokens = len(s.tokens) - s.charged
        if tokens:
            s.charged += tokens
            user = s.request.user
            self._accounts[user] = self._accounts.get(user, 0) + OUTPUT_TOKEN_COST * tokens

    def _level(self, s: Sequence) -> _Level:
        return self._levels.setdefault(s.level, _Level())

    def _floor(self, queues: dict[str, OrderedDict[int, Sequence]]) -> int:
        """Where a user who did not wait until now starts at least."""
        if not queues:
            return self._accounts.get(self._last_admitted, 0)
        return min(self._accounts[user] for user in queues)

    def _drop_accounts(self) -> None:
        """Forget the lowest accounts of users with nobody waiting: they say the least."""
        needed = {user for level in self._levels.values() for user in level.queues}
        needed.add(self._last_admitted)
        others = sorted(self._accounts.keys() - needed, key=self._accounts.__getitem__)
        for user in others[:-_KEPT_ACCOUNTS]:
            del self._accounts[user]


def _to_compute(s: Sequence) -> int:
    """Its known tokens, but for those that it was sent here for, or that come from elsewhere."""
    known = s.request.expected_hit if s.source is None else s.prompt_len
    return max(0, len(s.tokens) - known)
