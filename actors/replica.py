"""A replica: all shards of one copy of a model, as Ray actors under one placement group.

Shards and group are detached: they outlive the router that started them, and the next router with
the same configuration *adopts* them. `recover` puts a replica right after some of its shards died:
those that live keep their weights, the others are started again, and all join a new epoch of their
communicator.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import ray
import ray.exceptions
import ray.util
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tensorray.actors.adapter import Adapter
from tensorray.actors.communicator import CommunicatorError
from tensorray.actors.config import ShardConfig
from tensorray.actors.group_link import GroupFailed, GroupLink
from tensorray.actors.lease import HeldLease, LeaseTaken
from tensorray.actors.link import ShardError
from tensorray.actors.orphaned_groups import NAMESPACE
from tensorray.actors.placement import (
    Placement,
    PlacementError,
    Strategy,
    choose_placement,
    cluster_nodes,
    cluster_resources,
    needs,
    reserve,
)
from tensorray.actors.ray_reason import reason_of
from tensorray.actors.shard_actor import Description, ShardActor
from tensorray.actors.shard_host import Loaded
from tensorray.actors.tcp_link import TcpLink

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

# How long a shard that should live may take to say so before it is taken for dead.
_ALIVE_SECONDS = 5.0
# How long Ray may take to say why one died; of a node's death it may not know for half a minute.
_REASON_SECONDS = 1.0
# How long a shard may take to say how it is, to whoever watches.
_LOOK_SECONDS = 1.0
_JOIN_SECONDS = 90.0
_ADAPTER_SECONDS = 240.0
_WARN_SECONDS = 30.0
_RETRY_SECONDS = 1.0
_ATTEMPTS = 3


@dataclass(frozen=True)
class Where:
    """How to place a replica's shards."""

    accelerator_type: str | None = None
    strategy: Strategy = "pack"
    timeout: float = 600.0  # seconds to wait for room
    lease: float = 60.0  # seconds that shards without a router live on
    replicas: int = 1  # of which this is one


class Replica:
    """The shards of one replica, by rank. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        configs: Sequence[ShardConfig],
        where: Where,
        placement: Placement,
        group: PlacementGroup,
    ) -> None:
        self._name = name
        self._configs = list(configs)
        self._where = where
        self._placement = placement
        self._group = group
        self._actors: list[Any] = [None] * len(configs)
        self._leases: list[HeldLease | None] = [None] * len(configs)
        self._loaded: list[Loaded | None] = [None] * len(configs)
        self._link: TcpLink | GroupLink | None = None
        self._was_whole = False
        self._adapters: dict[int, Adapter] = {}  # that all shards have
        # An adapter is loaded by the shards there are, so there must not be others meanwhile.
        self._changing = asyncio.Lock()
        #: Whether its shards were another router's before.
        self.adopted = False

    @classmethod
    async def open(cls, name: str, configs: Sequence[ShardConfig], where: Where) -> Replica:
        """Adopt the shards that a router with the same `name` has left behind, or start new ones.

        The name has to say all about the configuration. Returns once all shards have loaded.
        Raises PlacementError if there is no room, ShardError with the shard's own reason if one
        can't come up.
        """
        need = needs(configs[0].device, where.accelerator_type, cluster_resources())
        placement = choose_placement(
            cluster_nodes(),
            need,
            stages=configs[0].pipeline_parallel_size,
            shards_a_stage=configs[0].tensor_parallel_size,
            replicas=where.replicas,
            strategy=where.strategy,
        )
        replica = await cls._adopt(name, configs, where, placement)
        if replica is None:
            unique = f"{name}.{secrets.token_hex(4)}"
            group = await reserve(placement, unique, where.timeout)
            replica = cls(unique, configs, where, placement, group)
        try:
            await replica._complete()
        except BaseException:
            await replica.close()
            raise
        return replica

    async def connect(self) -> TcpLink | GroupLink:
        """The link over which steps go, after `open`."""
        assert self._link is not None
        return self._link

    async def recover(self, error: ShardError, tell: Callable[[str], None]) -> TcpLink | GroupLink:
        """Put the replica right after its link has failed with `error`: the new link.

        Shards that failed of themselves, or don't answer, are started again; the others stay.
        `tell` hears what became of the lost ones. Those started again have the adapters that the
        others have. Raises ShardError or PlacementError if it can't be done.
        """
        async with self._changing:
            return await self._recover(error, tell)

    async def _recover(self, error: ShardError, tell: Callable[[str], None]) -> TcpLink | GroupLink:
        count = len(self._configs)
        failed = error.ranks if isinstance(error, GroupFailed) else {}
        if count == 1:
            failed = {0: str(error)}
        if self._link is not None:
            await self._link.close()
            self._link = None
        others = [rank for rank in range(count) if rank not in failed]
        alive = await asyncio.gather(*map(self._lives, others))
        silent = [rank for rank, lives in zip(others, alive, strict=True) if not lives]
        lost = dict.fromkeys(silent, "it does not answer") | failed
        reasons = await asyncio.gather(*(self._reason(rank, lost[rank]) for rank in lost))
        told = "; ".join(f"rank {rank}: {why}" for rank, why in zip(lost, reasons, strict=True))
        tell(told)
        for rank in lost:
            self._drop(rank)
        return await self._complete()

    async def sleep(self) -> None:
        """End the shards and free their place, until `wake`."""
        async with self._changing:
            await self.close()
            self._link = None

    async def wake(self) -> TcpLink | GroupLink:
        """Start the shards again, with the adapters they had: the new link. Waits for room. Raises
        PlacementError or ShardError."""
        async with self._changing:
            base = self._name.rpartition(".")[0]
            self._name = f"{base}.{secrets.token_hex(4)}"
            self._group = await reserve(self._placement, self._name, self._where.timeout)
            return await self._complete()

    @property
    def adapters(self) -> list[Adapter]:
        """LoRA adapters that all shards have."""
        return list(self._adapters.values())

    async def add_adapter(self, adapter: Adapter) -> None:
        """Load an adapter in all shards, or in none. Raises ValueError with a shard's reason, and
        ShardError if one can't be asked."""
        async with self._changing:
            if None in self._actors:
                raise ShardError("the shards are asleep; a request wakes them")
            calls = [
                asyncio.wait_for(_get(actor.add_adapter, adapter), _ADAPTER_SECONDS)
                for actor in self._actors
            ]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            errors = [each for each in outcomes if isinstance(each, BaseException)]
            if not errors:
                self._adapters[adapter.id] = adapter
                return
            await self._forget_adapter(adapter.id)
        for error in errors:
            cause = getattr(error, "cause", None)
            if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, ValueError):
                raise ValueError(str(cause))
        raise ShardError(f"a shard could not load it: {reason_of(errors[0])}") from errors[0]

    async def remove_adapter(self, id: int) -> None:
        """Forget an adapter in all shards."""
        async with self._changing:
            self._adapters.pop(id, None)
            await self._forget_adapter(id)

    async def _forget_adapter(self, id: int) -> None:
        """A shard that does not answer has none, or is about to be started again."""
        actors = [actor for actor in self._actors if actor is not None]
        calls = [
            asyncio.wait_for(_get(actor.remove_adapter, id), _ALIVE_SECONDS) for actor in actors
        ]
        await asyncio.gather(*calls, return_exceptions=True)

    async def describe(self) -> list[Description]:
        """Each shard's process, by rank."""
        return list(await asyncio.gather(*[actor.describe.remote() for actor in self._actors]))

    async def look(self) -> list[Description | None]:
        """Each shard's process, by rank; None for one that does not answer within a second."""

        async def one(actor: Any) -> Description | None:
            if actor is None:  # it is being replaced
                return None
            try:
                answer = await asyncio.wait_for(actor.describe.remote(), _LOOK_SECONDS)
            except (asyncio.TimeoutError, ray.exceptions.RayError):
                return None
            return cast(Description, answer)

        return list(await asyncio.gather(*[one(actor) for actor in self._actors]))

    async def close(self) -> None:
        """End the shards and give back what was reserved for them."""
        if self._link is not None:
            await self._link.close()
        for rank in range(len(self._actors)):
            self._drop(rank)
        ray.util.remove_placement_group(self._group)

    # --- adopting -----------------------------------------------------------------------------

    @classmethod
    async def _adopt(
        cls, name: str, configs: Sequence[ShardConfig], where: Where, placement: Placement
    ) -> Replica | None:
        """A replica of that name whose router is gone, if there is one; maybe not whole."""
        orphans: dict[str, list[tuple[int, Any]]] = defaultdict(list)
        for each in ray.util.list_named_actors(all_namespaces=True):
            if each["namespace"] == NAMESPACE and each["name"].startswith(f"{name}."):
                unique, rank, _ = each["name"].split("/")
                with contextlib.suppress(ValueError):  # gone meanwhile
                    orphans[unique].append((int(rank), ray.get_actor(each["name"], NAMESPACE)))
        for unique, actors in orphans.items():
            groups = await asyncio.gather(
                *(_answer(actor.group, _ALIVE_SECONDS) for _, actor in actors)
            )
            group = next((each for each in groups if each is not None), None)
            if group is None:
                continue
            replica = cls(unique, configs, where, placement, group)
            taken = await asyncio.gather(*(replica._take_over(*each) for each in actors))
            if any(taken):
                logger.warning("adopted %d of %d shards", sum(taken), len(configs))
                await replica._adopt_adapters()
                return replica
        return None

    async def _adopt_adapters(self) -> None:
        """Of the adapters that shards have, keep those that all of them have."""
        self.adopted = True
        actors = [actor for actor in self._actors if actor is not None]
        found = [
            {adapter.id: adapter for adapter in held or ()}
            for held in await asyncio.gather(
                *(_answer(actor.adapters, _ALIVE_SECONDS) for actor in actors)
            )
        ]
        everywhere = set.intersection(*map(set, found))
        self._adapters = {id: found[0][id] for id in sorted(everywhere)}
        for id in set().union(*found) - everywhere:
            await self._forget_adapter(id)

    async def _take_over(self, rank: int, actor: Any) -> bool:
        """Become the owner of a shard that has none and has loaded."""
        endpoint = await _answer(actor.lease, _ALIVE_SECONDS)
        loaded = await _answer(actor.loaded, _ALIVE_SECONDS)
        if endpoint is None or loaded is None:
            return False
        try:
            lease = await HeldLease.take(endpoint)
        except LeaseTaken as error:
            logger.info("rank %d is not to be adopted: %s", rank, error)
            return False
        self._actors[rank], self._leases[rank], self._loaded[rank] = actor, lease, loaded
        return True

    # --- starting -----------------------------------------------------------------------------

    async def _complete(self) -> TcpLink | GroupLink:
        """Start and load what shards there are not, join all, and connect."""
        for attempt in range(1, _ATTEMPTS + 1):
            missing = [rank for rank, actor in enumerate(self._actors) if actor is None]
            await _all(self._start(rank) for rank in missing)
            unfit = await self._join()
            if not unfit:
                break
            told = "; ".join(f"rank {rank}: {reason}" for rank, reason in unfit.items())
            if attempt == _ATTEMPTS:
                raise ShardError(f"the shards can't be joined: {told}")
            logger.error("these shards do not join, and are started again: %s", told)
            for rank in unfit:
                self._drop(rank)
        links = await _all(TcpLink.connect(each.steps) for each in self._whole())
        self._link = links[0] if len(links) == 1 else GroupLink(links)
        self._was_whole = True
        return self._link

    async def _start(self, rank: int) -> None:
        """One shard, loaded. Raises PlacementError or ShardError.

        Ray may start a shard on a node that has died, as long as it does not know; so one that
        never came up is started again, and in a replica that was whole once, one that died while it
        loaded as well.
        """
        deadline = time.monotonic() + self._where.timeout
        deaths = 0
        while True:
            actor = self._actors[rank] = self._create(rank)
            up = False
            try:
                first_call = asyncio.ensure_future(_get(actor.lease))
                endpoint = await self._placed(rank, first_call, deadline)
                up = True
                self._leases[rank] = await HeldLease.take(endpoint)
                self._loaded[rank] = await actor.load.remote(self._configs[rank])
                await self._give_adapters(rank)
                return
            except ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", error)
                raise ShardError(f"{type(cause).__name__}: {cause}") from error
            except (ray.exceptions.RayActorError, LeaseTaken) as error:
                deaths += up
                when = "while loading" if up else "before it was up"
                told = f"the shard died {when}: {reason_of(error)}"
                late = time.monotonic() > deadline
                if late or deaths == (_ATTEMPTS if self._was_whole else 1):
                    raise ShardError(told) from error
                logger.warning("rank %d: %s; starting it again", rank, told)
                self._drop(rank)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _give_adapters(self, rank: int) -> None:
        """Have a shard that was started again load what the others have. What it can't is gone for
        all of them: sequences that ask for it fail, and no others."""
        for adapter in self.adapters:
            try:
                await self._actors[rank].add_adapter.remote(adapter)
            except ray.exceptions.RayTaskError as error:  # noqa: PERF203
                logger.error("adapter %s is lost: %s", adapter.name, reason_of(error))
                self._adapters.pop(adapter.id, None)
                await self._forget_adapter(adapter.id)

    def _create(self, rank: int) -> Any:
        """A shard's actor, which Ray is about to place."""
        config = self._configs[rank]
        bundle = self._placement.bundle_of[rank]
        options: dict[str, Any] = {
            # A shard whose node is gone may have its name for a while, so each has its own.
            "name": f"{self._name}/{rank}/{secrets.token_hex(4)}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "num_cpus": 0 if config.device == "null" else 1,
            "num_gpus": 1 if "GPU" in self._placement.bundles[bundle] else 0,
            "max_restarts": 0,
            "max_concurrency": 4,  # it answers while it loads
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=bundle
            ),
            # No environment of its own: with one, Ray could not take a process that is up already,
            # and recovery would take seconds longer.
        }
        return ray.remote(ShardActor).options(**options).remote(self._where.lease)

    async def _placed(self, rank: int, started: asyncio.Future[T], deadline: float) -> T:
        """What the shard says first, which it does once Ray has found it a place."""
        began = time.monotonic()
        try:
            while True:
                step = min(_WARN_SECONDS, max(0.1, deadline - time.monotonic()))
                try:
                    return await asyncio.wait_for(asyncio.shield(started), step)
                except asyncio.TimeoutError:
                    waited = f"rank {rank} has had no place for {time.monotonic() - began:.0f} s"
                if time.monotonic() > deadline:
                    raise PlacementError(
                        f"{waited}: nodes were lost, or other work took their place; add nodes"
                    )
                logger.warning("%s; waiting for Ray to find one", waited)
        finally:
            if not started.done():
                started.cancel()

    async def _join(self) -> dict[int, str]:
        """Join all shards in a new epoch; those to which it did not happen through another."""
        loaded = self._whole()
        members = [each.peers for each in loaded]
        num_blocks = min(each.info.kv.num_blocks for each in loaded)
        epoch = secrets.randbits(63)  # no router's before
        calls = [
            asyncio.wait_for(_get(actor.join, epoch, members, num_blocks), _JOIN_SECONDS)
            for actor in self._actors
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        errors = {
            rank: error for rank, error in enumerate(outcomes) if isinstance(error, BaseException)
        }
        own = {
            rank: reason_of(error)
            for rank, error in errors.items()
            if not isinstance(error, CommunicatorError)
        }
        if own or not errors:
            return own
        causes: list[Any] = [getattr(error, "cause", error) for error in errors.values()]
        named = {cause.peer: str(cause) for cause in causes if cause.peer is not None}
        return named or {rank: reason_of(error) for rank, error in errors.items()}

    # --- who lives ----------------------------------------------------------------------------

    def _whole(self) -> list[Loaded]:
        assert None not in self._loaded
        return [each for each in self._loaded if each is not None]

    async def _lives(self, rank: int) -> bool:
        return await _answer(self._actors[rank].loaded, _ALIVE_SECONDS) is not None

    async def _reason(self, rank: int, noticed: str) -> str:
        """Why a shard was lost: what was noticed, and what Ray says of its process."""
        try:
            await asyncio.wait_for(_get(self._actors[rank].loaded), _REASON_SECONDS)
        except ray.exceptions.RayError as error:
            return f"{noticed} ({reason_of(error)})"
        except asyncio.TimeoutError:
            pass
        return noticed

    def _drop(self, rank: int) -> None:
        """End a shard's process, if it has one."""
        actor, lease = self._actors[rank], self._leases[rank]
        self._actors[rank] = self._leases[rank] = self._loaded[rank] = None
        if lease is not None:
            lease.close()
        if actor is not None:
            ray.kill(actor)


async def _get(method: Any, *arguments: Any) -> Any:
    """An actor's method, called, as a coroutine."""
    return await method.remote(*arguments)


async def _answer(method: Any, seconds: float) -> Any:
    """What an actor's method returns; None if it does not answer in time."""
    try:
        return await asyncio.wait_for(_get(method), seconds)
    except (asyncio.TimeoutError, ray.exceptions.RayError):
        return None


async def _all(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all; the first error ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
