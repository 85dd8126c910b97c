"""`tensorray convert` at the terminal: the mapping, tensor by tensor, then the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tensorray.builder.checkpoint.convert import Plan, plan, refuse_existing, write
from tensorray.builder.checkpoint.mapping import Target


def run(
    source: Path,
    target: Path,
    *,
    config: Path | None,
    vocab_size: int | None,
    shard_bytes: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Show the mapping, and write unless `dry_run`. Raises CheckpointError for bad sources."""
    if not dry_run:
        refuse_existing(target)
    job = plan(source, config=config, vocab_size=vocab_size)
    if as_json:
        print(json.dumps(as_dict(job, target, dry_run=dry_run), indent=2))
    else:
        _print(job)
    if not dry_run:
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            row = bar.add_task("writing", total=job.nbytes)

            def done(tensor: Target) -> None:
                bar.update(row, advance=tensor.nbytes)

            write(job, target, shard_bytes=shard_bytes, progress=done)
        if not as_json:
            print(f"Written to {target}; serve it with: tensorray serve {target}")


def as_dict(job: Plan, target: Path, *, dry_run: bool) -> dict[str, Any]:
    """The plan as JSON."""
    return {
        "source": str(job.source),
        "kind": job.kind,
        "target": None if dry_run else str(target),
        "bytes": job.nbytes,
        "tensors": [
            {
                "source": each.source.label,
                "source_shape": list(each.source.shape),
                "target": each.name,
                "target_shape": list(each.shape),
                "dtype": str(each.dtype),
                "how": each.note or None,
            }
            for each in job.conversion.targets.values()
        ],
        "ignored": job.conversion.ignored,
        "config": job.conversion.config,
        "files": sorted(job.copied),
        "notes": job.conversion.notes,
    }


def _print(job: Plan) -> None:
    # As wide as it takes: a log or a pipe must not cut names.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    table = Table(title=f"{job.source}: {job.kind}")
    for header in ("source", "shape", "dtype", "target", "shape", "how"):
        table.add_column(header, overflow="fold")
    before = None
    for each in job.conversion.targets.values():
        same = each.source.label == before
        before = each.source.label
        table.add_row(
            "" if same else before,
            "" if same else _shape(each.source.shape),
            str(each.dtype),
            each.name,
            _shape(each.shape),
            each.note,
        )
    console.print(table, markup=False)
    for name in job.conversion.ignored:
        console.print(f"not needed: {name}", markup=False, soft_wrap=True)
    for name in sorted(job.copied):
        console.print(f"copied: {name}", markup=False, soft_wrap=True)
    for note in job.conversion.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    count = len(job.conversion.targets)
    architecture = ", ".join(job.conversion.config.get("architectures") or [])
    console.print(f"{count} tensors, {job.nbytes / 1e6:.1f} MB, {architecture}", soft_wrap=True)


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
