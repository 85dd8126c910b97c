"""Who owns a shard: whoever holds its lease, a connection that lives as long as the owner does.

Shards outlive their router, so that the next one need not load them again. A router holds one
connection to each of its shards; its end, at once if the process dies and within PEER_SECONDS if
its machine does, frees the shard for another owner. One that nobody takes within the lease's time
ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from tensorray.actors.wire import (
    HANDSHAKE_SECONDS,
    SECRET_BYTES,
    Endpoint,
    dial,
    keep_alive,
)

logger = logging.getLogger(__name__)

_WELCOME = b"\x01"
_POLL_SECONDS = 0.5


class LeaseTaken(RuntimeError):
    """Somebody else owns the shard, or it is ending."""


class Lease:
    """The shard's side. `lapsed` is called, on a thread, when nobody has held the lease for
    `seconds`."""

    def __init__(self, host: str, seconds: float, lapsed: Callable[[], None]) -> None:
        self._listener = socket.create_server((host, 0))
        self.endpoint = Endpoint.new(host, self._listener.getsockname()[1])
        self._seconds = seconds
        self._lapsed = lapsed
        self._owner: socket.socket | None = None
        self._free_since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        self._listener.settimeout(_POLL_SECONDS)
        while True:
            try:
                connection, peer = self._listener.accept()
            except TimeoutError:
                pass
            except OSError:
                break  # closed
            else:
                self._admit(connection, peer)
            self._look_at_owner()
            if self._owner is None and time.monotonic() - self._free_since > self._seconds:
                logger.warning("no router has come for %g s: this shard ends", self._seconds)
                self._listener.close()
                self._lapsed()
                return
        if self._owner is not None:
            self._owner.close()

    def _admit(self, connection: socket.socket, peer: object) -> None:
        try:
            connection.settimeout(HANDSHAKE_SECONDS)
            secret = b""
            while len(secret) < SECRET_BYTES:
                got = connection.recv(SECRET_BYTES - len(secret))
                if not got:
                    raise ConnectionError("end of file")
                secret += got
            self._look_at_owner()
            if self._owner is None and self.endpoint.admits(secret):
                keep_alive(connection)
                connection.sendall(_WELCOME)
                connection.setblocking(False)
                self._owner = connection
                return
            logger.warning("refused the lease to %s", peer)
        except OSError as error:
            logger.info("%s did not take the lease: %r", peer, error)
        connection.close()

    def _look_at_owner(self) -> None:
        """Notice that the owner is gone."""
        if self._owner is None:
            return
        try:
            if self._owner.recv(1):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._owner.close()
        self._owner = None
        self._free_since = time.monotonic()


class HeldLease:
    """The owner's side, for as long as it lives."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    @classmethod
    async def take(cls, endpoint: Endpoint) -> HeldLease:
        """Raises LeaseTaken if the shard has an owner, or is gone."""
        try:
            reader, writer = await asyncio.wait_for(dial(endpoint), HANDSHAKE_SECONDS)
            try:
                await asyncio.wait_for(reader.readexactly(len(_WELCOME)), HANDSHAKE_SECONDS)
            except BaseException:
                writer.close()
                raise
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            raise LeaseTaken(f"the shard at {endpoint.host} is not to be had: {error!r}") from error
        return cls(writer)

    def close(self) -> None:
        self._writer.close()
