"""Several engines behind what looks like one: replicas that come and go.

Which of them a request goes to is `replica_choice.py`'s to say. One that retires gets new requests
only while there is no other. A request whose replica is lost goes on at another one, or at its
successor, from the tokens it has had, so that whoever reads it sees a pause. A lost one is tried
again and again beside them, by no request that could go elsewhere, and used once it is back.

Of many replicas an ingress sends to a share, as long as that has one to send to: router_share.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, cast

import msgspec

from tensorray.cluster.engine import EngineFailed
from tensorray.cluster.frontend import EngineClient
from tensorray.cluster.replica_choice import Choice, ReplicaChoice, Routing
from tensorray.cluster.request import Delta, GenerationRequest, QueueFull, Resumed
from tensorray.cluster.router_share import Place

# How long a replica that could not be reached is left alone at first, and at last.
_RETRY_SECONDS = 0.25
_MOST_RETRY_SECONDS = 5.0


class ReplicaLost(EngineFailed):
    """There is no way to a replica; what ran there may go on elsewhere."""


class LoadedClient(EngineClient, Protocol):
    """A replica's client, who knows what the replica has to do."""

    @property
    def load(self) -> int | None:
        """As `replica_choice.weight` counts it; None while that is not known."""
        ...

    @property
    def room(self) -> int | None:
        """Sequences that it would queue beside those it has; None while that is not known."""
        ...

    async def connect(self) -> None:
        """Return once the replica can be reached. Raises EngineFailed if it can't be."""
        ...


Client = TypeVar("Client", bound=LoadedClient)


@dataclass(eq=False)
class Member(Generic[Client]):
    """A replica, and what it has to do."""

    name: str
    client: Client
    requests: int = 0  # that came this way and have not ended
    retiring: bool = False
    lost: ReplicaLost | None = None  # the last attempt to reach it failed so
    retry_at: float = 0.0  # by time.monotonic()
    ahead: int = 0  # ingresses that rank higher with it
    near: bool = True  # in the share of those sent to


class UnderWay:
    """A request, what has come of it, and where the rest is to come from."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._tokens: list[list[int]] = [[] for _ in range(request.n)]
        self._prompt_rows = [0] * request.n
        self._adapter = request.adapter  # the version that what was told is of
        self._attempts = 0
        self._ended: set[int] = set()  # sequences
        self._cancelled: set[int] = set()
        # A replica has had it, so the next one may not turn it away.
        self._begun = request.resumed is not None
        if request.resumed is not None:
            self._ended = set(range(request.n)) - {each.index for each in request.resumed}
            for each in request.resumed:
                self._tokens[each.index] += each.tokens
                self._prompt_rows[each.index] = each.prompt_rows
        self.client: EngineClient | None = None  # who runs it now
        self.request_id = request.request_id  # by which it runs there

    @property
    def finished(self) -> bool:
        return len(self._ended) == self._request.n

    def request(self, client: EngineClient, expected_hit: int = 0) -> GenerationRequest:
        """What to ask of a replica: all of it at first, what is left later."""
        self.client = client
        self._attempts += 1
        if self._attempts == 1:
            if not expected_hit:
                return self._request
            return msgspec.structs.replace(self._request, expected_hit=expected_hit)
        # A replica that lives may not have noticed the end of the connection before.
        self.request_id = f"{self._request.request_id}~{self._attempts}"
        resumed = None
        if self._begun:
            resumed = [
                Resumed(index, [*self._tokens[index]], self._prompt_rows[index])
                for index in range(self._request.n)
                if index not in self._ended
            ]
        return msgspec.structs.replace(
            self._request, request_id=self.request_id, resumed=resumed, adapter=self._adapter
        )

    def take(self, deltas: list[Delta]) -> None:
        self._begun = True
        for delta in deltas:
            self._tokens[delta.index] += delta.tokens
            self._prompt_rows[delta.index] += len(delta.prompt_logprobs)
            self._adapter = self._adapter or delta.adapter
            if delta.finish_reason is not None:
                self._ended.add(delta.index)

    def lose(self) -> None:
        """Its replica is gone: nobody will say any more how what was cancelled has ended."""
        self._begun = True
        self.refused()

    def refused(self) -> None:
        """Its replica does not take it."""
        self.client = None
        self._ended |= self._cancelled

    async def cancel(self, index: int | None) -> None:
        self._cancelled |= set(range(self._request.n)) if index is None else {index}
        if self.client is not None:
            await self.client.cancel(self.request_id, index)


class Replicas(Generic[Client]):
    """An EngineClient over several. Belongs to one event loop.

    A request that finds no replica to go to waits for one for `patience` seconds.
    """

    def __init__(
        self,
        clients: Iterable[Client] = (),
        routing: Routing = "prefix",
        *,
        patience: float = 0.0,
        place: Place | None = None,
        foresee: bool = False,
    ) -> None:
        """`place` is this ingress's; None: it is the only one. `foresee`: `expected_hit` will be
        asked for."""
        self._patience = patience
        self._members: dict[str, Member[Client]] = {}
        self._place = place or Place()
        self._senders = self._place.ingresses  # to each replica
        meet = self._place.ingresses > 1
        self._choice, self._far = (
            ReplicaChoice[Member[Client]](routing, meet=meet, foresee=foresee) for _ in range(2)
        )
        self._searches: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._running: dict[str, UnderWay] = {}  # by request id
        self._closed = False
        for number, client in enumerate(clients):
            self.add(str(number), client)

    def add(self, name: str, client: Client) -> None:
        """There is a replica more."""
        member = self._members[name] = Member(name, client, ahead=self._place.ahead(name))
        member.near = member.ahead < self._senders
        self._choice_of(member).add(member, name)
        self._share_out()
        for each in list(self._members.values()):
            self._forget_if_done(each)
        self._changed.set()

    def retire(self, name: str) -> None:
        """A replica is about to go: it ends what it has, and is forgotten after that."""
        if (member := self._members.get(name)) is not None:
            member.retiring = True
            self._forget_if_done(member)

    def members(self) -> list[Member[Client]]:
        """All that are not retiring."""
        return [each for each in self._members.values() if not each.retiring]

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """See EngineClient. Raises RequestRefused, QueueFull or EngineFailed."""
        under_way = self._running[request.request_id] = UnderWay(request)
        refusals: dict[Member[Client], Exception] = {}
        deadline: float | None = None
        try:
            while not under_way.finished:
                choice = self._choose(request, refusals)
                if choice is None:
                    if refusals:
                        raise next(iter(refusals.values()))
                    deadline = await self._wait(deadline)
                    continue
                member = choice.replica
                member.requests += 1
                try:
                    asked = under_way.request(member.client, choice.cached)
                    arriving = member.client.generate(asked)
                    async with aclosing(
                        cast("AsyncGenerator[list[Delta], None]", arriving)
                    ) as items:
                        async for deltas in items:
                            member.lost = deadline = None
                            under_way.take(deltas)
                            yield deltas
                    return
                except ReplicaLost as error:
                    self._lose(member, error)
                    under_way.lose()
                except (QueueFull, EngineFailed) as error:
                    refusals[member] = error
                    under_way.refused()
                finally:
                    member.requests -= 1
                    self._forget_if_done(member)
        finally:
            del self._running[request.request_id]

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """See EngineClient."""
        if request_id in self._running:
            await self._running[request_id].cancel(index)

    def has_room(self, sequences: int) -> bool:
        """Whether so many would be queued, as far as is known."""
        for member in self._members.values():
            if member.lost is None and not member.retiring:
                room = member.client.room
                if room is None or room >= sequences:
                    return True
                sequences -= max(0, room)
        return False

    def expected_hit(self, request: GenerationRequest) -> int:
        """Prompt tokens that the replica is thought to have which the request would go to now."""
        choice = self._choose(request, (), foresee=True)
        return 0 if choice is None else choice.cached

    async def close(self) -> None:
        """Nobody is waited for any more."""
        self._closed = True
        self._changed.set()
        for search in self._searches:
            search.cancel()

    def forgotten(self, client: Client) -> None:
        """Called with the client of a replica that has gone."""

    def _choose(
        self,
        request: GenerationRequest,
        without: Collection[Member[Client]],
        *,
        foresee: bool = False,
    ) -> Choice[Member[Client]] | None:
        now = time.monotonic()

        def load(member: Member[Client]) -> int | None:
            if member.retiring or member in without or member.lost is not None:
                return None
            return member.client.load or 0

        def last_resort(member: Member[Client]) -> int | None:
            if member in without or (member.lost is not None and member.retry_at > now):
                return None
            return member.client.load or 0

        for usable in (load, last_resort):
            for choice in (self._choice, self._far):
                choose = choice.foresee if foresee else choice.choose
                if found := choose(request, usable):
                    return found
        return None

    def _choice_of(self, member: Member[Client]) -> ReplicaChoice[Member[Client]]:
        return self._choice if member.near else self._far

    def _share_out(self) -> None:
        """How many ingresses send to a replica follows from how many there are."""
        senders = self._place.senders(len(self._members))
        if senders == self._senders:
            return
        self._senders = senders
        for member in self._members.values():
            near = member.ahead < senders
            if near != member.near:
                self._choice_of(member).remove(member)
                member.near = near
                self._choice_of(member).add(member, member.name)

    def _lose(self, member: Member[Client], error: ReplicaLost) -> None:
        member.retry_at = time.monotonic() + _RETRY_SECONDS
        if member.lost is None:
            search = asyncio.create_task(self._search(member))
            self._searches.add(search)
            search.add_done_callback(self._searches.discard)
        member.lost = error

    async def _search(self, member: Member[Client]) -> None:
        """Until a lost replica is back, or gone for good."""
        pause = _RETRY_SECONDS
        while True:
            await asyncio.sleep(pause)
            if member.lost is None or self._members.get(member.name) is not member:
                return
            try:
                await member.client.connect()
            except EngineFailed:
                pause = min(2 * pause, _MOST_RETRY_SECONDS)
            else:
                member.lost = None
                self._changed.set()
                return

    async def _wait(self, deadline: float | None) -> float:
        """For another replica, or the time to try a lost one again; until when to wait in all."""
        now = time.monotonic()
        deadline = now + self._patience if deadline is None else deadline
        if now >= deadline or self._closed:
            reasons = [member.lost for member in self._members.values() if member.lost]
            raise reasons[-1] if reasons else EngineFailed("there is no router yet, or no more")
        self._changed.clear()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), min(_RETRY_SECONDS, deadline - now))
        return deadline

    def _forget_if_done(self, member: Member[Client]) -> None:
        """One that retires stays while it has work, or while there is nobody else to take any."""
        if not member.retiring or member.requests or self._members.get(member.name) is not member:
            return
        if member.lost or len(self.members()):
            del self._members[member.name]
            self._choice_of(member).remove(member)
            self._share_out()
            self.forgotten(member.client)
