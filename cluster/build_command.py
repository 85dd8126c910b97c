"""`tensorray build` at the terminal: progress on stderr, the summary on stdout."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from tensorray.builder.build import Outcome, PlanRequest, Progress
from tensorray.cluster.build import BuildReport, build_needs, examine, ray_cluster
from tensorray.cluster.build_config import BuildConfig
from tensorray.cluster.generate import results_on_stdout


def run(config: BuildConfig, *, as_json: bool) -> None:
    """Run the job, print what became of it; exit status 1 if a segment failed."""
    needs = examine(config)
    with results_on_stdout() as results:  # Ray prints to stdout when it loses a node
        with ray_cluster(), _stoppable(), _progress() as progress:
            report = build_needs(needs, progress=progress)
        if as_json:
            print(json.dumps(as_dict(report), indent=2), file=results)
        else:
            _print(report, config, Console(file=results, highlight=False))
    for failure in report.failures:
        print(f"Error: {failure}", file=sys.stderr)
    if report.failures:
        sys.exit(1)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Leave by way of all `finally` clauses when told to stop, as `ray job stop` does.

    Ray's own handler, which it installs as it connects, dumps a stack trace.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit:
        if stopped:  # out of a wait of Ray's it comes with another status
            sys.exit(143)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def as_dict(report: BuildReport) -> dict[str, Any]:
    """The report as JSON: every plan with its key, what became of it, and the manifest's place."""
    return {
        "store": report.store,
        "manifest": report.manifest,
        "seconds": round(report.seconds, 3),
        "plans": [
            {
                "segment": outcome.request.name,
                "target": outcome.request.target.architecture,
                "gpu": outcome.request.target.gpu,
                "flavour": outcome.request.target.flavour,
                "version": outcome.request.target.version,
                "key": outcome.request.key,
                "state": outcome.state,
                "seconds": round(outcome.seconds, 3),
                "bytes": outcome.bytes,
                "node": outcome.where or None,
                "error": outcome.error or None,
            }
            for outcome in report.outcomes
        ],
        "unknown": [
            {"target": architecture, "segments": list(report.segments), "reason": reason}
            for architecture, reason in report.unknown.items()
        ],
    }


def _print(report: BuildReport, config: BuildConfig, console: Console) -> None:
    table = Table(title=f"Plans of {config.model}, tp {config.tp}, pp {config.pp}")
    table.add_column("target")
    headers = ["segments", "reused", "missing" if config.dry_run else "compiled", "failed"]
    # Own kernels run what TensorRT has nothing for, which is rare.
    kernels = any(outcome.state == "kernels" for outcome in report.outcomes)
    headers += ["kernels"] if kernels else []
    for header in [*headers, "seconds", "MB"]:
        table.add_column(header, justify="right")
    groups: dict[str, list[Outcome]] = {}
    for outcome in report.outcomes:
        target = outcome.request.target
        name = f"{target.gpu or target.architecture}, {target.flavour}"
        groups.setdefault(name, []).append(outcome)
    for name, outcomes in groups.items():
        states = [outcome.state for outcome in outcomes]
        table.add_row(
            name,
            str(len(states)),
            str(states.count("reused")),
            str(states.count("missing") + states.count("compiled")),
            str(states.count("failed")),
            *([str(states.count("kernels"))] if kernels else []),
            f"{sum(outcome.seconds for outcome in outcomes):.1f}",
            f"{sum(outcome.bytes for outcome in outcomes) / 1e6:.1f}",
        )
    console.print(table)
    for outcome in report.outcomes:
        if outcome.state == "kernels":
            text = f"own kernels run {outcome.request}: {outcome.error}"
            console.print(text, markup=False, soft_wrap=True)
    if config.dry_run:
        for outcome in report.outcomes:
            if outcome.state == "missing":
                console.print(f"missing: {outcome.request}", markup=False)
    for reason in report.unknown.values():
        console.print(
            f"{len(report.segments)} segments, {reason}\nso what the store has of them can't be "
            "told from here",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"Store {report.store}, {report.seconds:.1f} s in all", soft_wrap=True)
    if report.manifest:
        console.print(f"Manifest {report.manifest}", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar a segment on a terminal, a line a segment elsewhere (a job's log)."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    with Bars(*columns, TextColumn("{task.fields[note]}"), console=console) as bars:
        yield _Rows(bars)


class _Lines(Progress):
    def __init__(self, console: Console) -> None:
        self._console = console

    def elsewhere(self, request: PlanRequest) -> None:
        self._say(f"{request}: another job is building it")

    def finished(self, outcome: Outcome) -> None:
        self._say(f"{outcome.request}: {_note(outcome)}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


class _Rows(Progress):
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._rows: dict[str, TaskID] = {}

    def building(self, request: PlanRequest) -> None:
        self._bars.update(self._row(request), note="building")

    def elsewhere(self, request: PlanRequest) -> None:
        self._bars.update(self._row(request), note="another job is building it")

    def finished(self, outcome: Outcome) -> None:
        row = self._row(outcome.request)
        self._bars.update(row, total=1, completed=1, note=_note(outcome))

    def _row(self, request: PlanRequest) -> TaskID:
        if request.key not in self._rows:
            row = self._bars.add_task(str(request), total=None, note="")
            self._rows[request.key] = row
        return self._rows[request.key]


def _note(outcome: Outcome) -> str:
    if outcome.state == "compiled":
        node = f" on {outcome.where}" if outcome.where else ""
        return f"{outcome.seconds:.1f} s, {outcome.bytes / 1e6:.2f} MB{node}"
    return "for own kernels" if outcome.state == "kernels" else outcome.state
