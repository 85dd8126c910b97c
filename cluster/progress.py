"""How far a batch is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def progress(total: int, doing: str = "Generating") -> Iterator[Callable[[], None]]:
    """A progress bar on stderr if that is a terminal and there is more than one thing to wait for;
    yields what to call when one is done."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=total < 2 or not console.is_terminal,
    ) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)
