"""The engine manifest: which plans a deployment of a model runs, as JSON that a person can read.

It names the checkpoint the plans were made for, the layout over ranks and stages, each distinct
segment and, for every target, the key of the segment's plan in the store. Plans are found by key
with or without it: a manifest says what there has to be, for whoever ships or audits a store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from tensorray.builder.graph import DTypes
from tensorray.builder.plan import ProfileSet
from tensorray.builder.tensorrt_flavour import Target

#: Version of the format. A reader refuses a newer one, since it can't know what changed.
SCHEMA = 2


class ManifestError(ValueError):
    """A manifest that can't be read; the message says why."""


class NewerManifestError(ManifestError):
    """A manifest of a later version of tensorray, which knows more of it than this one."""


@dataclass(frozen=True)
class PlannedCheckpoint:
    """What the plans were made for. Weights play no part in plans, so none are described."""

    model: str  # as it was asked for: a path or a Hub id
    revision: str | None  # the Hub's commit; None for local files
    architecture: str
    config_sha256: str  # of the config that definitions read, with overrides, as canonical JSON


@dataclass(frozen=True)
class PlannedSegment:
    """A distinct segment: where the model has it, and its plan for each target, in their order."""

    name: str
    digest: str
    plans: tuple[str, ...]


@dataclass(frozen=True)
class PlannedTarget:
    """What plans are compiled by and for, and the numbers of rows they serve."""

    target: Target
    profiles: ProfileSet


@dataclass(frozen=True)
class Manifest:
    """Everything a deployment's engines are made of."""

    checkpoint: PlannedCheckpoint
    tp_size: int
    pp_size: int
    dtypes: DTypes
    targets: tuple[PlannedTarget, ...]
    segments: tuple[PlannedSegment, ...]
    #: Keys under which there is no plan: that TensorRT has not what the segment's quantized weights
    #: need, and own kernels run it.
    kernels: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def name(self) -> str:
        """Its name in a store: readable, and another one whenever anything else differs."""
        model = re.sub(r"[^\w.-]+", "-", self.checkpoint.model.rstrip("/").rpartition("/")[2])
        layout = f"tp{self.tp_size}-pp{self.pp_size}-{self.dtypes.compute}"
        # The schema is left out: a newer program's manifest of the same plans is found, not missed.
        # So is what a build finds out.
        digest = hashlib.sha256(_canonical(replace(self, schema=0, kernels=()))).hexdigest()
        return f"manifests/{model}-{layout}-{digest[:12]}.json"

    def keys(self, architecture: str) -> list[str]:
        """The keys of all plans there are for a GPU architecture."""
        chosen = [
            i for i, each in enumerate(self.targets) if each.target.architecture == architecture
        ]
        keys = [segment.plans[i] for segment in self.segments for i in chosen]
        return [key for key in keys if key not in self.kernels]

    def to_json(self) -> bytes:
        return json.dumps(msgspec.to_builtins(self), indent=2).encode() + b"\n"


def read_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from its JSON; raises ManifestError naming `where` it is from."""
    try:
        content = json.loads(data)
        schema = content["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ManifestError(f"{where}: not an engine manifest") from None
    if not isinstance(schema, int) or schema > SCHEMA:
        raise NewerManifestError(
            f"{where}: a manifest of schema {schema}; this version of tensorray reads up to "
            f"{SCHEMA}: upgrade tensorray, or build again with this version and another store"
        )
    try:
        return msgspec.convert(content, Manifest)
    except ValueError as error:
        raise ManifestError(f"{where}: {error}") from error


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a model's config, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(manifest: Manifest) -> bytes:
    return json.dumps(msgspec.to_builtins(manifest), sort_keys=True).encode()
