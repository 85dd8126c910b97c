"""The engine manifest: readable, complete, and refused when a later version wrote it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.plans import TARGET, request

from tensorray.builder.graph import DTypes
from tensorray.builder.manifest import (
    SCHEMA,
    Manifest,
    ManifestError,
    NewerManifestError,
    PlannedCheckpoint,
    PlannedSegment,
    PlannedTarget,
    config_digest,
    read_manifest,
)

OTHER = replace(TARGET, architecture="sm_120")
REQUESTS = [request(8), request(16)]
MANIFEST = Manifest(
    checkpoint=PlannedCheckpoint(
        model="org/Tiny Model",
        revision="0123abc",
        architecture="LlamaForCausalLM",
        config_sha256=config_digest({"hidden_size": 8}),
    ),
    tp_size=8,
    pp_size=2,
    dtypes=DTypes("float16", "float32"),
    targets=tuple(PlannedTarget(target, REQUESTS[0].profiles) for target in (TARGET, OTHER)),
    segments=tuple(
        PlannedSegment(
            each.name,
            each.segment.digest(),
            (each.key, replace(each, target=OTHER).key),
        )
        for each in REQUESTS
    ),
)


def test_a_manifest_comes_back_as_it_was_written() -> None:
    assert read_manifest(MANIFEST.to_json(), "here") == MANIFEST


def test_it_lists_what_a_deployment_runs() -> None:
    content = json.loads(MANIFEST.to_json())
    assert content["schema"] == SCHEMA
    assert content["checkpoint"]["revision"] == "0123abc"
    assert (content["tp_size"], content["pp_size"]) == (8, 2)
    assert content["dtypes"] == {"compute": "float16", "residual": "float32"}
    assert [each["target"]["architecture"] for each in content["targets"]] == ["sm_89", "sm_120"]
    assert [len(each["plans"]) for each in content["segments"]] == [2, 2]
    assert MANIFEST.keys("sm_120") == [replace(each, target=OTHER).key for each in REQUESTS]
    assert MANIFEST.keys("sm_90") == []


def test_its_name_is_readable_and_changes_with_its_content() -> None:
    assert MANIFEST.name.startswith("manifests/Tiny-Model-tp8-pp2-float16-")
    assert MANIFEST.name == read_manifest(MANIFEST.to_json(), "here").name
    others = [
        replace(MANIFEST, tp_size=4),
        replace(MANIFEST, targets=MANIFEST.targets[:1]),
        replace(MANIFEST, segments=MANIFEST.segments[:1]),
        replace(MANIFEST, checkpoint=replace(MANIFEST.checkpoint, config_sha256="0")),
    ]
    assert len({each.name for each in [MANIFEST, *others]}) == 5
    assert replace(MANIFEST, schema=SCHEMA + 1).name == MANIFEST.name


def test_a_newer_schema_is_refused_whatever_else_it_holds() -> None:
    newer = json.dumps({"schema": SCHEMA + 1, "everything": "else"}).encode()
    with pytest.raises(NewerManifestError, match=rf"here: .*schema {SCHEMA + 1}.*upgrade"):
        read_manifest(newer, "here")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not an engine manifest"),
        (b"[]", "not an engine manifest"),
        (b'{"model_type": "llama"}', "not an engine manifest"),
        (MANIFEST.to_json()[:-20], "not an engine manifest"),
        (MANIFEST.to_json().replace(b'"tp_size": 8', b'"tp_size": "8"'), "tp_size"),
        (MANIFEST.to_json().replace(b'"tp_size": 8,', b""), "tp_size"),
        (MANIFEST.to_json().replace(b'"float16"', b'"float8"'), "float8"),
    ],
)
def test_a_damaged_manifest_is_named(text: bytes, problem: str) -> None:
    with pytest.raises(ManifestError, match=f"^there: .*{problem}"):
        read_manifest(text, "there")


def test_a_configs_digest_ignores_the_order_of_keys_alone() -> None:
    digest = config_digest({"a": 1, "b": {"c": 2, "d": 3}})
    assert config_digest({"b": {"d": 3, "c": 2}, "a": 1}) == digest
    assert config_digest({"a": 1, "b": {"c": 2, "d": 4}}) != digest
