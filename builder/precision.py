"""Which dtypes a model computes in, from what was asked and what its checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tensorray.builder.graph import FLOATS, DTypes


def choose_dtypes(
    config: Mapping[str, Any],
    *,
    model: str,
    wide_residual: bool,
    dtype: str = "auto",
    residual: str = "auto",
    unstated: str | None = None,
) -> DTypes:
    """`dtype` "auto" is the checkpoint's own, or `unstated` where its config says none.

    `residual` "auto" is the same, but with `wide_residual` float32 under float16: some models'
    residual streams exceed its range, which ends at 65,504 (`Model.wide_residual`). Raises
    ValueError, naming `model`, where nothing usable is said.
    """
    if dtype == "auto":
        stored = config.get("dtype") or config.get("torch_dtype") or unstated
        dtype = str(stored).removeprefix("torch.")
        if dtype not in FLOATS:
            raise ValueError(
                f"--dtype: {model} says nothing usable of its dtype ({stored}); give one of "
                f"{', '.join(FLOATS)}"
            )
    if residual == "auto":
        residual = "float32" if dtype == "float16" and wide_residual else dtype
    return DTypes(dtype, residual)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of one of `FLOATS`."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
