"""Who is admitted next: priority levels, and within one level users in turn by service received.

A user's account counts the tokens computed for them, generated ones double: the virtual token
counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). The user with the
smallest account goes next, so one user's thousand requests do not hold up another's one. Whoever
comes back from a pause starts no lower than the account admitted last: idleness saves up nothing.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict

from tensorray.cluster.sequence import Sequence

PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 2


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
        self._floor = 0  # the account of the user admitted last, never falling
        self._size = 0
        self._accounts_limit = 1024

    def __len__(self) -> int:
        return self._size

    def add(self, s: Sequence) -> None:
        """Queue a new sequence behind its user's others."""
        user = s.request.user
        queues = self._level(s).queues
        if user not in queues:
            queues[user] = OrderedDict()
            self._accounts[user] = max(self._accounts.get(user, 0), self._floor)
            if len(self._accounts) > self._accounts_limit:
                self._drop_settled_accounts()
        queues[user][s.seq] = s
        self._size += 1

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

    def charge_admission(self, s: Sequence, tokens: int) -> None:
        """The sequence was admitted, with that many prompt tokens to compute."""
        account = self._accounts.setdefault(s.request.user, self._floor)
        self._floor = max(self._floor, account)
        self._accounts[s.request.user] = account + PROMPT_TOKEN_COST * tokens

    def charge_output(self, s: Sequence) -> None:
        """Charge what the sequence generated since it was charged last."""
        tokens = len(s.tokens) - s.charged
        if tokens:
            s.charged += tokens
            user = s.request.user
            account = self._accounts.get(user, self._floor)
            self._accounts[user] = account + OUTPUT_TOKEN_COST * tokens

    def _level(self, s: Sequence) -> _Level:
        return self._levels.setdefault(s.level, _Level())

    def _drop_settled_accounts(self) -> None:
        """Forget users whose account says no more than the floor would on their return."""
        waiting = {user for level in self._levels.values() for user in level.queues}
        self._accounts = {
            user: account
            for user, account in self._accounts.items()
            if account > self._floor or user in waiting
        }
        self._accounts_limit = max(1024, 2 * len(self._accounts))
