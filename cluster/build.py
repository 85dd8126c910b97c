"""Building a deployment's plans ahead of time: `tensorray build`, or `build(...)` from Python.

    from tensorray.cluster.build import build

    report = build(model="meta-llama/Llama-3.1-8B", tp=8, dtype="bfloat16", target="sm_90,sm_120")

The driver reads the config, works out the segments, and is alone in touching the store; the
cluster's nodes compile. So neither the model nor the store has to be reachable from the nodes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from tensorray.actors.build_job import RayWorkers, survey_nodes
from tensorray.builder.build import (
    Compile,
    NamedSegment,
    Outcome,
    PlanRequest,
    Progress,
    compile_plan,
    fill,
    find_segments,
    look_up,
)
from tensorray.builder.checkpoint import open_checkpoint, open_files
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.open import ModelFiles
from tensorray.builder.graph import DTypes
from tensorray.builder.manifest import (
    Manifest,
    ManifestError,
    NewerManifestError,
    PlannedCheckpoint,
    PlannedSegment,
    PlannedTarget,
    config_digest,
    read_manifest,
)
from tensorray.builder.plan import Profile, ProfileSet, default_profiles
from tensorray.builder.precision import choose_dtypes
from tensorray.builder.registry import resolve
from tensorray.builder.store import PlanStore, open_store
from tensorray.builder.tensorrt_flavour import Target, TargetError
from tensorray.cluster.build_config import BuildConfig
from tensorray.cluster.connect import connect


@dataclass(frozen=True)
class BuildReport:
    """What a job found and did."""

    outcomes: list[Outcome]
    seconds: float
    store: str
    manifest: str | None  # where it is; None while any plan is missing
    #: Of a dry run: architectures whose plans can't be looked up from here, each with the reason.
    unknown: dict[str, str] = field(default_factory=dict)
    segments: tuple[str, ...] = ()  # the names of all distinct ones

    @property
    def failures(self) -> list[str]:
        return [outcome.error for outcome in self.outcomes if outcome.state == "failed"]


def build(
    config: BuildConfig | None = None,
    *,
    progress: Progress | None = None,
    compile: Compile = compile_plan,
    **settings: Any,
) -> BuildReport:
    """Have every plan of a deployment in the store; the report says what became of each.

    `settings` are BuildConfig's fields, or give a whole `config`. Runs on the Ray cluster this
    process is connected to, or RAY_ADDRESS names ("auto": the one this machine is in); else on one
    that it starts here and stops again. `compile` replaces what a task runs to build one plan
    (`builder.build.compile_plan`).

    Raises ValueError (pydantic's ValidationError, CheckpointError, ModelConfigError, TargetError,
    ManifestError) when what is asked for can't be built, before anything is; StoreError when the
    store fails. A segment that TensorRT rejects is in the report.
    """
    needs = examine(BuildConfig(**settings) if config is None else config)
    with ray_cluster():
        return build_needs(needs, progress=progress, compile=compile)


@dataclass(frozen=True)
class Needs:
    """What a job is about, as far as the config tells: everything but the targets' details."""

    config: BuildConfig
    files: ModelFiles
    segments: list[NamedSegment]
    dtypes: DTypes
    store: PlanStore


def examine(config: BuildConfig) -> Needs:
    """The first half of `build`, which needs no cluster; raises its ValueErrors."""
    files = _open(config)
    definition = resolve(files.config, config.model_class)
    segments = find_segments(definition, files.config, tp_size=config.tp, pp_size=config.pp)
    dtypes = choose_dtypes(
        files.config,
        model=config.model,
        wide_residual=definition.wide_residual,
        dtype=config.dtype,
        residual=config.residual_dtype,
    )
    return Needs(config, files, segments, dtypes, open_store(config.store))


def build_needs(
    needs: Needs, *, progress: Progress | None = None, compile: Compile = compile_plan
) -> BuildReport:
    """The second half of `build`, on the Ray cluster this process is connected to."""
    started = time.perf_counter()
    config, store, dtypes = needs.config, needs.store, needs.dtypes
    names = list(dict.fromkeys((dtypes.compute, dtypes.residual)))
    survey = survey_nodes(config.target, names, config.flavour)
    if survey.lacking and not config.dry_run:
        raise TargetError("\n".join(survey.lacking.values()))
    sites = survey.sites
    profiles = {each.target: _profiles(config, each.target) for each in sites}
    requests = [
        PlanRequest(each.name, each.segment, dtypes, profiles[target], target)
        for target in profiles
        for each in needs.segments
    ]
    manifest = _manifest(needs, profiles, requests)
    _refuse_newer(manifest, store)
    if config.dry_run:
        outcomes = look_up(requests, store)
    else:
        outcomes = fill(requests, store, RayWorkers(sites, compile), progress)
    where = None
    states = {outcome.state for outcome in outcomes}
    if states <= {"reused", "compiled", "kernels"} and not survey.lacking:
        by_kernels = [each.request.key for each in outcomes if each.state == "kernels"]
        manifest = replace(manifest, kernels=tuple(by_kernels))
        if not config.dry_run:
            store.write(manifest.name, manifest.to_json())
        where = store.locate(manifest.name)
    seconds = time.perf_counter() - started
    segments = tuple(each.name for each in needs.segments)
    return BuildReport(outcomes, seconds, store.url, where, survey.lacking, segments)


@contextmanager
def ray_cluster() -> Iterator[None]:
    """A connection to the Ray cluster that is named, or to one of our own; ended if made here."""
    connected = ray.is_initialized()
    connect(logging_level=logging.ERROR)
    try:
        yield
    finally:
        if not connected:
            ray.shutdown()


def _open(config: BuildConfig) -> ModelFiles:
    """The model's config. Of a local model the weights' headers are checked too, unless only a
    config is asked for: plans for a checkpoint that can't be served would be for nothing."""
    files = open_files(
        config.model,
        revision=config.revision,
        token=config.hf_token,
        cache_dir=config.download_dir,
        offline=config.offline,
        hf_overrides=config.hf_overrides,
    )
    if not config.config_only and Path(config.model).expanduser().is_dir():
        try:
            open_checkpoint(config.model, hf_overrides=config.hf_overrides).close()
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} (plans need no weights: with --config-only, {files.path}/config.json "
                "is enough)"
            ) from error
    return files


def _profiles(config: BuildConfig, target: Target) -> ProfileSet:
    if not config.profiles:
        return default_profiles(
            target, max_decode=config.max_num_seqs, max_rows=config.max_num_batched_tokens
        )
    return ProfileSet(tuple(Profile(*map(int, text.split(":"))) for text in config.profiles))


def _manifest(
    needs: Needs, profiles: dict[Target, ProfileSet], requests: list[PlanRequest]
) -> Manifest:
    config, files = needs.config, needs.files
    # A Hub model lies in …/snapshots/<commit>.
    commit = files.path.name if files.path.parent.name == "snapshots" else None
    keys = {(request.segment, request.target): request.key for request in requests}
    return Manifest(
        checkpoint=PlannedCheckpoint(
            model=config.model,
            revision=commit,
            architecture=", ".join(files.config.get("architectures") or []),
            config_sha256=config_digest(files.config),
        ),
        tp_size=config.tp,
        pp_size=config.pp,
        dtypes=needs.dtypes,
        targets=tuple(PlannedTarget(target, each) for target, each in profiles.items()),
        segments=tuple(
            PlannedSegment(
                each.name,
                each.segment.digest(),
                tuple(keys[each.segment, target] for target in profiles),
            )
            for each in needs.segments
        ),
    )


def _refuse_newer(manifest: Manifest, store: PlanStore) -> None:
    """Leave a later version's manifest of the same plans alone."""
    there = store.read(manifest.name)
    try:
        if there is not None:
            read_manifest(there, store.locate(manifest.name))
    except NewerManifestError:
        raise
    except ManifestError:
        pass  # damaged; it is written again
