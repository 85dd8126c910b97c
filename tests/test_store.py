"""The plan store: what goes in comes out, and nothing else ever does."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.plans import nonsense, request
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorray.builder.store import (
    BadEntry,
    DirectoryStore,
    PlanStore,
    RemoteStore,
    StoreError,
    decode,
    default_store,
    encode,
    open_store,
)

PLAN = nonsense(request())
ENTRY = encode(PLAN)


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PlanStore]:
    if request.param == "directory":
        yield open_store(str(tmp_path / "a" / "store"))
        return
    opened = open_store("memory://bucket/plans")
    yield opened
    assert isinstance(opened, RemoteStore)
    opened._fs.rm("/", recursive=True)


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryStore:
    opened = open_store(str(tmp_path / "store"))
    assert isinstance(opened, DirectoryStore)
    return opened


def entry_path(store: DirectoryStore) -> Path:
    return store.root / "plans" / f"{PLAN.key}.plan"


# --- in and out -------------------------------------------------------------------------------


def test_a_plan_comes_back_as_it_went_in(store: PlanStore) -> None:
    assert store.get(PLAN.key) is None
    assert not store.has_plans()
    store.put(PLAN)
    assert store.get(PLAN.key) == PLAN
    assert store.has_plans()
    assert open_store(store.url).get(PLAN.key) == PLAN
    assert store.get(request(16).key) is None


def test_a_later_entry_replaces_an_earlier_one(store: PlanStore) -> None:
    store.write(f"plans/{PLAN.key}.plan", b"something else")
    store.put(PLAN)
    assert store.get(PLAN.key) == PLAN


def test_checking_leaves_nothing_behind(store: PlanStore) -> None:
    store.check_writable()
    if isinstance(store, DirectoryStore):
        assert [path for path in store.root.rglob("*") if path.is_file()] == []
    else:
        assert isinstance(store, RemoteStore)
        assert store._fs.find("/") == []


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/plans")
    assert isinstance(store, DirectoryStore)
    store.put(PLAN)
    assert open_store(str(tmp_path / "plans")).get(PLAN.key) == PLAN


def test_the_default_is_the_environments_or_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TENSORRAY_STORE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_store() == "/somewhere/tensorray/plans"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_store() == str(Path.home() / ".cache/tensorray/plans")
    monkeypatch.setenv("TENSORRAY_STORE", "s3://bucket/plans")
    assert default_store() == "s3://bucket/plans"


# --- what is not trusted ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (b"", "not a plan of this store"),
        (b"ptrt\x00\x00\x00\x01 a plan of TensorRT's own", "not a plan of this store"),
        (ENTRY[:-1], "truncated or corrupt"),
        (ENTRY[: len(ENTRY) // 2], "truncated or corrupt"),
        (ENTRY[:40], "truncated or corrupt"),
        (ENTRY.replace(b"\r\n\n", b"\n\n"), "truncated or corrupt"),
        (ENTRY.replace(b"bfloat16", b"float32 ", 1), "truncated or corrupt"),
        (ENTRY.replace(b"plan 1\n", b"plan 2\n"), "schema 2; this version reads 1"),
        (encode(nonsense(request(16))), f"another key, {request(16).key}"),
    ],
    ids=["empty", "foreign", "cut", "half", "header", "text", "metadata", "newer", "misplaced"],
)
def test_a_bad_entry_counts_as_missing_and_says_why(
    store: PlanStore, entry: bytes, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.write(f"plans/{PLAN.key}.plan", entry)
    with caplog.at_level(logging.WARNING):
        assert store.get(PLAN.key) is None
    assert problem in caplog.text
    assert PLAN.key[:12] in caplog.text


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_change_to_an_entry_gets_through(data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(ENTRY) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
    if kind == "flip":
        flipped = ENTRY[position] ^ (1 << data.draw(st.integers(0, 7)))
        changed = ENTRY[:position] + bytes([flipped]) + ENTRY[position + 1 :]
    elif kind == "cut":
        changed = ENTRY[:position]
    elif kind == "insert":
        changed = ENTRY[:position] + b"\x00" + ENTRY[position:]
    else:
        changed = ENTRY[:position] + ENTRY[position + 1 :]
    with pytest.raises(BadEntry):
        decode(PLAN.key, changed)


# --- many at once -----------------------------------------------------------------------------


def test_readers_never_see_half_an_entry(directory: DirectoryStore) -> None:
    directory.put(PLAN)
    stop = threading.Event()
    seen: list[Any] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(decode(PLAN.key, directory.read(f"plans/{PLAN.key}.plan") or b""))

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 60
    written = 0
    while written < 100 or (len(seen) < 2 and time.monotonic() < deadline):
        directory.put(PLAN)
        written += 1
    stop.set()
    reader.join()
    assert len(seen) > 1
    assert all(plan == PLAN for plan in seen)


def test_a_key_is_claimed_once(directory: DirectoryStore) -> None:
    other = open_store(directory.url)
    claim = directory.claim(PLAN.key)
    assert claim is not None
    assert other.claim(PLAN.key) is None
    assert directory.claim(PLAN.key) is None
    elsewhere = other.claim(request(16).key)
    assert elsewhere is not None
    elsewhere.release()
    claim.release()
    again = other.claim(PLAN.key)
    assert again is not None
    again.release()


def test_a_claim_ends_with_the_process_that_holds_it(directory: DirectoryStore) -> None:
    hold = (
        "import sys, time; from tensorray.builder.store import open_store; "
        "claim = open_store(sys.argv[1]).claim(sys.argv[2]); print(claim is not None, flush=True); "
        "time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, directory.url, PLAN.key], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "True"
    assert directory.claim(PLAN.key) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    claim = directory.claim(PLAN.key)
    assert claim is not None
    claim.release()


def test_a_writer_that_dies_leaves_no_entry(directory: DirectoryStore) -> None:
    die = (
        "import os, sys; from helpers.plans import nonsense, request; "
        "from tensorray.builder.store import open_store; "
        "os.replace = lambda *_: os._exit(9); "
        "open_store(sys.argv[1]).put(nonsense(request()))"
    )
    tests = str(Path(__file__).parent)
    died = subprocess.run(
        [sys.executable, "-c", die, directory.url], env={**os.environ, "PYTHONPATH": tests}
    )
    assert died.returncode == 9
    assert directory.get(PLAN.key) is None
    left = list((directory.root / "plans").iterdir())
    assert [path.suffix for path in left] == [".tmp"]
    directory.check_writable()
    assert left[0].exists(), "its writer might be at work still"
    os.utime(left[0], (time.time() - 7200,) * 2)
    directory.check_writable()
    assert not left[0].exists()


# --- a store that can't be used ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EROFS, "read-only .*choose another one"),
        (errno.EACCES, "read-only .*choose another one"),
        (errno.ENOSPC, "full .*make room"),
        (errno.EDQUOT, "full .*make room"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_a_store_that_can_not_be_written_says_why(
    directory: DirectoryStore, code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    for attempt in (directory.check_writable, lambda: directory.put(PLAN)):
        with pytest.raises(StoreError, match=message) as raised:
            attempt()
        assert directory.url in str(raised.value)
    assert directory.get(PLAN.key) is None
    assert list((directory.root / "plans").iterdir()) == [], "no half-written file stays"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_write_permission(directory: DirectoryStore) -> None:
    directory.put(PLAN)
    (directory.root / "plans").chmod(0o500)
    with pytest.raises(StoreError, match="read-only"):
        directory.check_writable()
    assert directory.get(PLAN.key) == PLAN


def test_a_store_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        open_store(str(tmp_path / "file" / "store")).put(PLAN)


def test_an_unknown_kind_of_url() -> None:
    with pytest.raises(ValueError, match=r"nowhere://plans.*nowhere"):
        open_store("nowhere://plans")


def test_a_remote_store_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://bucket/plans")
    assert isinstance(store, RemoteStore)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("AccessDenied")

    monkeypatch.setattr(store._fs, "pipe_file", fail)
    monkeypatch.setattr(store._fs, "cat_file", fail)
    for attempt in (lambda: store.put(PLAN), lambda: store.get(PLAN.key), store.check_writable):
        with pytest.raises(StoreError, match=r"memory://bucket/plans.*AccessDenied"):
            attempt()
