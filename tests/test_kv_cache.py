"""How layers fall into groups over one pool of blocks, and how large the pool is."""

from __future__ import annotations

import numpy as np
import pytest

from tensorray.actors.kv_cache import KVCache, KVCacheError, choose_num_blocks, plan_groups
from tensorray.builder.model import KVSpec, stage_layers

GLOBAL = KVSpec(kv_heads=2, head_dim=8)
LOCAL = KVSpec(kv_heads=2, head_dim=8, window=32)


@pytest.mark.parametrize(
    ("specs", "groups", "layers_per_group"),
    [
        ([GLOBAL] * 12, 1, 12),
        ([LOCAL] * 12, 1, 12),
        ([LOCAL, GLOBAL] * 13, 2, 13),  # Gemma 2
        (([LOCAL] * 5 + [GLOBAL]) * 3, 6, 3),  # Gemma 3 270M
        (([LOCAL] * 5 + [GLOBAL]) * 10 + [LOCAL] * 2, 5, 13),  # Gemma 3 27B
    ],
)
def test_groups_are_equal_and_waste_little(specs, groups, layers_per_group):
    plan = plan_groups(specs, block_size=16)
    assert (len(plan.groups), plan.layers_per_group) == (groups, layers_per_group)
    assert sorted(layer for group in plan.groups for layer in group) == list(range(len(specs)))
    for group, window in zip(plan.groups, plan.windows, strict=True):
        assert len(group) <= layers_per_group
        assert {specs[layer].window for layer in group} == {window}


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(
    "specs", [[GLOBAL] * 12, ([LOCAL] * 5 + [GLOBAL]) * 3, [LOCAL, GLOBAL] * 13], ids=len
)
def test_stages_of_a_pipeline_have_the_same_groups_and_their_own_layers(specs, stages):
    spans = [stage_layers(len(specs), stages, stage) for stage in range(stages)]
    plans = [plan_groups(specs, 16, spans, stage) for stage in range(stages)]
    for plan, span in zip(plans, spans, strict=True):
        assert plan.windows == plans[0].windows
        assert plan.layers_per_group == plans[0].layers_per_group
        assert sorted(layer for group in plan.groups for layer in group) == list(span)
        for group, window in zip(plan.groups, plan.windows, strict=True):
            assert len(group) <= plan.layers_per_group
            assert {specs[layer].window for layer in group} <= {window}
    held = sum(len(plan.groups) * plan.layers_per_group for plan in plans)
    assert held <= 2 * len(specs), "half of the cache would never be used"


def test_many_odd_layers_do_not_make_many_groups():
    plan = plan_groups([GLOBAL] + [LOCAL] * 29, block_size=16)
    assert len(plan.groups) <= 8


def test_layers_of_different_shapes_are_refused():
    with pytest.raises(KVCacheError, match="different shapes"):
        plan_groups([GLOBAL, KVSpec(kv_heads=4, head_dim=8)], block_size=16)


def test_no_two_layers_of_a_group_share_pages():
    plan = plan_groups(([LOCAL] * 5 + [GLOBAL]) * 3, block_size=4)
    cache = KVCache(plan, num_blocks=5, xp=np, dtype=np.float32)
    assert cache.nbytes == 5 * 3 * 2 * (2 * 4 * 8) * 4
    for group in plan.groups:
        pages = {id(cache.layers[layer].k_pages) for layer in group}
        assert len(pages) == len(group)
    assert cache.layers[5].window is None
    assert cache.layers[0].window == 32


def blocks(**changes):
    arguments = {
        "max_model_len": 256,
        "max_num_seqs": 4,
        "step_tokens": 16,
        "available": 1 << 40,
        **changes,
    }
    return choose_num_blocks(plan_groups([LOCAL, GLOBAL], block_size=16), 4, **arguments)


def test_the_pool_is_no_larger_than_its_sequences_can_fill():
    # A full-length sequence: 16 blocks of the global group; 48 tokens and a ragged block local.
    assert blocks() == 1 + 4 * (16 + 4)


def test_the_pool_takes_what_is_available_at_most():
    block_bytes = 2 * 2 * 16 * 8 * 4
    assert blocks(available=50 * block_bytes) == 50


def test_a_pool_too_small_for_one_sequence_says_what_to_change():
    with pytest.raises(KVCacheError, match=r"needs 21 .*--max-model-len.*--num-kv-blocks"):
        blocks(num_blocks=20)
