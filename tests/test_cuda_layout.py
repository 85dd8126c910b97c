"""How kernels are told of arrays' strides (NumPy's are CuPy's)."""

from __future__ import annotations

import numpy as np
import pytest

from tensorray.kernels.cuda.layout import row_stride


def test_rows_of_a_joint_projection() -> None:
    """q, k and v are columns of one product; k of a single head has an axis of any stride."""
    joint = np.zeros((5, 3 * 256), np.float16)
    single = joint[:, 256:512].reshape(5, 1, 256)
    assert row_stride(single) == 768
    strides = (1536, 1536, 2)  # what CuPy gives the middle axis
    assert row_stride(np.lib.stride_tricks.as_strided(single, (5, 1, 256), strides)) == 768
    assert row_stride(np.lib.stride_tricks.as_strided(single, (1, 1, 256), strides)) == 0
    assert row_stride(joint.reshape(5, 3, 256)[:, :2]) == 768
    assert row_stride(np.zeros((7, 3), np.int32)[:, :2]) == 3


def test_rows_that_are_not_contiguous() -> None:
    heads = np.zeros((5, 3, 8), np.float16)
    for x in (heads[:, ::2], heads[..., ::2], heads.transpose(0, 2, 1)):
        with pytest.raises(ValueError, match="must be contiguous"):
            row_stride(x)
