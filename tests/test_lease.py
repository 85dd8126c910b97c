"""Leases: one owner at a time, and an end when there is none."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import msgspec
import pytest

from tensorray.actors import lease as lease_module
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


async def test_it_lapses_when_nobody_holds_it_and_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(lease_module, "_POLL_SECONDS", 0.01)
    lapsed = threading.Event()
    lease = Lease("127.0.0.1", 60.0, lapsed.set)
    owner = await HeldLease.take(lease.endpoint)
    now = 1000.0
    await asyncio.sleep(0.2)  # it looks several times, and sees who holds it
    assert not lapsed.is_set()
    owner.close()
    for _ in range(6000):
        if lease._owner is None:
            break
        await asyncio.sleep(0.01)
    now = 1059.0
    await asyncio.sleep(0.2)
    assert not lapsed.is_set()
    now = 1061.0
    assert await asyncio.to_thread(lapsed.wait, 60)
    with pytest.raises(LeaseTaken):
        await HeldLease.take(lease.endpoint)
    lease.close()
