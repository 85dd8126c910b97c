"""The engine at a distance: one TCP connection from each ingress replica to the router.

All of an ingress's requests share its connection, and what a step brought all of them travels as
one frame, so a token costs microseconds where a streamed Serve call costs hundreds. Serve places
and watches both ends, and tells an ingress where its router listens and the secret that opens it.
A connection's end is noticed at once: the router cancels what that ingress had running, and the
ingress goes on with it elsewhere (replicas.py).

When the reader lags, the router stops reading its streams, and the engine merges their tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Literal

import msgspec

from tensorray.actors import wire
from tensorray.actors.wire import (
    HANDSHAKE_SECONDS,
    SECRET_BYTES,
    Endpoint,
    dial,
    frame,
    no_delay,
    read_frame,
)
from tensorray.cluster.engine import Engine, EngineFailed
from tensorray.cluster.errors import InternalError
from tensorray.cluster.replica_choice import SEQUENCE_TOKENS, weight
from tensorray.cluster.replicas import ReplicaLost
from tensorray.cluster.request import (
    Delta,
    GenerationRequest,
    QueueFull,
    RequestRefused,
    UnknownAdapter,
)
from tensorray.cluster.request_id import request_id

logger = logging.getLogger(__name__)

_HIGH_WATER = 1 << 18  # bytes on their way to an ingress before it counts as lagging


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A request, under the number that its connection knows it by."""

    stream: int
    request: GenerationRequest
    log_id: str = ""  # see request_id.py


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End a stream's sequence, or (None) all of them."""

    stream: int
    index: int | None


class Failure(msgspec.Struct, frozen=True):
    """Why a stream ended early."""

    kind: Literal["refused", "unknown_adapter", "queue_full", "unavailable", "internal"]
    message: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        match error:
            case QueueFull():
                return cls("queue_full", str(error))
            case UnknownAdapter():
                return cls("unknown_adapter", str(error))
            case RequestRefused():
                return cls("refused", str(error))
            case EngineFailed():
                return cls("unavailable", str(error))
            case _:
                return cls("internal", f"{type(error).__name__}: {error}")

    def error(self) -> Exception:
        kinds: dict[str, type[Exception]] = {
            "refused": RequestRefused,
            "unknown_adapter": UnknownAdapter,
            "queue_full": QueueFull,
            "unavailable": EngineFailed,
            "internal": InternalError,
        }
        return kinds[self.kind](self.message)


class Item(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """What one stream gained. A frame is a list of these."""

    stream: int
    deltas: list[Delta]
    failure: Failure | None = None


class Told(msgspec.Struct, frozen=True, array_like=True):
    """What a router says to an ingress: a frame."""

    items: list[Item]
    load: int  # of the engine: Engine.load
    room: int  # in it: Engine.room
    seen: int  # the last of the connection's streams that it counts


# --- the router's end -------------------------------------------------------------------------


class EngineServer:
    """Gives ingress replicas the use of an engine. Belongs to the engine's event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self.endpoint = Endpoint("", 0, b"")

    async def start(self, host: str) -> Endpoint:
        """Listen on a free port of `host`."""
        self._server = await asyncio.start_server(self._serve, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        self.endpoint = Endpoint.new(host, port)
        return self.endpoint

    def running(self) -> int:
        """Streams not yet ended."""
        return sum(len(connection.streams) for connection in self._connections)

    async def drain(self) -> None:
        """Return when every stream has ended. New ones are still taken meanwhile: whoever sends
        them knows of no other router."""
        while tasks := [task for each in self._connections for task in each.streams.values()]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        try:
            secret = await asyncio.wait_for(reader.readexactly(SECRET_BYTES), HANDSHAKE_SECONDS)
            if not self.endpoint.admits(secret):
                logger.warning("refused a connection from %s: wrong secret", peer)
                return
            no_delay(writer)
            connection = _Connection(self._engine, reader, writer, self._connections)
            self._connections.add(connection)
            try:
                await connection.serve()
            finally:
                self._connections.discard(connection)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass  # the peer is gone, and with it whoever wanted an answer
        finally:
            writer.close()


class _Connection:
    """One ingress's streams."""

    def __init__(
        self,
        engine: Engine,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        others: Collection[_Connection],
    ) -> None:
        self.streams: dict[int, asyncio.Task[None]] = {}
        self._engine = engine
        self._others = others  # all of the router's, this one among them
        self._reader = reader
        self._writer = writer
        self._ids: dict[int, str] = {}
        self._outbox: list[Item] = []
        self._seen = 0
        self._load = 0  # as told last
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._encoder = msgspec.msgpack.Encoder()
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER)

    async def serve(self) -> None:
        """Until the peer goes."""
        decoder = msgspec.msgpack.Decoder(Submit | Cancel)
        try:
            while True:
                message = decoder.decode(await read_frame(self._reader))
                if isinstance(message, Submit):
                    self._submit(message)
                elif (request_id := self._ids.get(message.stream)) is not None:
                    await self._engine.cancel(request_id, message.index)
        finally:
            for request_id in list(self._ids.values()):
                await self._engine.cancel(request_id)
            for task in list(self.streams.values()):
                task.cancel()

    def close(self) -> None:
        self._writer.close()

    def _submit(self, message: Submit) -> None:
        token = request_id.set(message.log_id)
        try:
            self._begin(message)
        finally:
            request_id.reset(token)

    def _begin(self, message: Submit) -> None:
        self._seen = message.stream
        try:
            stream = self._engine.generate(message.request)
        except Exception as error:
            self._send(Item(message.stream, [], self._told(error)))
            return
        self._ids[message.stream] = message.request.request_id
        task = asyncio.create_task(self._pump(message.stream, stream))
        self.streams[message.stream] = task
        task.add_done_callback(lambda _: self._forget(message.stream))

    def _forget(self, stream: int) -> None:
        del self.streams[stream], self._ids[stream]

    async def _pump(self, number: int, stream: AsyncIterator[list[Delta]]) -> None:
        try:
            async for deltas in stream:
                self._send(Item(number, deltas))
                await self._flowing.wait()
        except Exception as error:
            self._send(Item(number, [], self._told(error)))

    def _told(self, error: Exception) -> Failure:
        failure = Failure.of(error)
        if failure.kind == "internal":
            logger.error("a request failed", exc_info=error)
        return failure

    def _send(self, item: Item) -> None:
        """Streams that wake in the same turn of the loop (a step wakes all) share a frame."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(item)

    def _flush(self) -> None:
        items, self._outbox = self._outbox, []
        if self._writer.is_closing():
            return
        load = self._engine.load
        self._tell(items, load)
        for other in self._others:
            if not other.streams and other.misjudges(load):
                other._tell([], load)
        if self._flowing.is_set() and self._writer.transport.get_write_buffer_size() > _HIGH_WATER:
            self._flowing.clear()
            task = asyncio.create_task(self._resume())
            task.add_done_callback(lambda _: self._flowing.set())

    def misjudges(self, load: int) -> bool:
        """Whether what this ingress was told of the load last is far from what it is."""
        return abs(load - self._load) > max(SEQUENCE_TOKENS, load // 8)

    def _tell(self, items: list[Item], load: int) -> None:
        self._load = load
        if self._writer.is_closing():
            return
        body = self._encoder.encode(Told(items, load, self._engine.room, self._seen))
        if len(body) > wire.MAX_FRAME and len(items) > 1:  # of many prompts' log-probabilities
            half = len(items) // 2
            self._tell(items[:half], load)
            self._tell(items[half:], load)
        else:
            self._writer.write(frame(body))

    async def _resume(self) -> None:
        with contextlib.suppress(OSError):
            await self._writer.drain()


# --- the ingress's end ------------------------------------------------------------------------


class _Mailbox:
    """What arrived for one stream and has not been read."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, item: Item) -> None:
        self._deltas += item.deltas
        if item.failure is not None:
            self._error = item.failure.error()
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._arrived.set()

    async def take(self) -> list[Delta]:
        """All that arrived; waits for something. Raises the failure once the rest is read."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        deltas, self._deltas = self._deltas, []
        return deltas


class _Line:
    """One connection to the router, as long as it lasts."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.mailboxes: dict[int, _Mailbox] = {}
        #: What the router has to do, what is on the way to it included.
        self.load = 0
        #: Sequences that it would queue beside these; None: it has not said so yet.
        self.room: int | None = None
        # Streams that it did not count yet, with their weights and sequences.
        self._unseen: deque[tuple[int, int, int]] = deque()
        self._unseen_weight = self._unseen_sequences = 0
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._reading = asyncio.create_task(self._read(reader))

    @property
    def open(self) -> bool:
        return not self._writer.is_closing()

    def send(self, message: Submit | Cancel) -> None:
        if isinstance(message, Submit):
            asked = message.request
            known = asked.expected_hit if asked.source is None else len(asked.prompt)
            added = weight(max(0, len(asked.prompt) - known), asked.n)
            self._unseen.append((message.stream, added, asked.n))
            self._unseen_weight += added
            self._unseen_sequences += asked.n
            self.load += added
            if self.room is not None:
                self.room -= asked.n
        if self.open:
            self._writer.write(frame(self._encoder.encode(message)))

    def close(self) -> None:
        self._reading.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = msgspec.msgpack.Decoder(Told)
        try:
            while True:
                told = decoder.decode(await read_frame(reader))
                while self._unseen and self._unseen[0][0] <= told.seen:
                    _, counted, sequences = self._unseen.popleft()
                    self._unseen_weight -= counted
                    self._unseen_sequences -= sequences
                self.load = told.load + self._unseen_weight
                self.room = told.room - self._unseen_sequences
                for item in told.items:
                    mailbox = self.mailboxes.get(item.stream)
                    if mailbox is not None:
                        mailbox.put(item)
        except (OSError, asyncio.IncompleteReadError) as error:
            logger.warning("the connection to the router ended: %r", error)
        finally:
            self._writer.close()
            for mailbox in self.mailboxes.values():
                mailbox.fail(ReplicaLost("the connection to its router ended"))


class EngineLink:
    """An engine as its ingress sees it: an EngineClient. Belongs to one event loop.

    `find` says where its router listens now; it is asked again whenever the connection is gone, by
    the first request that needs it. What ran on a connection that ends, ends with ReplicaLost:
    replicas.py goes on with it.
    """

    def __init__(self, find: Callable[[], Awaitable[Endpoint]]) -> None:
        self._find = find
        self._line: _Line | None = None
        self._connecting: asyncio.Task[_Line] | None = None
        self._running: dict[str, tuple[_Line, int]] = {}  # by request id
        self._next = 0

    @property
    def load(self) -> int | None:
        """What the router has to do, as it said last; None while there is no connection."""
        return self._line.load if self._line is not None and self._line.open else None

    @property
    def room(self) -> int | None:
        """Sequences that the router would queue beside those it has, as it said last; None while
        that is not known."""
        return self._line.room if self._line is not None and self._line.open else None

    async def connect(self) -> None:
        """Return once there is a connection. Raises EngineFailed."""
        await self._connected()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """See EngineClient. Raises RequestRefused, QueueFull or EngineFailed."""
        line = await self._connected()
        self._next += 1
        number = self._next
        mailbox = line.mailboxes[number] = _Mailbox()
        self._running[request.request_id] = line, number
        left = request.n if request.resumed is None else len(request.resumed)
        try:
            line.send(Submit(number, request, request_id.get()))
            while left:
                deltas = await mailbox.take()
                left -= sum(delta.finish_reason is not None for delta in deltas)
                yield deltas
        except (RequestRefused, EngineFailed, InternalError):
            left = 0  # nothing runs any more
            raise
        finally:
            if left:
                line.send(Cancel(number, None))
            del line.mailboxes[number], self._running[request.request_id]

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences. Unknown or finished ones are ignored."""
        if request_id in self._running:
            line, number = self._running[request_id]
            line.send(Cancel(number, index))

    async def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        if self._line is not None:
            self._line.close()

    async def _connected(self) -> _Line:
        """The line; all who find it down wait for one attempt, and hear of its failure at once."""
        if self._line is not None and self._line.open:
            return self._line
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._attempted)
        return await asyncio.shield(self._connecting)

    def _attempted(self, attempt: asyncio.Task[_Line]) -> None:
        self._connecting = None
        if not attempt.cancelled() and attempt.exception() is None:
            self._line = attempt.result()

    async def _connect(self) -> _Line:
        try:
            endpoint = await asyncio.wait_for(self._find(), HANDSHAKE_SECONDS)
            reader, writer = await asyncio.wait_for(dial(endpoint), HANDSHAKE_SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            raise ReplicaLost(f"its router does not answer: {error!r}") from error
        return _Line(reader, writer)
