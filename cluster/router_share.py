"""Which routers an ingress sends to, where there are many of both.

A router tells every ingress that has streams there of each step's tokens, in a frame each. Where
all ingresses send to all routers, each ingress reads every router's frames, however many ingresses
there are: with a thousand routers some 70,000 a second. So each sends to a share of them. Which one
follows from names alone, by rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings
to increase hit rates", 1998): the ingresses of a router are those that rank highest with it. So
every router has equally many, all processes agree without a word, and a router that comes or goes
changes nothing for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

#: Routers in a share at least, on average: fewer leave little to choose among.
_LEAST_ROUTERS = 64

#: Ingresses that send to one router at least: it has work while one of them is replaced.
_LEAST_INGRESSES = 2


@dataclass(frozen=True)
class Place:
    """An ingress among those of its application, by number from 0 on."""

    number: int = 0
    ingresses: int = 1

    def senders(self, routers: int) -> int:
        """How many ingresses send to each of so many routers."""
        enough = -(-_LEAST_ROUTERS * self.ingresses // max(1, routers))
        return min(self.ingresses, max(_LEAST_INGRESSES, enough))

    def ahead(self, router: str) -> int:
        """How many ingresses rank higher with a router: with more senders than that it is one."""
        own = _rank(router, self.number)
        return sum(_rank(router, other) > own for other in range(self.ingresses))

    def sends_to(self, router: str, senders: int) -> bool:
        """Whether this is one of the ingresses that send to a router."""
        return self.ahead(router) < senders


def _rank(router: str, ingress: int) -> tuple[bytes, int]:
    return blake2b(f"{ingress}/{router}".encode(), digest_size=8).digest(), ingress
