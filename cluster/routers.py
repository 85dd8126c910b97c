"""The model's routers as an ingress sees them: those that Serve runs now, as one Backend.

Serve tells every process that has a handle to a deployment of each change in its replicas, at once
and without being asked. `ToReplica` is where that arrives: a request router, which is Serve's own
place to extend, that besides sends a call to the replica that the call names. So an ingress knows
of a router as soon as it is up, stops sending to one as soon as it retires, and finds a lost one's
successor; requests themselves go over connections of their own (engine_link.py).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import Callable
from typing import Any, cast

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from tensorray.actors.wire import Endpoint
from tensorray.cluster.backend import EngineStatus
from tensorray.cluster.engine import EngineFailed
from tensorray.cluster.engine_link import EngineLink
from tensorray.cluster.metrics import join_scrapes
from tensorray.cluster.prefill_first import PrefillFirst
from tensorray.cluster.replica_choice import Routing
from tensorray.cluster.replicas import ReplicaLost, Replicas
from tensorray.cluster.roll_call import RollCall
from tensorray.cluster.router_share import Place

logger = logging.getLogger("ray.serve")

# How long a router may take to say where it listens, or how it is.
_ROUTER_SECONDS = 5.0

# How long Serve may take to say which routers there are.
_START_SECONDS = 3600.0

# Of so many routers one can nearly always serve; and so many scrapes are joined at once.
_FEW = 8

REQUEST_ROUTER = "tensorray.cluster.routers:ToReplica"


class RouterAddress(msgspec.Struct, frozen=True):
    """Where a router listens, and what it serves."""

    endpoint: Endpoint
    model: str  # EngineConfig.model_digest
    max_model_len: int


class Watch:
    """Which replicas Serve runs of a deployment that this process watches.

    Serve tells on a thread of its own; `listener` is called on the event loop that set it.
    """

    def __init__(self) -> None:
        self._names: list[str] | None = None
        self._listener: Callable[[list[str]], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(self, listener: Callable[[list[str]], None]) -> None:
        """From now on; what was told before is told at once."""
        self._loop, self._listener = asyncio.get_running_loop(), listener
        if self._names is not None:
            listener(self._names)

    def tell(self, names: list[str]) -> None:
        self._names = names
        if self._loop is not None and self._listener is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._listener, names)


#: This process's, by deployment.
watches: dict[str, Watch] = {}


class ToReplica(RequestRouter):
    """Sends a call to the replica that its keyword argument `replica` names, or to any."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        # Serve makes a copy of this class and its globals in each process: this is the module's.
        from tensorray.cluster.routers import Watch, watches

        super().update_replicas(replicas)
        watch = watches.setdefault(self._deployment_id.name, Watch())
        watch.tell([replica.replica_id.unique_id for replica in replicas])

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        name = None if pending_request is None else pending_request.kwargs.get("replica")
        named = [each for each in candidate_replicas if each.replica_id.unique_id == name]
        return [named or candidate_replicas]  # whom it was not meant for says so


class RouterClient(EngineLink):
    """One router. Serve finds it, the link carries requests."""

    def __init__(self, name: str, routers: DeploymentHandle[Any], model: str) -> None:
        super().__init__(self._endpoint)
        self._name = name
        self._routers = routers
        self._model = model
        self.address: RouterAddress | None = None

    async def failure(self) -> str | None:
        try:
            return cast("str | None", await self._ask("failure"))
        except EngineFailed as error:
            return str(error)

    async def metrics(self) -> bytes:
        return cast(bytes, await self._ask("metrics"))

    async def status(self) -> EngineStatus:
        return cast(EngineStatus, await self._ask("status"))

    async def sleep(self) -> str | None:
        return cast("str | None", await self._ask("sleep"))

    async def wake_up(self) -> None:
        await self._ask("wake_up")

    async def asleep(self) -> bool:
        return cast(bool, await self._ask("asleep"))

    async def find(self) -> RouterAddress:
        """Where it listens. Raises ReplicaLost."""
        if self.address is None:
            self.address = cast(RouterAddress, await self._ask("address"))
        return self.address

    async def _endpoint(self) -> Endpoint:
        address = await self.find()
        if address.model != self._model:
            raise ReplicaLost("the model is being replaced by another")
        return address.endpoint

    async def _ask(self, what: str) -> object:
        # Serve takes calls that come of one HTTP request for one another, so this comes of none.
        call = getattr(self._routers, what).remote
        asked = contextvars.Context().run(call, replica=self._name)
        try:
            return await asyncio.wait_for(asked, _ROUTER_SECONDS)
        except (asyncio.TimeoutError, RayError, RayServeException) as error:
            raise ReplicaLost(f"its router does not answer ({type(error).__name__})") from error


class Routers(Replicas[RouterClient]):
    """A Backend. Belongs to one event loop."""

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        model: str,
        routing: Routing = "prefix",
        *,
        patience: float = 0.0,
        place: Place | None = None,
        foresee: bool = False,
    ) -> None:
        """`model` is the digest of what this ingress speaks for: routers that serve another model
        or another version of it, as there are while one replaces the other, are not used."""
        super().__init__(routing=routing, patience=patience, place=place, foresee=foresee)
        self._handle = handle
        self._model = model
        self._clients: dict[str, RouterClient] = {}
        self._address: asyncio.Future[RouterAddress] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._scrapes: RollCall[RouterClient, bytes] = RollCall(lambda each: each.metrics())
        self._statuses: RollCall[RouterClient, EngineStatus] = RollCall(lambda each: each.status())

    def follow(self) -> None:
        """Begin to follow what Serve tells."""
        watches.setdefault(self._handle.deployment_name, Watch()).listen(self._update)
        self._run(self._call())

    async def start(self) -> RouterAddress:
        """Follow what Serve tells; the first router's address, once there is one."""
        self.follow()
        return await asyncio.wait_for(self._address, _START_SECONDS)

    async def _call(self) -> None:
        """The first call has Serve tell."""
        await self._handle.process.remote()

    async def failure(self) -> str | None:
        """Why no router can serve; None while one can. All are asked if a few can't."""
        members = self.members()
        random.shuffle(members)
        reasons: list[str | None] = []
        for some in (members[:_FEW], members[_FEW:]):
            asked = [asyncio.create_task(each.client.failure()) for each in some]
            for each in asyncio.as_completed(asked):
                if (reason := await each) is None:
                    return None
                reasons.append(reason)
        return "; ".join(map(str, reasons)) or "there is no router"

    async def metrics(self) -> bytes:
        """See Backend. The figures of a router that does not answer soon are left out."""
        told = await self._scrapes.answers(each.client for each in self.members())
        found = [each.answer for each in told if not each.silent]
        if not found:
            raise EngineFailed("no router answers")
        if len(found) <= _FEW:
            return join_scrapes(found)
        return await asyncio.to_thread(join_scrapes, found)  # streams go on meanwhile

    async def status(self) -> list[EngineStatus]:
        """See Backend. A router that does not answer soon has failed, as far as can be seen; the
        rest is what it said last."""
        told = await self._statuses.answers(each.client for each in self.members())
        return [
            each.answer
            if not each.silent
            else msgspec.structs.replace(
                each.answer, failure=f"its router has not answered for {each.age:.0f} s"
            )
            for each in told
        ]

    async def sleep(self) -> str | None:
        """See sleep_api.Sleeper."""
        reasons = await asyncio.gather(*(each.client.sleep() for each in self.members()))
        return next((reason for reason in reasons if reason), None)

    async def wake_up(self) -> None:
        """See sleep_api.Sleeper."""
        await asyncio.gather(*(each.client.wake_up() for each in self.members()))

    async def asleep(self) -> bool:
        """See sleep_api.Sleeper."""
        return all(await asyncio.gather(*(each.client.asleep() for each in self.members())))

    def forgotten(self, client: RouterClient) -> None:
        self._run(client.close())

    def _update(self, names: list[str]) -> None:
        """Serve runs these routers now."""
        for name in self._clients.keys() - set(names):
            del self._clients[name]
            self.retire(name)
        for name in names:
            if name not in self._clients:
                client = RouterClient(name, self._handle, self._model)
                self._clients[name] = client
                self._run(self._admit(name, client))

    async def _admit(self, name: str, client: RouterClient) -> None:
        """Use a router that has come up, if it serves the same."""
        while self._clients.get(name) is client:
            try:
                address = await client.find()
            except ReplicaLost as error:
                logger.warning("router %s: %s", name, error)
                await asyncio.sleep(1)
                continue
            if address.model == self._model:
                self.add(name, client)
                if not self._address.done():
                    self._address.set_result(address)
            return

    def _run(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("following the routers failed", exc_info=error)


class SplitRouters(PrefillFirst):
    """A Backend of two deployments: routers that prefill, and routers that decode. It serves as
    long as one of the latter does."""

    def __init__(self, prefill: Routers, decode: Routers, min_tokens: int) -> None:
        super().__init__(prefill, decode, min_tokens)
        self._all = [decode, prefill]
        self._routers = decode

    async def failure(self) -> str | None:
        return await self._routers.failure()

    async def metrics(self) -> bytes:
        scrapes = await asyncio.gather(
            *(each.metrics() for each in self._all), return_exceptions=True
        )
        if isinstance(scrapes[0], BaseException):
            raise scrapes[0]
        return join_scrapes([each for each in scrapes if isinstance(each, bytes)])

    async def status(self) -> list[EngineStatus]:
        told = await asyncio.gather(*(each.status() for each in self._all))
        return [engine for some in told for engine in some]

    async def sleep(self) -> str | None:
        """See sleep_api.Sleeper."""
        reasons = [await each.sleep() for each in self._all]
        return next((reason for reason in reasons if reason), None)

    async def wake_up(self) -> None:
        """See sleep_api.Sleeper."""
        for each in self._all:
            await each.wake_up()

    async def asleep(self) -> bool:
        """See sleep_api.Sleeper."""
        return all([await each.asleep() for each in self._all])
