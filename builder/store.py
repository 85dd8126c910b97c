"""The plan store: compiled segments by their keys, in a directory or behind any fsspec URL.

An entry is one file: a line that says what it is and in which format, the SHA-256 of the rest, a
line of JSON about the plan, and the plan's bytes. It is written whole or not at all, and what is
read is checked: an entry that is truncated, corrupt or not ours counts as missing, so it is built
again and replaced. A plan's key is a digest of all it depends on, so deleting one is always safe.

Builders that share a directory claim a key before they build it, so that no plan is built twice
at the same time. (On a network file system that takes one where flock works between machines.)
Behind other URLs there are no claims: two builders may do the same work, and the later one's entry
replaces one that serves as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import fsspec  # type: ignore[import-untyped]
import msgspec

from tensorray.builder.plan import Plan

logger = logging.getLogger(__name__)

MAGIC = b"tensorray plan"
#: Version of the entry format; an entry of another is not read.
SCHEMA = 1

#: Directory or URL of the store when none is given.
STORE_VARIABLE = "TENSORRAY_STORE"

#: Seconds after which a temporary file can't be in use: its writer died.
_STALE = 3600.0
_PROBE = "plans/writable"


class StoreError(RuntimeError):
    """The store can't be read or written; the message says why and what to change."""


class BadEntry(ValueError):
    """Bytes that are not the plan they should be."""


def default_store() -> str:
    """`$TENSORRAY_STORE`, or a directory in the user's cache."""
    if given := os.environ.get(STORE_VARIABLE):
        return given
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(cache) / "tensorray" / "plans")


def open_store(url: str | None = None) -> PlanStore:
    """The store in a directory (made at the first write) or at an fsspec URL ("s3://bucket/plans").

    None is `default_store()`. Raises ValueError for a URL that nothing here can open.
    """
    url = url or default_store()
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # ImportError names the package that is missing
        raise ValueError(f"store {url}: {error}") from error
    except Exception as error:  # each file system's own kind: credentials, addresses
        raise StoreError(f"store {url}: cannot be opened: {error!r}") from error
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        return DirectoryStore(Path(path))
    return RemoteStore(url, fs, path)


def encode(plan: Plan) -> bytes:
    """A plan as an entry."""
    about = msgspec.to_builtins(dataclasses.replace(plan, data=b""))
    del about["data"]
    body = json.dumps(about, sort_keys=True).encode() + b"\n" + plan.data
    return b"%s %d\n%s\n%s" % (MAGIC, SCHEMA, _digest(body), body)


def decode(key: str, entry: bytes) -> Plan:
    """The plan an entry holds; raises BadEntry unless it is whole and the one of that key."""
    first, _, rest = entry.partition(b"\n")
    if not first.startswith(MAGIC + b" "):
        raise BadEntry("not a plan of this store")
    schema = first[len(MAGIC) :].strip().decode(errors="replace")
    if schema != str(SCHEMA):
        raise BadEntry(f"an entry of schema {schema}; this version reads {SCHEMA}")
    digest, _, body = rest.partition(b"\n")
    if _digest(body) != digest:
        raise BadEntry("truncated or corrupt: its checksum is another")
    about, _, data = body.partition(b"\n")
    try:
        plan = msgspec.convert({**json.loads(about), "data": data}, Plan)
    except (ValueError, TypeError) as error:  # msgspec's errors are ValueErrors
        raise BadEntry(f"its header cannot be read: {error}") from error
    if plan.key != key:
        raise BadEntry(f"it holds the plan of another key, {plan.key}")
    return plan


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


class Claim:
    """The right to build one key. Ends with `release`, or with the process that holds it."""

    def release(self) -> None:
        """Let others build the key."""


class PlanStore(ABC):
    """Plans by key, and manifests by name."""

    def __init__(self, url: str) -> None:
        #: Where it is, as a user would name it.
        self.url = url
        self._distrusted: set[str] = set()

    def get(self, key: str) -> Plan | None:
        """The plan of a key; None if there is none that can be trusted, which is logged."""
        entry = self.read(_plan_name(key))
        if entry is None:
            return None
        try:
            return decode(key, entry)
        except BadEntry as error:
            if key not in self._distrusted:  # said once, however often it is looked for
                self._distrusted.add(key)
                logger.warning(
                    "plan %s in %s is not used, but built again: %s", key[:12], self.url, error
                )
            return None

    def put(self, plan: Plan) -> None:
        """Store a plan under its key, in place of what may be there."""
        self.write(_plan_name(plan.key), encode(plan))

    def locate(self, name: str) -> str:
        """Where a name of the store is, as a user would name it."""
        return f"{self.url.rstrip('/')}/{name}"

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """What is stored under a name ("plans/….plan"); None if nothing is."""

    @abstractmethod
    def has_plans(self) -> bool:
        """Whether there is any plan, of whatever key."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Store under a name: readers see all of it, or what was there before."""

    @abstractmethod
    def claim(self, key: str) -> Claim | None:
        """Claim a key that is to be built; None while somebody else holds it."""

    @abstractmethod
    def check_writable(self) -> None:
        """Raise StoreError if nothing can be written, before any work is done for it."""


class DirectoryStore(PlanStore):
    """A directory, on this machine or shared between machines."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(
                f"store {self.url}: {name} cannot be read: {error.strerror}"
            ) from error

    def has_plans(self) -> bool:
        return any(self.root.glob("plans/*.plan"))

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        with self._clear_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # else a crash could leave the name without the bytes
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise

    def claim(self, key: str) -> Claim | None:
        path = self.root / "locks" / f"{key}.lock"
        with self._clear_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            # The operating system lets go of the lock when its holder dies, so none goes stale.
            lock = filelock.FileLock(path, thread_local=False)
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                return None
        return _LockClaim(lock)

    def check_writable(self) -> None:
        self._sweep()
        self.write(_PROBE, b"")
        with self._clear_errors():
            (self.root / _PROBE).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete the temporary files of writers that died."""
        for path in self.root.glob("*/.*.tmp"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - _STALE:
                    path.unlink()

    @contextlib.contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                problem = f"read-only ({error.strerror}); choose another one, or build as its owner"
            elif error.errno in (errno.ENOSPC, errno.EDQUOT):
                problem = f"full ({error.strerror}); make room, or choose another one"
            else:
                problem = f"cannot be written: {error}"
            raise StoreError(f"store {self.url}: {problem}") from error


class _LockClaim(Claim):
    def __init__(self, lock: filelock.BaseFileLock) -> None:
        self._lock = lock

    def release(self) -> None:
        self._lock.release()


class RemoteStore(PlanStore):
    """Files behind an fsspec URL: an object store, where one put is atomic."""

    def __init__(self, url: str, fs: Any, path: str) -> None:
        super().__init__(url)
        self._fs = fs
        self._path = path.rstrip("/")

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(f"{self._path}/{name}"))
        except FileNotFoundError:
            return None
        except Exception as error:  # each file system's own kind
            raise StoreError(f"store {self.url}: {name} cannot be read: {error!r}") from error

    def has_plans(self) -> bool:
        try:
            return bool(self._fs.glob(f"{self._path}/plans/*.plan"))
        except Exception as error:
            raise StoreError(f"store {self.url}: cannot be listed: {error!r}") from error

    def write(self, name: str, data: bytes) -> None:
        path = f"{self._path}/{name}"
        try:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)
        except Exception as error:
            raise StoreError(f"store {self.url}: cannot be written: {error!r}") from error

    def claim(self, key: str) -> Claim | None:
        return Claim()

    def check_writable(self) -> None:
        self.write(_PROBE, b"")
        with contextlib.suppress(FileNotFoundError):  # somebody else's check took it away
            self._fs.rm_file(f"{self._path}/{_PROBE}")


def _plan_name(key: str) -> str:
    return f"plans/{key}.plan"
