"""The threads kernels run on: the C kernels' own pool, and Python threads for what NumPy does."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import threadpoolctl  # type: ignore[import-untyped]

from tensorray.kernels import native

_helpers: ThreadPoolExecutor | None = None
_threads = 1


def set_num_threads(threads: int | None = None) -> None:
    """Run this process's kernels on so many threads (None: one a core); until then, on one.

    Idle threads sleep. BLAS is set to one thread: its products are shared out here, because its
    own threads wait for one another by spinning, which costs a multiple wherever a core has other
    work too. Raises ValueError unless threads is at least 1.
    """
    global _helpers, _threads
    if threads is None:
        threads = cores()
    if threads < 1:
        raise ValueError(f"num_threads must be at least 1, not {threads}")
    if native.library is not None:
        native.library.set_num_threads(threads)
    threadpoolctl.threadpool_limits(limits=1, user_api="blas")
    if _helpers is not None:
        _helpers.shutdown(wait=False)
    _helpers = ThreadPoolExecutor(threads - 1, "kernels") if threads > 1 else None
    _threads = threads


def num_threads() -> int:
    """How many threads kernels run on."""
    return _threads


def on_all_threads(work: Callable[[], None]) -> None:
    """Call `work`, which does pieces of a job until none are left, on every thread at once.

    A thread that is late is not waited for: by then the others have done its share.
    """
    helpers = _helpers
    futures = [helpers.submit(work) for _ in range(_threads - 1)] if helpers is not None else []
    work()
    for future in futures:
        if not future.cancel():
            future.result()


def cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
