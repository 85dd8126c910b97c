"""How products of few rows are cut up on a GPU; needs none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tensorray.kernels.cuda import linear
from tensorray.kernels.cuda.linear import Plan, choose

H200 = 132  # multiprocessors
BLOCK_LIMIT = 227 * 1024  # shared memory a block may have from compute capability 9.0 on


@given(
    outs=st.integers(1, 300_000),
    eighths=st.integers(1, 4096),
    rows=st.integers(1, linear.FEW_ROWS),
    wants_norm=st.booleans(),
    gated=st.booleans(),
    multiprocessors=st.sampled_from([20, 78, 108, 132, 188]),
)
def test_any_shape_has_a_plan_that_fits(
    outs: int, eighths: int, rows: int, wants_norm: bool, gated: bool, multiprocessors: int
) -> None:
    inner = 8 * eighths
    normed = wants_norm and rows <= linear.FEW_NORMED_ROWS and inner <= linear.LONGEST_NORMED_ROW
    plan = choose(outs, inner, rows, normed, gated, multiprocessors)
    assert plan.mtiles in ((2, 4) if gated else (1, 2, 4))
    assert plan.stages >= 2
    assert plan.shared_bytes(rows, inner, normed) <= BLOCK_LIMIT


def test_the_plans_that_measured_best_on_an_h200() -> None:
    """Tiles of the fastest plans, or of ones within 2 % of them (kernels/cuda/NOTES.md)."""
    best = {
        # outs, in, rows, normed, gated: mtiles
        (6144, 4096, 1, True, False): 1,
        (4096, 4096, 1, False, False): 2,
        (28672, 4096, 1, True, True): 2,
        (4096, 14336, 1, False, False): 2,
        (128256, 4096, 1, True, False): 1,
        (6144, 4096, 16, False, False): 4,
        (4096, 4096, 16, False, False): 2,
        (28672, 4096, 16, False, True): 2,
        (4096, 14336, 16, False, False): 2,
        (128256, 4096, 16, False, False): 4,
        (4096, 1024, 1, True, False): 4,
        (1024, 2048, 1, False, False): 1,
        (6144, 1024, 1, True, True): 4,
        (1024, 3072, 1, False, False): 1,
        (151936, 1024, 1, True, False): 4,
        (151936, 1024, 16, False, False): 4,
    }
    chosen = {shape: choose(*shape, H200).mtiles for shape in best}
    assert chosen == best


def test_shared_memory_of_a_block() -> None:
    # Two chunks of 8 warps: 8 units of the weight and 2 of x, 512 bytes each; then the sums.
    assert Plan(2, 2).shared_bytes(1, 1024, False) == 2 * 8 * 10 * 512 + 8 * 8 * 36 * 4
    # x's normed rows instead, each with 64 bytes to spare.
    assert Plan(2, 2).shared_bytes(3, 1024, True) == 2 * 8 * 8 * 512 + 8 * 8 * 36 * 4 + 3 * 2112
