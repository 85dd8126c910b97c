"""Where shards go, on clusters that are only described."""

from __future__ import annotations

import logging

import pytest

from tensorray.actors.placement import PlacementError, choose_placement, needs

GPU = {"CPU": 1.0, "GPU": 1.0}
HOST = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
SMALL = {"CPU": 16.0, "GPU": 2.0}


def test_what_a_shard_takes() -> None:
    assert needs("cpu", None, {"GPU": 8}) == {"CPU": 1.0}
    assert needs("auto", None, {"CPU": 4}) == {"CPU": 1.0}
    assert needs("auto", None, {"GPU": 8}) == GPU
    assert needs("cuda", "H100", {}) == {**GPU, "accelerator_type:H100": 0.001}
    assert needs("null", None, {"GPU": 8})["CPU"] < 0.01


def test_a_stage_is_one_bundle_which_no_node_border_cuts() -> None:
    placed = choose_placement({"a": HOST}, GPU, stages=1, shards_a_stage=8)
    assert placed.bundles == ({"CPU": 8.0, "GPU": 8.0},)
    assert placed.bundle_of == (0,) * 8
    assert placed.strategy == "STRICT_PACK"


@pytest.mark.parametrize("strategy", ["pack", "spread"])
def test_stages_are_packed_or_spread(strategy: str) -> None:
    placed = choose_placement(
        {"a": HOST, "b": HOST},
        GPU,
        stages=2,
        shards_a_stage=4,
        strategy=strategy,  # type: ignore[arg-type]
    )
    assert placed.bundles == ({"CPU": 4.0, "GPU": 4.0},) * 2
    assert placed.bundle_of == (0, 0, 0, 0, 1, 1, 1, 1)
    assert placed.strategy == strategy.upper()


def test_a_stage_no_node_can_hold_is_split_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = dict.fromkeys("abcd", SMALL)
    with caplog.at_level(logging.WARNING):
        placed = choose_placement(nodes, GPU, stages=2, shards_a_stage=4)
    assert placed.bundles == (GPU,) * 8
    assert placed.bundle_of == tuple(range(8))
    assert placed.strategy == "PACK"
    assert "no node has room for a stage of 4 shards" in caplog.text


@pytest.mark.parametrize(
    ("nodes", "need", "options", "message"),
    [
        (
            {"10.0.0.1 (ab12)": SMALL, "10.0.0.2 (cd34)": SMALL},
            GPU,
            {"stages": 2, "shards_a_stage": 4},
            r"1 replica of 8 shards \(2 x 4\), each with 1 CPU, 1 GPU: the cluster has room for 4 "
            r"such shards\. It has 10\.0\.0\.1 \(ab12\): 16 CPU, 2 GPU; 10\.0\.0\.2",
        ),
        (
            {"a": HOST},
            GPU,
            {"stages": 1, "shards_a_stage": 4, "replicas": 3},
            r"3 replicas of 4 shards .* room for 8 .* or lower --tensor-parallel-size",
        ),
        (
            {"a": SMALL},
            {**GPU, "accelerator_type:H100": 0.001},
            {"stages": 1, "shards_a_stage": 1},
            r"accelerator_type:H100: the cluster has room for 0",
        ),
        ({}, GPU, {"stages": 1, "shards_a_stage": 1}, "It has no nodes"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_there_is(nodes, need, options, message) -> None:
    with pytest.raises(PlacementError, match=message):
        choose_placement(nodes, need, **options)
