"""Which replica a request goes to: one that holds its prefix already, unless another is freer.

The ingress remembers what it sent where, rather than having routers tell what they hold: a router
would have to tell every ingress of every page it gains and loses, at the rate it serves, while the
ingress has the prompt in hand anyway and is right but for what was evicted since. What the memory
takes is bounded, whatever is sent: the least recently used is forgotten first.

A request goes where the fewest tokens have to be computed before its first one is there: those
that the replica has to compute already, and those of the prompt that its cache does not hold. So a
cached prefix is worth as much queue as it saves, and a prefix that everybody asks for comes to be
held by as many replicas as it takes. Where there are few replicas all are looked at. Where there
are many it is a few of those known to hold most of the prompt and two others, one in turn and one
at random (Mitzenmacher, "The power of two choices in randomized load balancing", 2001), so that
the choice costs the same among ten replicas and among a thousand; and ingresses whose knowledge is
a step old do not all send to the one that is least loaded.

Ingresses do not tell each other what they sent where. So that prompts which begin alike meet
whichever ingress they come by, each beginning has a *home*, found by consistent hashing (Karger et
al., "Consistent hashing and random trees", 1997), and a request goes there unless that is much
busier. Preble (Srivatsa et al., arXiv
2407.00023) and SGLang (Zheng et al., arXiv 2312.07104) weigh cached prefixes against load as well.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Generic, Literal, TypeVar

from tensorray.cluster.request import GenerationRequest

Routing = Literal["prefix", "balanced"]

Name = TypeVar("Name", bound=Hashable)

#: What a sequence that has not ended weighs beside its prompt, in prompt tokens to compute: its
#: own tokens to come, which nobody knows the number of.
SEQUENCE_TOKENS = 128

#: Tokens between two places where prompts are told apart, at least; an eighth of a longer prompt.
_STRIDE = 64

#: Up to so many replicas are all looked at.
_FEW = 8

#: Replicas remembered for one prefix; of more it is those that were sent it last.
_MOST_HOLDERS = 16

#: Of which so many are looked at, others each time.
_HOLDERS_TRIED = 4

#: What it is worth that prompts which begin alike meet, in prompt tokens to compute: twice the
#: prompt's, and no more than this. Of 16 simulated replicas' prompt tokens behind four ingresses
#: 39% were found in caches without, with 1200 throughout 51%.
_MEETING_TOKENS = 1200

#: Points that a replica has on the ring that says whose home is where.
_POINTS = 16

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

    def __init__(
        self,
        routing: Routing = "prefix",
        *,
        meet: bool = False,
        foresee: bool = False,
        seed: int | None = None,
    ) -> None:
        """`routing` "balanced" looks at the load alone. With `meet`, prompts that begin alike meet
        those that come by other ingresses. With `foresee` prompts are remembered for its sake,
        where there is no choice as well. The seed is for tests."""
        self._by_prefix = routing == "prefix"
        self._meet = meet
        self._fewest = 1 if foresee else 2  # replicas among which prompts are told apart
        self._random = random.Random(seed)
        self._names: list[Name] = []
        self._known: set[Name] = set()
        self._turn = 0
        # The ring: its points in order, and whose they are.
        self._points: list[int] = []
        self._owners: list[Name] = []
        # By key of a prefix: who was sent it, the last one last. The least recently used first.
        self._holders: OrderedDict[int, list[Name]] = OrderedDict()

    def __len__(self) -> int:
        """Prefixes remembered."""
        return len(self._holders)

    def add(self, replica: Name, called: str) -> None:
        """`called` is what all ingresses call it."""
        self._names.append(replica)
        self._known.add(replica)
        for number in range(_POINTS):
            point = _point(f"{called}/{number}".encode())
            place = bisect_right(self._points, point)
            self._points.insert(place, point)
            self._owners.insert(place, replica)

    def remove(self, replica: Name) -> None:
        """It is gone; what was sent there is forgotten as it is met."""
        self._names.remove(replica)
        self._known.remove(replica)
        self._turn %= max(1, len(self._names))
        left = [place for place, owner in enumerate(self._owners) if owner != replica]
        self._points = [self._points[place] for place in left]
        self._owners = [self._owners[place] for place in left]

    def choose(
        self, request: GenerationRequest, load: Callable[[Name], int | None]
    ) -> Choice[Name] | None:
        """The replica for a request, which is then taken to hold its prompt.

        `load` is what a replica has to do, as `weight` counts it; None: it can't be used now. None
        is returned if that is so of all.
        """
        keys = self._keys(request)
        turn, choice = self._best(request, keys, load)
        if choice is not None:
            self._turn = (turn + 1) % len(self._names)
            self._remember(keys, choice.replica)
        return choice

    def foresee(
        self, request: GenerationRequest, load: Callable[[Name], int | None]
    ) -> Choice[Name] | None:
        """What `choose` would say now, of a request that does not come yet."""
        return self._best(request, self._keys(request), load)[1]

    def _keys(self, request: GenerationRequest) -> list[tuple[int, int]]:
        told_apart = self._by_prefix and len(self._names) >= self._fewest
        return prefix_keys(request) if told_apart else []

    def _best(
        self,
        request: GenerationRequest,
        keys: list[tuple[int, int]],
        load: Callable[[Name], int | None],
    ) -> tuple[int, Choice[Name] | None]:
        """Whose turn it was, by place, and who is chosen."""
        cached = self._cached(keys) if request.reuse_prefix else {}
        home = self._home(request) if self._meet and keys else None
        meeting = min(_MEETING_TOKENS, 2 * len(request.prompt))
        turn, others = self._others(load)
        loads = dict(others)
        for name in cached if home is None else (*cached, home):
            if name not in loads and (found := load(name)) is not None:
                loads[name] = found
        if not loads:
            return turn, None

        def cost(name: Name) -> int:
            held = cached.get(name, 0)
            return loads[name] - (max(held, meeting) if name == home else held)

        best = min(loads, key=cost)
        return turn, Choice(best, cached.get(best, 0))

    def _others(self, load: Callable[[Name], int | None]) -> tuple[int, list[tuple[Name, int]]]:
        """Who is looked at whatever they hold, with their loads: the next in turn of those that
        can be used, whose place is told as well, and one at random, or all if they are few."""
        names, count, turn = self._names, len(self._names), self._turn
        others: list[tuple[Name, int]] = []
        for place in chain(range(self._turn, count), range(self._turn)):
            if (found := load(names[place])) is not None:
                others.append((names[place], found))
                if len(others) == 1:
                    turn = place
                if count > _FEW:
                    break
        if others and count > _FEW:
            start = int(self._random.random() * count)
            for place in chain(range(start, count), range(start)):
                if place != turn and (found := load(names[place])) is not None:
                    others.append((names[place], found))
                    break
        return turn, others

    def _home(self, request: GenerationRequest) -> Name:
        """Where prompts that begin like this one meet."""
        owner = f"{len(request.cache_salt)}/{request.cache_salt}{request.lora}/".encode()
        point = _point(owner + array("I", request.prompt[:_STRIDE]).tobytes())
        return self._owners[bisect_right(self._points, point) % len(self._owners)]

    def _cached(self, keys: list[tuple[int, int]]) -> dict[Name, int]:
        """By replica, how much of the prompt it is thought to hold: some that hold most."""
        found: dict[Name, int] = {}
        few = len(self._names) <= _FEW
        for length, key in reversed(keys):
            names = self._holders.get(key)
            if names is None:
                continue
            if not few and len(names) > _HOLDERS_TRIED:
                start = int(self._random.random() * len(names)) - _HOLDERS_TRIED
                names = [names[place] for place in range(start, start + _HOLDERS_TRIED)]
            for name in names:
                if name in self._known:
                    found.setdefault(name, length)
            if not few and len(found) >= _HOLDERS_TRIED:
                break
        return found

    def _remember(self, keys: list[tuple[int, int]], replica: Name) -> None:
        holders = self._holders
        for _, key in reversed(keys):  # so that prefixes outlive what goes on from them
            names = holders.get(key)
            if names is None:
                holders[key] = [replica]
                continue
            holders.move_to_end(key)
            if names[-1] == replica:
                continue
            if replica in names:
                names.remove(replica)
            elif len(names) == _MOST_HOLDERS:
                del names[0]
            names.append(replica)
        most = min(_MOST_PREFIXES, _PREFIXES_A_REPLICA * len(self._names))
        while len(holders) > most:
            holders.popitem(last=False)


def prefix_keys(request: GenerationRequest) -> list[tuple[int, int]]:
    """The prompt's leading parts, as (length in tokens, key): equal keys, equal parts.

    Prompts that may not share cached blocks have no key in common. A prompt of n tokens has
    O(log n) keys beyond the first few. Keys are this process's own: Python hashes text and bytes
    with a secret of the process, so nobody can make two prompts look the same.
    """
    prompt = request.prompt
    places = _places(len(prompt))
    if not places:
        return []
    try:
        tokens = array("I", prompt).tobytes()
    except (OverflowError, TypeError):  # no token ids; whoever gets the request says so
        return []
    keys: list[tuple[int, int]] = []
    key = hash((request.cache_salt, request.lora))
    begin = 0
    for place in places:
        end = place * _TOKEN_BYTES
        key = hash((key, hash(tokens[begin:end])))
        keys.append((place, key))
        begin = end
    return keys


def _point(data: bytes) -> int:
    """A place on the ring, the same in all processes."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


_TOKEN_BYTES = array("I").itemsize
_ALL_PLACES: list[int] = [_STRIDE]


def _places(length: int) -> list[int]:
    """Where prompts of `length` tokens are told apart."""
    places = _ALL_PLACES
    while places[-1] <= length:
        step = max(1, places[-1] // (8 * _STRIDE))
        places.append(places[-1] + step * _STRIDE)
    return places[: bisect_right(places, length)]
