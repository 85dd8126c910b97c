"""Shared memory that kernels other than linear.cu's ask for, on GPUs whose blocks may have less."""

from __future__ import annotations

import pytest

from tensorray.kernels.cuda import linear, moe, prefill

#: What a block may have, in KiB: of compute capability 8.6, 8.9 and 12.x; of 8.0; of 9.0 and 10.0.
LIMITS = [99, 163, 227]
SPARE = 1024

MIXTRAL = 8, 2  # experts, and how many a row chooses
QWEN3_30B = 128, 8


def taken(layer: tuple[int, int], rows: int, kib: int) -> int | None:
    experts, top_k = layer
    return moe.rows_a_block(rows * top_k, experts, rows, kib * 1024)


@pytest.mark.parametrize("kib", LIMITS)
@pytest.mark.parametrize("layer", [MIXTRAL, QWEN3_30B])
def test_experts_of_few_rows_fit(layer: tuple[int, int], kib: int) -> None:
    for rows in range(1, 65):
        found = taken(layer, rows, kib)
        if found is not None:
            assert moe._PLAN.shared_bytes(found, 4096, False) <= kib * 1024 - SPARE
            assert found == 8 * linear.ntiles(found)
    assert taken(layer, 1, kib) == 8


def test_which_groups_go_to_the_tiles_of_many_rows() -> None:
    """Those for whose blocks there is no room, and large ones."""
    found = {
        kib: [taken(MIXTRAL, rows, kib) for rows in (16, 17, 32, 33, 64, 65)] for kib in LIMITS
    }
    assert found == {
        99: [8, None, None, None, None, None],
        163: [8, 16, 16, None, None, None],
        227: [8, 16, 16, 32, 32, None],
    }


def test_tiles_of_many_rows_fit_everywhere() -> None:
    assert LIMITS[0] * 1024 - SPARE >= moe._TILE_SHARED_BYTES


@pytest.mark.parametrize("cache_itemsize", [1, 2])
def test_prefill_for_any_gpu_fits_everywhere(cache_itemsize: int) -> None:
    for head_dim in range(16, prefill._MAX_HEAD_DIM + 1, 16):
        keys = int(prefill._mma_constants("__half", "", head_dim, False)["KEYS"])
        most = prefill._mma_shared_bytes(head_dim, keys, cache_itemsize)
        assert most <= LIMITS[0] * 1024 - SPARE
