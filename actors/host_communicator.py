"""Collectives on NumPy arrays over TCP, within a node and across nodes.

Every rank holds one connection to every other. A rank listens at a `MeetingPoint`, whose endpoint
travels through Ray; `join` connects those of one *epoch*, and a later epoch replaces it after a
failure.

Small messages go straight to everybody and each rank adds them up: one message time, some tens of
microseconds within a node. Larger sums are made in two exchanges, each rank adding up one part
and handing it out, which moves 2 (n - 1) / n of the data a rank as a ring does, in two message
times instead of 2 (n - 1) (Thakur et al., "Optimization of Collective Communication Operations in
MPICH", 2005). Either way values are added in rank order, so all ranks have the same bits.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.communicator import CommunicatorError
from tensorray.actors.wire import SECRET_BYTES, Endpoint, keep_alive

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<Q")  # the bytes that follow
_HELLO = struct.Struct("<QI")  # epoch, rank of who connects
_WELCOME = b"\x01"
_HELLO_SECONDS = 5.0
# A message this small fits into the kernel's buffers, so it can be sent before the peer reads.
_SMALL = 1 << 15
_SEND_BUFFER = 1 << 18
_SPIN_SECONDS = 200e-6

Array = NDArray[Any]


class MeetingPoint:
    """Where a rank's peers find it, from one epoch to the next."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._listener = socket.create_server((host, 0), backlog=128)
        self.endpoint = Endpoint.new(host, self._listener.getsockname()[1])

    def join(
        self,
        rank: int,
        members: Sequence[Endpoint],
        *,
        epoch: int = 0,
        connect_timeout: float = 30.0,
        timeout: float = 300.0,
    ) -> HostCommunicator:
        """Connect to the others; `members` are everybody's endpoints, by rank.

        Returns when all connections of this rank stand. An operation that waits for a peer longer
        than `timeout` seconds aborts the group. Raises CommunicatorError naming whoever did not
        come within `connect_timeout` seconds.
        """
        deadline = time.monotonic() + connect_timeout
        peers: dict[int, _Peer] = {}
        try:
            for other in range(rank):
                peers[other] = _Peer(other, _connect(other, members[other], epoch, rank, deadline))
            missing = set(range(rank + 1, len(members)))
            while missing:
                other, connection = self._accept(epoch, missing, deadline)
                missing.remove(other)
                peers[other] = _Peer(other, connection)
        except BaseException:
            for peer in peers.values():
                peer.connection.close()
            raise
        mesh = _Mesh(peers, timeout)
        return HostCommunicator(mesh, list(range(len(members))), rank)

    def close(self) -> None:
        self._listener.close()

    def _accept(self, epoch: int, missing: set[int], deadline: float) -> tuple[int, socket.socket]:
        """The next connection of a missing rank of this epoch; others are turned away."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                ranks = ", ".join(map(str, sorted(missing)))
                raise CommunicatorError(f"rank {ranks} did not come to epoch {epoch}", min(missing))
            self._listener.settimeout(left)
            with suppress(TimeoutError):
                connection, address = self._listener.accept()
                try:
                    connection.settimeout(min(_HELLO_SECONDS, left))
                    secret = _read_exactly(connection, SECRET_BYTES)
                    theirs, rank = _HELLO.unpack(_read_exactly(connection, _HELLO.size))
                    if self.endpoint.admits(secret) and theirs == epoch and rank in missing:
                        connection.sendall(_WELCOME)
                        return rank, connection
                    logger.warning("turned %s away: not a member of epoch %d", address, epoch)
                except OSError as error:
                    logger.warning("turned %s away: %r", address, error)
                connection.close()


def _connect(
    other: int, endpoint: Endpoint, epoch: int, rank: int, deadline: float
) -> socket.socket:
    where = f"rank {other} at {endpoint.host}:{endpoint.port}"
    try:
        connection = socket.create_connection(
            (endpoint.host, endpoint.port), max(0.001, deadline - time.monotonic())
        )
    except OSError as error:
        raise CommunicatorError(f"{where} can't be reached: {error}", other) from error
    try:
        connection.sendall(endpoint.secret + _HELLO.pack(epoch, rank))
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        _read_exactly(connection, len(_WELCOME))
    except OSError as error:
        connection.close()
        raise CommunicatorError(f"{where} did not come to epoch {epoch}: {error}", other) from error
    return connection


class _Peer:
    """The connection to another rank of the world."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank = rank
        self.connection = connection
        self.header = bytearray(_HEADER.size)
        host, port = connection.getpeername()[:2]
        self.name = f"rank {rank} at {host}:{port}"


class _Mesh:
    """A rank's connections to all others, which its groups share."""

    def __init__(self, peers: dict[int, _Peer], timeout: float) -> None:
        self.peers = peers
        self.timeout = timeout
        self.broken: CommunicatorError | None = None
        seconds = int(timeout)
        limit = struct.pack("ll", seconds, int((timeout - seconds) * 1e6))
        for peer in peers.values():
            connection = peer.connection
            # The kernel bounds the wait: a time-out of Python's costs a system call a message.
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(connection)

    def abort(self, error: CommunicatorError) -> None:
        if self.broken is None:
            self.broken = error
        for peer in self.peers.values():
            # shutdown(), unlike close(), wakes a thread that waits for the socket.
            with suppress(OSError):
                peer.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for peer in self.peers.values():
            peer.connection.close()

    @contextmanager
    def _guarded(self, peer: _Peer) -> Iterator[None]:
        """Turns what goes wrong with a peer into the group's end."""
        if self.broken is not None:
            raise CommunicatorError(str(self.broken), self.broken.peer)
        try:
            yield
        except OSError as error:
            raise self._lost(peer, error) from error

    def _lost(self, peer: _Peer, error: OSError) -> CommunicatorError:
        if isinstance(error, BlockingIOError | TimeoutError):
            reason = f"{peer.name} has not answered for {self.timeout:g} s"
        else:
            reason = f"{peer.name} is gone ({error})"
        self.abort(CommunicatorError(reason, peer.rank))
        assert self.broken is not None
        return CommunicatorError(str(self.broken), self.broken.peer)

    def send(self, rank: int, data: memoryview) -> None:
        peer = self.peers[rank]
        with self._guarded(peer):
            connection = peer.connection
            header = _HEADER.pack(len(data))
            sent = connection.sendmsg((header, data))
            if sent < len(header):
                connection.sendall(header[sent:])
                sent = len(header)
            if sent < len(header) + len(data):
                connection.sendall(data[sent - len(header) :])

    def receive(self, rank: int, into: memoryview) -> None:
        peer = self.peers[rank]
        with self._guarded(peer):
            connection, header = peer.connection, peer.header
            got = _some(_soon(connection, (header, into)))
            while got < len(header):
                got += _some(connection.recvmsg_into((memoryview(header)[got:], into))[0])
            got -= len(header)
            (length,) = _HEADER.unpack(header)
            if length != len(into):
                raise ConnectionError(f"it sent {length} bytes where {len(into)} were due")
            while got < length:
                got += _some(connection.recv_into(into[got:]))

    def exchange(self, out: Mapping[int, memoryview], into: Mapping[int, memoryview]) -> None:
        """Send to some ranks and receive from some, all at once."""
        if all(len(data) <= _SMALL for data in out.values()):
            for rank, data in out.items():
                self.send(rank, data)
            for rank, data in into.items():
                self.receive(rank, data)
        else:
            _Exchange(self, out, into).run()


class _Exchange:
    """Large messages to and from several ranks: whichever can go on goes on."""

    def __init__(
        self, mesh: _Mesh, out: Mapping[int, memoryview], into: Mapping[int, memoryview]
    ) -> None:
        self._mesh = mesh
        self._headers = {rank: bytearray(_HEADER.size) for rank in into}
        # What is left, in order; the header is a buffer of its own.
        self._sending = {
            rank: [memoryview(_HEADER.pack(len(data))), data] for rank, data in out.items()
        }
        self._receiving = {
            rank: [memoryview(self._headers[rank]), data] for rank, data in into.items()
        }
        self._into = into

    def run(self) -> None:
        mesh = self._mesh
        poller = select.poll()
        by_descriptor: dict[int, _Peer] = {}
        for rank in self._sending.keys() | self._receiving.keys():
            peer = mesh.peers[rank]
            with mesh._guarded(peer):
                by_descriptor[peer.connection.fileno()] = peer
                poller.register(peer.connection, self._wants(rank))
        while self._sending or self._receiving:
            ready = poller.poll(mesh.timeout * 1e3)
            if not ready:
                rank = min(self._receiving or self._sending)
                raise mesh._lost(mesh.peers[rank], TimeoutError())
            for descriptor, events in ready:
                peer = by_descriptor[descriptor]
                with mesh._guarded(peer):
                    if events & ~select.POLLOUT and peer.rank in self._receiving:
                        self._receive(peer)
                    if events & select.POLLOUT and peer.rank in self._sending:
                        self._send(peer)
                    if wants := self._wants(peer.rank):
                        poller.modify(descriptor, wants)
                    else:
                        poller.unregister(descriptor)

    def _wants(self, rank: int) -> int:
        reading = select.POLLIN if rank in self._receiving else 0
        return reading | (select.POLLOUT if rank in self._sending else 0)

    def _send(self, peer: _Peer) -> None:
        left = self._sending[peer.rank]
        _advance(left, peer.connection.sendmsg(left, (), socket.MSG_DONTWAIT))
        if not left:
            del self._sending[peer.rank]

    def _receive(self, peer: _Peer) -> None:
        left = self._receiving[peer.rank]
        header_due = len(left) == 2
        _advance(left, _some(peer.connection.recvmsg_into(left, 0, socket.MSG_DONTWAIT)[0]))
        if header_due and len(left) < 2:
            (length,) = _HEADER.unpack(self._headers[peer.rank])
            if length != len(self._into[peer.rank]):
                raise ConnectionError(
                    f"it sent {length} bytes where {len(self._into[peer.rank])} were due"
                )
        if not left:
            del self._receiving[peer.rank]


def _soon(connection: socket.socket, into: tuple[bytearray, memoryview]) -> int:
    """Receive what has come or comes; to be woken takes longer than most messages do."""
    deadline = time.perf_counter() + _SPIN_SECONDS
    while time.perf_counter() < deadline:
        try:
            return connection.recvmsg_into(into, 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:  # noqa: PERF203
            os.sched_yield()  # another rank may need this core to get on
    return connection.recvmsg_into(into)[0]


def _advance(left: list[memoryview], count: int) -> None:
    """Drop the first `count` bytes of the buffers."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]


class HostCommunicator:
    """A group of ranks on NumPy arrays. See Communicator; made by `MeetingPoint.join`."""

    def __init__(self, mesh: _Mesh, ranks: list[int], rank: int) -> None:
        self.rank = rank
        self.size = len(ranks)
        self._mesh = mesh
        self._ranks = ranks  # in the world, by rank in the group
        self._others = [other for other in range(self.size) if other != rank]

    def all_reduce(self, x: Array) -> Array:
        x = np.ascontiguousarray(x)
        if self.size == 1:
            return x
        if x.nbytes <= _SMALL:
            return _sum(self._gather(x))
        flat = x.reshape(-1)
        cuts = [flat.size * i // self.size for i in range(self.size + 1)]
        spans = [slice(start, stop) for start, stop in pairwise(cuts)]
        own = spans[self.rank]
        parts = np.empty((self.size, own.stop - own.start), x.dtype)
        parts[self.rank] = flat[own]
        self._exchange([flat[span] for span in spans], list(parts))
        result = np.empty_like(flat)
        result[own] = _sum(parts)
        self._exchange([result[own]] * self.size, [result[span] for span in spans])
        return result.reshape(x.shape)

    def all_gather(self, x: Array) -> Array:
        return self._gather(np.ascontiguousarray(x))

    def reduce_scatter(self, x: Array) -> Array:
        x = np.ascontiguousarray(x)
        if len(x) != self.size:
            raise ValueError(f"reduce_scatter of {x.shape} over {self.size} ranks")
        parts = np.empty_like(x)
        parts[self.rank] = x[self.rank]
        self._exchange(list(x), list(parts))
        return _sum(parts)

    def send(self, x: Array, to: int) -> None:
        self._mesh.send(self._ranks[to], _bytes(np.ascontiguousarray(x)))

    def recv(self, out: Array, source: int) -> Array:
        self._mesh.receive(self._ranks[source], _bytes(out))
        return out

    def broadcast(self, x: Array, root: int) -> Array:
        if self.rank != root:
            return self.recv(x, root)
        data = _bytes(np.ascontiguousarray(x))
        self._mesh.exchange({self._ranks[other]: data for other in self._others}, {})
        return x

    def barrier(self) -> None:
        self._gather(np.zeros(1, np.uint8))

    def abort(self, reason: str) -> None:
        self._mesh.abort(CommunicatorError(f"aborted: {reason}"))

    def close(self) -> None:
        """Give the connections up; nobody may be using them."""
        self._mesh.close()

    def subgroup(self, ranks: Sequence[int]) -> HostCommunicator:
        world = [self._ranks[rank] for rank in ranks]
        return HostCommunicator(self._mesh, world, list(ranks).index(self.rank))

    def _gather(self, x: Array) -> Array:
        parts = np.empty((self.size, *x.shape), x.dtype)
        parts[self.rank] = x
        self._exchange([x] * self.size, list(parts))
        return parts

    def _exchange(self, out: list[Array], into: list[Array]) -> None:
        """Send `out[i]` to rank i and receive `into[i]` from it, this rank left out."""
        self._mesh.exchange(
            {self._ranks[other]: _bytes(out[other]) for other in self._others},
            {self._ranks[other]: _bytes(into[other]) for other in self._others},
        )


def _sum(parts: Array) -> Array:
    """The parts added up in order."""
    total: Array = parts[0] + parts[1] if len(parts) > 1 else parts[0].copy()
    for part in parts[2:]:
        total += part
    return total


def _bytes(x: Array) -> memoryview:
    """A contiguous array's memory; a view of it, so that it can be written."""
    return memoryview(x.reshape(-1).view(np.uint8).data)


def _some(count: int) -> int:
    if count == 0:
        raise ConnectionError("end of file")
    return count


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += connection.recv(size - len(data)) or _end_of_file()
    return data


def _end_of_file() -> bytes:
    raise ConnectionError("end of file")
