"""Which replica a request goes to: one that holds its prefix already, unless another is freer.

The ingress remembers what it sent where, rather than having routers tell what they hold: a router
would have to tell every ingress of every page it gains and loses, at the rate it serves, while the
ingress has the prompt in hand anyway and is right but for what was evicted since. What the memory
takes is bounded, whatever is sent: the least recently used is forgotten first.

A request goes where the fewest tokens have to be computed before its first one is there: those
that the replica has to compute already, and those of the prompt that its cache does not hold. So a
cached prefix is worth as much queue as it saves, and a prefix that everybody asks for comes to be
held by as many replicas as it takes. Looked at are the replicas known to hold most of the prompt
and two others, one in turn and one at random (Mitzenmacher, "The power of two choices in randomized
load balancing", 2001), so that the choice costs the same among two replicas and among a thousand.
Preble (Srivatsa et al., arXiv 2407.00023) and SGLang (Zheng et al., arXiv 2312.07104) weigh cached
prefixes against load as well.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Generic, Literal, TypeVar

from tensorray.cluster.request import GenerationRequest

Routing = Literal["prefix", "balanced"]

Name = TypeVar("Name", bound=Hashable)

#: What a sequence that has not ended weighs beside its prompt, in prompt tokens to compute: its
#: own tokens to come, which nobody knows the number of.
SEQUENCE_TOKENS = 128

#: Tokens between two places where prompts are told apart, at least; an eighth of a longer prompt.
_STRIDE = 64

#: Replicas remembered for one prefix; of more it is those that were sent it last.
_MOST_HOLDERS = 16

#: Prefixes remembered, for each replica and in all. One takes about 300 bytes.
_PREFIXES_A_REPLICA = 4096
_MOST_PREFIXES = 1 << 19


def weight(tokens: int, sequences: int) -> int:
    """What there is to do: prompt tokens to compute, and sequences that have not ended."""
    return tokens + SEQUENCE_TOKENS * sequences


@dataclass(frozen=True)
class Choice(Generic[Name]):
    """Where to send a request, and how many of its prompt tokens are thought to be cached there."""

    replica: Name
    cached: int


class ReplicaChoice(Generic[Name]):
    """Chooses among replicas that come and go, known by name. Belongs to one event loop."""

    def __init__(self, routing: Routing = "prefix", *, seed: int | None = None) -> None:
        """`routing` "balanced" looks at the load alone. The seed is for tests."""
        self._by_prefix = routing == "prefix"
        self._random = random.Random(seed)
        self._names: list[Name] = []
        self._known: set[Name] = set()
        self._turn = 0
        # By key of a prefix: who was sent it, the last one last. The least recently used first.
        self._holders: OrderedDict[bytes, list[Name]] = OrderedDict()

    def __len__(self) -> int:
        """Prefixes remembered."""
        return len(self._holders)

    def add(self, replica: Name) -> None:
        self._names.append(replica)
        self._known.add(replica)

    def remove(self, replica: Name) -> None:
        """It is gone; what was sent there is forgotten as it is met."""
        self._names.remove(replica)
        self._known.remove(replica)

    def choose(
        self, request: GenerationRequest, load: Callable[[Name], int | None]
    ) -> Choice[Name] | None:
        """The replica for a request, which is then taken to hold its prompt.

        `load` is what a replica has to do, as `weight` counts it; None: it can't be used now. None
        is returned if that is so of all.
        """
        keys = prefix_keys(request) if self._by_prefix and len(self._names) > 1 else []
        cached = self._cached(keys) if request.reuse_prefix else {}
        for other in self._others(load):
            cached.setdefault(other, 0)
        best: Name | None = None
        least = 0
        for name, hit in cached.items():
            found = load(name)
            if found is None:
                continue
            cost = found - hit
            if best is None or cost < least:
                best, least = name, cost
        if best is None:
            return None
        self._remember(keys, best)
        return Choice(best, cached[best])

    def _others(self, load: Callable[[Name], int | None]) -> list[Name]:
        """The next in turn, and one at random, of those that can be used."""
        names, count = self._names, len(self._names)
        others: list[Name] = []
        for step in range(count):
            name = names[(self._turn + step) % count]
            if load(name) is not None:
                self._turn = (self._turn + step + 1) % count
                others.append(name)
                break
        if others and count > 1:
            start = self._random.randrange(count)
            for step in range(count):
                name = names[(start + step) % count]
                if name != others[0] and load(name) is not None:
                    others.append(name)
                    break
        return others

    def _cached(self, keys: list[tuple[int, bytes]]) -> dict[Name, int]:
        """By replica, how much of the prompt it is thought to hold; those that hold most."""
        found: dict[Name, int] = {}
        for length, key in reversed(keys):
            for name in reversed(self._holders.get(key, ())):
                if name in self._known:
                    found.setdefault(name, length)
            if len(found) >= _MOST_HOLDERS:
                break
        return found

    def _remember(self, keys: list[tuple[int, bytes]], replica: Name) -> None:
        holders = self._holders
        for _, key in reversed(keys):  # so that prefixes outlive what goes on from them
            names = holders.setdefault(key, [])
            if replica in names:
                names.remove(replica)
            elif len(names) == _MOST_HOLDERS:
                del names[0]
            names.append(replica)
            holders.move_to_end(key)
        most = min(_MOST_PREFIXES, _PREFIXES_A_REPLICA * len(self._names))
        while len(holders) > most:
            holders.popitem(last=False)


def prefix_keys(request: GenerationRequest) -> list[tuple[int, bytes]]:
    """The prompt's leading parts, as (length in tokens, key): equal keys, equal parts.

    Prompts that may not share cached blocks have no key in common. A prompt of n tokens has
    O(log n) keys beyond the first few.
    """
    prompt = request.prompt
    digest = blake2b(request.cache_salt.encode(), digest_size=16)
    digest.update(b"\0" + request.lora.encode() + b"\0")
    keys: list[tuple[int, bytes]] = []
    begin = 0
    places = _places(len(prompt))
    if not places:
        return []
    try:
        tokens = memoryview(array("Q", prompt))
    except OverflowError:  # no token ids; whoever gets the request says so
        return []
    for end in places:
        digest.update(tokens[begin:end])
        keys.append((end, digest.digest()))
        begin = end
    return keys


_ALL_PLACES: list[int] = [_STRIDE]


def _places(length: int) -> list[int]:
    """Where prompts of `length` tokens are told apart."""
    places = _ALL_PLACES
    while places[-1] <= length:
        step = max(1, places[-1] // (8 * _STRIDE))
        places.append(places[-1] + step * _STRIDE)
    return places[: bisect_right(places, length)]
