"""One TCP connection between the router and a shard: length-prefixed msgpack both ways.

A plain connection costs 0.1 ms a step for two shards where an actor call costs 1.2 ms, and its
end-of-file tells of a killed peer within milliseconds. The router proves itself with a secret it
got from the shard through Ray; nothing is unpickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import socket
import threading
from functools import partial

import msgspec

from tensorray.actors import wire
from tensorray.actors.communicator import CommunicatorError
from tensorray.actors.link import PendingStep, ShardError, StepExecutor
from tensorray.actors.protocol import ShardInfo, StepPlan, StepResult
from tensorray.actors.wire import (
    HANDSHAKE_SECONDS,
    LENGTH,
    SECRET_BYTES,
    Endpoint,
    check_length,
    dial,
    frame,
    read_frame,
)

logger = logging.getLogger(__name__)


TOO_MANY_LOGPROBS = (
    "a step's log-probabilities are too many to be sent: ask for fewer alternatives with logprobs "
    "or prompt_logprobs"
)


class StepFailed(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """The step raised; the shard's state is not to be trusted any more.

    `by_peer` says that it failed because another shard of the replica did.
    """

    error: str
    by_peer: bool = False


class StepDone(msgspec.Struct, frozen=True, tag=True):
    result: StepResult


class LostPeer(ShardError):
    """A shard whose step failed because another one did."""


_Answer = StepFailed | StepDone

# A step that was started; None: no more will come.
_Started = queue.SimpleQueue[tuple[int, PendingStep] | None]


class ShardServer:
    """Serves one executor to one router at a time, on two threads.

    One starts steps as their plans come, the other waits for them and answers, so that a step is
    started while its predecessor runs.

    When the router's connection ends the executor is reset and the next router is awaited.
    """

    def __init__(self, executor: StepExecutor, host: str = "127.0.0.1") -> None:
        self._executor = executor
        self._listener = socket.create_server((host, 0))
        self.endpoint = Endpoint.new(host, self._listener.getsockname()[1])
        self._connection: socket.socket | None = None
        self._settled = threading.Event()
        self._settled.set()
        self._thread = threading.Thread(target=self._serve, name="shard-link", daemon=True)
        self._thread.start()

    @property
    def has_router(self) -> bool:
        return self._connection is not None

    def settled(self, timeout: float) -> bool:
        """Whether within `timeout` seconds no step of a router that is gone runs any more."""
        return self._settled.wait(timeout)

    def close(self) -> None:
        # shutdown(), unlike close(), wakes a thread blocked in accept() or recv().
        for sock in (self._listener, self._connection):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()
        self._thread.join(timeout=10)
        self._executor.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return  # closed
            self._settled.clear()
            self._connection = connection
            try:
                with connection:
                    self._serve_router(connection, peer)
            except OSError as error:
                logger.info("router %s is gone: %s", peer, error)
            finally:
                self._connection = None
                self._executor.reset()
                self._settled.set()

    def _serve_router(self, connection: socket.socket, peer: object) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(HANDSHAKE_SECONDS)
        if not self.endpoint.admits(_read(connection, SECRET_BYTES)):
            logger.warning("refused a connection from %s: wrong secret", peer)
            return
        connection.settimeout(None)
        connection.sendall(frame(msgspec.msgpack.encode(self._executor.info)))
        started: _Started = queue.SimpleQueue()
        answering = threading.Thread(
            target=_answer,
            args=(connection, started, self._executor.info.answers),
            name="shard-answers",
            daemon=True,
        )
        answering.start()
        decoder = msgspec.msgpack.Decoder(StepPlan)
        try:
            while True:
                (length,) = LENGTH.unpack(_read(connection, LENGTH.size))
                plan = decoder.decode(_read(connection, check_length(length)))
                started.put((plan.step, self._start(plan)))
        finally:
            self._executor.interrupt("its router is gone")
            started.put(None)
            answering.join()

    def _start(self, plan: StepPlan) -> PendingStep:
        try:
            return self._executor.submit(plan)
        except Exception as error:
            # Answered in its turn, after the steps before it.
            return partial(_raise, error)


def _raise(error: Exception) -> StepResult:
    raise error


def _answer(connection: socket.socket, started: _Started, results: bool) -> None:
    """Send each step's result when it is there; the first that failed ends the connection.

    Without `results` only that failure is sent.
    """
    encoder = msgspec.msgpack.Encoder()
    try:
        while (item := started.get()) is not None:
            step, pending = item
            answer: _Answer
            try:
                answer = StepDone(pending())
            except Exception as error:
                logger.exception("step %d failed", step)
                by_peer = isinstance(error, CommunicatorError)
                answer = StepFailed(f"{type(error).__name__}: {error}", by_peer)
            if results or isinstance(answer, StepFailed):
                body = encoder.encode(answer)
                if len(body) > wire.MAX_FRAME and isinstance(answer, StepDone):
                    body = encoder.encode(StepDone(_without_logprobs(answer.result)))
                connection.sendall(frame(body))
            if isinstance(answer, StepFailed):
                break
    except OSError as error:
        logger.info("the router is gone: %s", error)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads plans


def _without_logprobs(result: StepResult) -> StepResult:
    """The result without the sequences whose log-probabilities no frame has room for."""
    unsent = {*result.logprobs, *result.prompt_logprobs, *result.further_logprobs}
    kept = [index for index, seq in enumerate(result.seqs) if seq not in unsent]
    return msgspec.structs.replace(
        result,
        seqs=[result.seqs[index] for index in kept],
        tokens=[result.tokens[index] for index in kept],
        logprobs={},
        prompt_logprobs={},
        further_logprobs={},
        failed={**result.failed, **dict.fromkeys(sorted(unsent), TOO_MANY_LOGPROBS)},
    )


class TcpLink:
    """The router's end."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, info: ShardInfo
    ) -> None:
        self.info = info
        self._reader = reader
        self._writer = writer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[_Answer] = msgspec.msgpack.Decoder(_Answer)

    @classmethod
    async def connect(cls, endpoint: Endpoint) -> TcpLink:
        """Connect and wait for the shard's info. Raises ShardError when it does not answer."""
        try:
            reader, writer, info = await asyncio.wait_for(_open(endpoint), HANDSHAKE_SECONDS)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            raise ShardError(
                f"no shard answers at {endpoint.host}:{endpoint.port}: {error!r}"
            ) from error
        return cls(reader, writer, info)

    def send(self, plan: StepPlan) -> None:
        self.send_frame(frame(self._encoder.encode(plan)))

    def send_frame(self, data: bytes) -> None:
        """Send a plan that is encoded already. Raises ShardError."""
        if self._writer.is_closing():
            raise ShardError("the shard's connection is closed")
        self._writer.write(data)

    async def receive(self) -> StepResult:
        try:
            answer = self._decoder.decode(await read_frame(self._reader))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ShardError(f"the shard's connection ended: {error!r}") from error
        if isinstance(answer, StepFailed):
            raise (LostPeer if answer.by_peer else ShardError)(answer.error)
        return answer.result

    async def check(self) -> None:
        if isinstance(error := self._reader.exception(), ShardError):
            raise error
        if error is not None:
            raise ShardError(f"the shard's connection ended: {error}") from error
        if self._reader.at_eof():
            raise ShardError("the shard's connection ended")

    def fail(self, error: ShardError) -> None:
        """End the wait for a result with this error."""
        self._reader.set_exception(error)

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def _open(
    endpoint: Endpoint,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, ShardInfo]:
    reader, writer = await dial(endpoint)
    return reader, writer, msgspec.msgpack.decode(await read_frame(reader), type=ShardInfo)


def _read(connection: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        got = connection.recv_into(view)
        if got == 0:
            raise ConnectionError("end of file")
        view = view[got:]
    return bytes(buffer)
