"""Leases: one owner at a time, and an end when there is none."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import msgspec
import pytest

from tensorray.actors.lease import HeldLease, Lease, LeaseTaken


async def take_when_free(lease: Lease) -> HeldLease:
    """The lease's side notices a moment after the owner that the connection is closed."""
    for _ in range(6000):
        with contextlib.suppress(LeaseTaken):
            return await HeldLease.take(lease.endpoint)
        await asyncio.sleep(0.01)
    raise AssertionError("the lease is still taken")


async def test_one_owner_at_a_time_and_the_next_when_it_is_gone() -> None:
    lapsed = threading.Event()
    lease = Lease("127.0.0.1", 60.0, lapsed.set)
    first = await HeldLease.take(lease.endpoint)
    with pytest.raises(LeaseTaken):
        await HeldLease.take(lease.endpoint)
    first.close()
    second = await take_when_free(lease)
    second.close()
    assert not lapsed.is_set()
    lease.close()


async def test_a_stranger_does_not_get_it() -> None:
    lease = Lease("127.0.0.1", 60.0, lambda: None)
    with pytest.raises(LeaseTaken):
        await HeldLease.take(msgspec.structs.replace(lease.endpoint, secret=bytes(32)))
    (await HeldLease.take(lease.endpoint)).close()
    lease.close()


async def test_it_lapses_when_nobody_holds_it_and_only_then() -> None:
    lapsed = threading.Event()
    lease = Lease("127.0.0.1", 0.6, lapsed.set)
    owner = await HeldLease.take(lease.endpoint)
    await asyncio.sleep(1.3)
    assert not lapsed.is_set()
    owner.close()
    gone = time.monotonic()
    assert await asyncio.to_thread(lapsed.wait, 10)
    assert time.monotonic() - gone >= 0.5
    with pytest.raises(LeaseTaken):
        await HeldLease.take(lease.endpoint)
    lease.close()
