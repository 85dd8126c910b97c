"""What kernels written for Hopper need of the host: TMA descriptors, names of types in PTX."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tensorray.kernels.cuda import compiler

#: PTX's names of the types that tensor cores multiply.
MMA_TYPES = {"__half": "f16", "__nv_bfloat16": "bf16"}


@functools.cache
def is_hopper(device: int) -> bool:
    import cupy

    return bool(cupy.cuda.Device(device).compute_capability == "90")


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    itemsize: int,
    extents: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
) -> Any:
    """A TMA descriptor, as a kernel argument; extents innermost first, strides in bytes from the
    second extent on. Boxes of 16-bit elements land swizzled by 128 bytes, of 8-bit ones plainly."""
    from cuda.bindings import driver

    types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    element, swizzle = {
        1: (types.CU_TENSOR_MAP_DATA_TYPE_UINT8, swizzles.CU_TENSOR_MAP_SWIZZLE_NONE),
        2: (types.CU_TENSOR_MAP_DATA_TYPE_UINT16, swizzles.CU_TENSOR_MAP_SWIZZLE_128B),
    }[itemsize]
    result, encoded = driver.cuTensorMapEncodeTiled(
        element,
        len(extents),
        address,
        [driver.cuuint64_t(extent) for extent in extents],
        [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(extent) for extent in box],
        [driver.cuuint32_t(1)] * len(extents),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(result):
        raise compiler.LaunchError(
            f"TMA can't describe extents {extents}, strides {strides}, box {box}: {result.name}"
        )
    return np.array([int(word) for word in encoded.opaque], np.uint64).view("V128")[0]
