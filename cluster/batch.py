"""`tensorray batch`: a file of requests in, a file of answers out, in OpenAI's batch format.

A line of the input is one request, as `{"custom_id": ..., "method": "POST", "url":
"/v1/chat/completions", "body": {...}}`; the output has one line for each, in the same order, with
the HTTP answer a server would have given, or an error where the line is no request at all. What is
in the output is done, so a run that was killed goes on where it ended.

https://platform.openai.com/docs/api-reference/batch/request-input
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from starlette.types import ASGIApp, Message

from tensorray.cluster.backend import EngineStatus
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.frontend import EngineClient
from tensorray.cluster.request import Delta, GenerationRequest
from tensorray.cluster.usage_error import UsageError

URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
)

_LOG_SECONDS = 10.0  # between lines of progress


class BatchFailed(RuntimeError):
    """The engine failed; what is in the output stays, and the same command goes on from there."""


@dataclass(frozen=True)
class Line:
    """One line of the input: a request (`url`, `body`), or why it is none (`error`)."""

    custom_id: str | None
    url: str = ""
    body: bytes = b""
    error: tuple[str, str] | None = None  # code and message


def run(config: EngineConfig, source: str, target: str) -> None:
    """Answer every line of `source` in `target`, on a model in this process.

    Raises UsageError for files that don't go together and BatchFailed for an engine that fails;
    loading's errors as `LLM`.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise UsageError("the output would overwrite the input; name another file")
    lines = list(read(Path(source)))
    with _opened(Path(target)) as output:
        done = resume(lines, output, target)
        if done == len(lines):
            Console(stderr=True).print(f"All {done} lines are in {target} already")
            return
        from tensorray.cluster.ingress import create_app
        from tensorray.cluster.llm import LLM

        with _quiet(), LLM(**dict(config)) as llm:
            unguarded = {name: None for name in EngineConfig.model_fields if "api_key" in name}
            here = llm.config.model_copy(update={**unguarded, "api_key": []})
            app = create_app(llm.frontend, _Backend(llm.client), here, llm.fleet)
            llm.run(answer(app, lines, output, done, window=4 * config.max_num_seqs))


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about requests: their answers say it as well."""
    log = logging.getLogger("ray.serve")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def read(path: Path) -> Iterator[Line]:
    """The input's lines; blank ones are none."""
    known: set[str] = set()
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                line = _parse(text, number, known)
                if line.custom_id is not None:
                    known.add(line.custom_id)
                yield line


def _parse(text: bytes, number: int, known: set[str]) -> Line:
    def bad(code: str, message: str, custom_id: str | None = None) -> Line:
        return Line(custom_id, error=(code, f"line {number}: {message}"))

    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        return bad("invalid_json_line", f"not JSON: {error}")
    if not isinstance(data, dict):
        return bad("invalid_json_line", "a request is a JSON object")
    name = data.get("custom_id")
    if not isinstance(name, str) or not name:
        return bad("missing_custom_id", "custom_id must be a string that no other line has")
    if name in known:
        return bad("duplicate_custom_id", f"another line has custom_id {name!r} already", name)
    if data.get("method", "POST") != "POST":
        return bad("invalid_method", "method must be POST", name)
    url, body = data.get("url"), data.get("body")
    if url not in URLS:
        return bad("invalid_url", f"url must be {' or '.join(URLS)} (got {url!r})", name)
    if not isinstance(body, dict):
        return bad("invalid_body", "body must be the request, a JSON object", name)
    if body.get("stream"):
        return bad("stream_not_supported", "an answer in a file can't be streamed", name)
    return Line(name, url, json.dumps(body).encode())


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    file = path.open("ab+")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another batch is writing {path}; wait for it or stop it") from None
        yield file
    finally:
        with suppress(OSError):  # every line was flushed: what could not be written was told
            file.close()


def resume(lines: Sequence[Line], output: BinaryIO, name: str) -> int:
    """How many lines have their answer in the output; what a kill has left of the next is cut off.

    Raises UsageError if the answers are to another input.
    """
    output.seek(0)
    done = whole = 0
    for text in output:
        if not text.endswith(b"\n"):
            break
        try:
            answered = json.loads(text)["custom_id"]
        except (ValueError, TypeError, KeyError):
            answered = ...
        if done == len(lines) or answered != lines[done].custom_id:
            raise UsageError(
                f"{name}: line {done + 1} answers another input; name another output, or remove it"
            )
        done += 1
        whole += len(text)
    output.truncate(whole)
    return done


async def answer(
    app: ASGIApp, lines: Sequence[Line], output: BinaryIO, done: int, *, window: int
) -> None:
    """Append the answers to `lines[done:]` in order, each as soon as those before it are there.

    At most `window` lines are in work or wait for an earlier one.
    """
    pending: deque[asyncio.Task[dict[str, Any]]] = deque()
    waiting = iter(lines[done:])
    tell = _progress(len(lines), done)
    failed = 0
    try:
        while True:
            while len(pending) < window and (line := next(waiting, None)) is not None:
                pending.append(asyncio.ensure_future(_answer(app, line)))
            if not pending:
                break
            result = await pending.popleft()
            try:
                output.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
                output.flush()
            except OSError as error:
                raise BatchFailed(
                    f"{output.name} can't be written ({error.strerror}); make room. The same "
                    "command goes on from here."
                ) from error
            done += 1
            failed += result["error"] is not None or result["response"]["status_code"] != 200
            tell(done, failed)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _answer(app: ASGIApp, line: Line) -> dict[str, Any]:
    name = uuid.uuid4().hex
    result: dict[str, Any] = {
        "id": f"batch_req_{name}",
        "custom_id": line.custom_id,
        "response": None,
        "error": None,
    }
    if line.error is not None:
        code, message = line.error
        return {**result, "error": {"code": code, "message": message}}
    status, body = await call(app, line.url, line.body)
    content = json.loads(body)
    if status in (429, 503):  # not the line's fault
        raise BatchFailed(f"{content['error']['message']} The same command goes on from here.")
    return {**result, "response": {"status_code": status, "request_id": name, "body": content}}


async def call(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """POST to an ASGI application in this process: the answer's status and body."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status = 500
    parts: list[bytes] = []

    async def receive() -> Message:
        if requests:
            return requests.pop()
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never  # nobody hangs up

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)


class _Backend:
    """An engine in this process as the API wants it: a Backend."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        return self._client.generate(request)

    async def cancel(self, request_id: str, index: int | None = None) -> None:
        await self._client.cancel(request_id, index)

    async def failure(self) -> str | None:
        """Why the engine can't serve: asked when a generation fails, which is its doing."""
        return "the engine failed during this batch."

    async def metrics(self) -> bytes:
        return b""

    async def status(self) -> list[EngineStatus]:
        return []


def _progress(total: int, done: int) -> Callable[[int, int], None]:
    """What to call with how many lines are done, and how many of them went wrong since the start:
    one line on a terminal, a line now and then in a job's log."""
    console = Console(stderr=True, highlight=False)
    began = last = time.monotonic()
    before = done

    def tell(done: int, failed: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < (0.2 if console.is_terminal else _LOG_SECONDS):
            return
        last = now
        text = f"{done} of {total} lines, {(done - before) / max(now - began, 1e-3):.1f} a second"
        text += f", {failed} with errors" if failed else ""
        console.print(text, end="\r" if console.is_terminal and done < total else "\n")

    return tell
