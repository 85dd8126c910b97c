"""What both TCP links share: where a peer listens and the secret that opens it, and frames.

A connection opens with the secret; then both sides send frames, a length and that many bytes.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import struct

import msgspec

SECRET_BYTES = 32
HANDSHAKE_SECONDS = 10.0
PEER_SECONDS = 2  # a machine that does not answer for so long is gone

LENGTH = struct.Struct("<I")
MAX_FRAME = 1 << 30  # bytes of a frame's body


class Endpoint(msgspec.Struct, frozen=True):
    """Where a peer listens, and the secret that opens it."""

    host: str
    port: int
    secret: bytes

    @classmethod
    def new(cls, host: str, port: int) -> Endpoint:
        """With a secret of its own."""
        return cls(host, port, secrets.token_bytes(SECRET_BYTES))

    def __repr__(self) -> str:
        """Without the secret: endpoints are in what gets logged when something goes wrong."""
        return f"Endpoint({self.host}:{self.port})"

    def admits(self, secret: bytes) -> bool:
        return hmac.compare_digest(secret, self.secret)


def frame(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


def check_length(length: int) -> int:
    """The length of a frame to come. Raises ConnectionError if nobody would send that much."""
    if length > MAX_FRAME:
        raise ConnectionError(f"a frame of {length} bytes")
    return length


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame's body. Raises OSError or IncompleteReadError when the peer is gone."""
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return await reader.readexactly(check_length(length))


async def dial(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect, and say the secret. Raises OSError."""
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    no_delay(writer)
    writer.write(endpoint.secret)
    return reader, writer


def keep_alive(connection: socket.socket) -> None:
    """Have the kernel end a connection whose peer's machine is gone within PEER_SECONDS.

    A peer's process that dies ends its connections at once; a machine that loses power or its
    network says nothing. The kernel asks, since Python may be busy for as long.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", 1),
        ("TCP_KEEPINTVL", 1),
        ("TCP_KEEPCNT", max(1, PEER_SECONDS - 1)),
        ("TCP_USER_TIMEOUT", PEER_SECONDS * 1000),  # for what was sent and is not acknowledged
    ):
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def no_delay(writer: asyncio.StreamWriter) -> None:
    """Send small frames at once, and notice when the peer's machine is gone."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(connection)
