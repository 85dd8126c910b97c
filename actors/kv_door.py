"""A shard's door for KV blocks: other replicas' shards read there, its own router has it fetch.

A replica that prefills holds the blocks of a prompt; the replica that decodes has each of its
shards fetch them from the shard of the same rank, over one TCP connection a fetch, beside the steps
that run. Pages travel as their bytes, so both sides keep them alike (`Pages.page_layout`).

Nothing here is in step with the plans, so two questions have to be answered where the memory is:

- Is what was read what was asked for? A sequence's blocks are its own until the plan that ends it,
  so what was copied while the sequence was on the shard's books, before and after, is.
- May this still be written? A router that is gone may have left a fetch behind. So every set of
  books has a number, its `life`; a fetch that belongs to an earlier one writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from tensorray.actors.link import ShardError
from tensorray.actors.protocol import Door
from tensorray.actors.wire import (
    HANDSHAKE_SECONDS,
    LENGTH,
    PEER_SECONDS,
    SECRET_BYTES,
    Endpoint,
    check_length,
    dial,
    frame,
    keep_alive,
    read_frame,
)

logger = logging.getLogger(__name__)

#: What is copied and sent at once: enough to be fast, little enough not to hold up a step.
CHUNK_BYTES = 8 << 20

# How much longer than the fetch itself the shard's answer may take.
_ANSWER_SECONDS = 10.0

# How long it pauses when a connection could not be taken.
_PAUSE_SECONDS = 0.1

_HELD, _GONE = b"\1", b"\0"


class HandoverError(RuntimeError):
    """The blocks did not come. Nothing is written to them any more."""


@runtime_checkable
class Pages(Protocol):
    """A shard's KV cache, as its door sees it. Called by threads of the door's own."""

    #: Equal where pages are the same bytes: shapes, dtype, and which layers a group has.
    page_layout: str
    #: Bytes of one block.
    block_bytes: int

    def runs(self, seq: int) -> bool:
        """Whether the sequence is on the shard's books."""
        ...

    def read_blocks(self, blocks: NDArray[np.int32]) -> NDArray[np.uint8]:
        """What blocks `[n]` hold, as `n * block_bytes` bytes in an order of the shard's own."""
        ...

    def write_blocks(self, blocks: NDArray[np.int32], data: NDArray[np.uint8]) -> None:
        """Have blocks `[n]` hold what `read_blocks` gave of others."""
        ...


class Hello(msgspec.Struct, frozen=True):
    """What a door says first."""

    layout: str


class Read(msgspec.Struct, frozen=True, tag=True):
    """Send blocks of a sequence, in pieces of `CHUNK_BYTES`, each after a byte that says whether
    the sequence still is there."""

    life: int
    seq: int
    blocks: list[int]


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Read `theirs` of a sequence at another shard's door into `ours`."""

    life: int
    source: Door
    seq: int
    theirs: list[int]
    ours: list[int]
    seconds: float  # that it may take


class Fetched(msgspec.Struct, frozen=True):
    """The answer to a Fetch: what came, or why not all did."""

    nbytes: int = 0
    error: str = ""


class _Life:
    """The number of a shard's present books; none ends while something is written for it."""

    def __init__(self) -> None:
        self.number = 0
        self._writes = 0  # under way
        self._changed = threading.Condition()

    def renew(self) -> int:
        """A new one's number, once nothing is written for the one before any more."""
        with self._changed:
            self.number = secrets.randbits(63)
            self._changed.wait_for(lambda: not self._writes)
            return self.number

    @contextlib.contextmanager
    def writing(self, number: int) -> Iterator[None]:
        """While something is written for life `number`; several may be. Raises HandoverError if
        that has ended."""
        with self._changed:
            if number != self.number:
                raise HandoverError("this shard has started anew")
            self._writes += 1
        try:
            yield
        finally:
            with self._changed:
                self._writes -= 1
                self._changed.notify_all()


class KVDoor:
    """Serves a shard's pages, a thread for each connection."""

    def __init__(self, pages: Pages, host: str = "127.0.0.1") -> None:
        self._pages = pages
        self._life = _Life()
        self._listener = socket.create_server((host, 0))
        self._endpoint = Endpoint.new(host, self._listener.getsockname()[1])
        self._closed = threading.Event()
        threading.Thread(target=self._listen, name="kv-door", daemon=True).start()

    def renew(self) -> Door:
        """The shard's books are about to be new ones: what belongs to the old writes no more."""
        return Door(self._endpoint, self._life.renew())

    def close(self) -> None:
        self.renew()
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError as error:  # closed; or a caller has left, or no descriptor is
                if self._closed.wait(_PAUSE_SECONDS):
                    return
                logger.warning("nobody could come in: %s", error)
                continue
            threading.Thread(
                target=self._serve, args=(connection, peer), name="kv-door-peer", daemon=True
            ).start()

    def _serve(self, connection: socket.socket, peer: object) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                keep_alive(connection)
                connection.settimeout(HANDSHAKE_SECONDS)
                if not self._endpoint.admits(bytes(_receive(connection, SECRET_BYTES))):
                    logger.warning("refused a connection from %s: wrong secret", peer)
                    return
                connection.sendall(_encoded(Hello(self._pages.page_layout)))
                message = msgspec.msgpack.decode(_receive_frame(connection), type=Read | Fetch)
                if isinstance(message, Read):
                    self._read(connection, message)
                else:
                    connection.sendall(_encoded(self._fetch(message)))
        except (OSError, msgspec.MsgspecError) as error:
            logger.info("a connection from %s ended: %s", peer, error)
        except Exception:
            logger.exception("a connection from %s ended", peer)

    def _lends(self, message: Read) -> bool:
        return message.life == self._life.number and self._pages.runs(message.seq)

    def _read(self, connection: socket.socket, message: Read) -> None:
        for blocks in self._pieces(message.blocks):
            data = self._pages.read_blocks(blocks) if self._lends(message) else None
            if data is None or not self._lends(message):
                connection.sendall(_GONE)
                return
            connection.sendall(_HELD)
            connection.sendall(data.data)

    def _fetch(self, message: Fetch) -> Fetched:
        deadline = time.monotonic() + message.seconds
        nbytes = 0
        try:
            with self._reach(message.source, deadline) as peer:
                peer.sendall(_encoded(Read(message.source.life, message.seq, message.theirs)))
                for blocks in self._pieces(message.ours):
                    if _receive(peer, 1, deadline) != _HELD:
                        raise HandoverError("they are held no more")
                    data = _receive(peer, len(blocks) * self._pages.block_bytes, deadline)
                    with self._life.writing(message.life):
                        self._pages.write_blocks(blocks, np.frombuffer(data, np.uint8))
                    nbytes += len(data)
        except (OSError, HandoverError, msgspec.MsgspecError) as error:
            return Fetched(nbytes, f"{type(error).__name__}: {error}")
        return Fetched(nbytes)

    def _reach(self, source: Door, deadline: float) -> AbstractContextManager[socket.socket]:
        """A connection to another shard's door. Raises OSError or HandoverError."""
        place = source.endpoint
        # A machine that is gone does not answer at all, and not before the deadline either.
        patience = min(_left(deadline), PEER_SECONDS)
        peer = socket.create_connection((place.host, place.port), patience)
        try:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(peer)
            peer.settimeout(_left(deadline))
            peer.sendall(place.secret)
            hello = msgspec.msgpack.decode(_receive_frame(peer, deadline), type=Hello)
            if hello.layout != self._pages.page_layout:
                raise HandoverError(
                    f"its pages are {hello.layout}, and here they are {self._pages.page_layout}"
                )
        except BaseException:
            peer.close()
            raise
        return peer

    def _pieces(self, blocks: Sequence[int]) -> Iterator[NDArray[np.int32]]:
        size = max(1, CHUNK_BYTES // self._pages.block_bytes)
        for start in range(0, len(blocks), size):
            yield np.array(blocks[start : start + size], np.int32)


async def fetch(
    door: Door, source: Door, seq: int, theirs: list[int], ours: list[int], seconds: float
) -> int:
    """Have the shard behind `door` fetch blocks from the one behind `source`; the bytes that came.

    Raises HandoverError when they did not come within `seconds`, and ShardError when the shard does
    not answer: then nobody knows whether it still writes.
    """

    async def ask() -> Fetched:
        reader, writer = await dial(door.endpoint)
        try:
            await read_frame(reader)
            writer.write(_encoded(Fetch(door.life, source, seq, theirs, ours, seconds)))
            return msgspec.msgpack.decode(await read_frame(reader), type=Fetched)
        finally:
            writer.close()

    try:
        answer = await asyncio.wait_for(ask(), seconds + _ANSWER_SECONDS)
    except (
        OSError,
        asyncio.IncompleteReadError,
        asyncio.TimeoutError,
        msgspec.MsgspecError,
    ) as error:
        raise ShardError(f"the shard does not say what became of a fetch: {error!r}") from error
    if answer.error:
        raise HandoverError(answer.error)
    return answer.nbytes


def _encoded(message: Any) -> bytes:
    return frame(msgspec.msgpack.encode(message))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("they took too long")
    return left


def _receive(connection: socket.socket, size: int, deadline: float | None = None) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        if deadline is not None:
            connection.settimeout(_left(deadline))
        got = connection.recv_into(view)
        if got == 0:
            raise ConnectionError("end of file")
        view = view[got:]
    return buffer


def _receive_frame(connection: socket.socket, deadline: float | None = None) -> bytearray:
    (length,) = LENGTH.unpack(_receive(connection, LENGTH.size, deadline))
    return _receive(connection, check_length(length), deadline)
