"""FP8 checkpoints: float8_e4m3fn weights with scales, as three kinds of tools write them.

A layer has `weight` `[out, in]` and

- `weight_scale`, one number, or one a row (`[out]` or `[out, 1]`): ModelOpt, AutoFP8;
- or `weight_scale_inv` `[out / 128, in / 128]`, one for each block: DeepSeek (arXiv 2412.19437),
  Qwen. The inverse of what quantizing multiplied by, so it is the scale as well.

compressed-tensors stores the same under `weight_scale`; see compressed_tensors.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.quantized import (
    FLOAT8,
    SCALES,
    Files,
    FileTensors,
    Quantization,
    Stored,
)
from tensorray.builder.checkpoint.rules import names_module
from tensorray.builder.quantization import Scheme

#: Rows and columns of a block that shares a scale.
Block = tuple[int, int]


class FP8(Quantization):
    """`quant_method: fp8`, with blocks or a scale a tensor."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(where)
        fmt = config.get("fmt", "e4m3")
        if fmt not in ("e4m3", "float8_e4m3fn"):
            raise self.refusal(f"FP8 in format {fmt!r}", "e4m3")
        self.block = read_block(self, config.get("weight_block_size"))
        excluded = [config.get("modules_to_not_convert"), config.get("ignored_layers")]
        self.excluded = [name for names in excluded for name in names or ()]
        self.suffix = ".weight_scale_inv" if self.block else ".weight_scale"

    def scheme(self, module: str) -> Scheme | None:
        name = module.rpartition(".")[2]
        if name == "lm_head" or any(names_module(each, module) for each in self.excluded):
            return None
        return Scheme("float8", self.block[1] if self.block else None)

    def tensor(self, files: Files, module: str, shape: tuple[int, int]) -> FileTensors | None:
        return float8_tensors(files, module, shape, self.suffix, self.block)


class ModelOpt(Quantization):
    """`quant_method: modelopt`, or what hf_quant_config.json says (TensorRT Model Optimizer)."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(where)
        config = {**config, **(config.get("quantization") or {})}
        algorithm = str(config.get("quant_algo", "FP8")).upper()
        if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
            raise self.refusal(
                f"ModelOpt's {algorithm}", "ModelOpt's FP8 and FP8_PER_CHANNEL_PER_TOKEN"
            )
        self.excluded = list(config.get("exclude_modules") or config.get("ignore") or [])

    def scheme(self, module: str) -> Scheme | None:
        if any(names_module(each, module) for each in self.excluded):
            return None
        return Scheme("float8")

    def tensor(self, files: Files, module: str, shape: tuple[int, int]) -> FileTensors | None:
        return float8_tensors(files, module, shape, ".weight_scale", None)


def read_block(quantization: Quantization, value: Any) -> Block | None:
    """A config's block size."""
    if value is None:
        return None
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(v in range(1, 1 << 20) for v in value)
    ):
        return (int(value[0]), int(value[1]))
    raise quantization.refusal(f"FP8 in blocks of {value!r}", "blocks as [128, 128]")


def float8_tensors(
    files: Files, module: str, shape: tuple[int, int], suffix: str, block: Block | None
) -> FileTensors | None:
    """A module's weight if it is float8 in the files."""
    name = f"{module}.weight"
    if not files.has(name) or files.dtype(name) != FLOAT8:
        return None
    return Float8Tensors(files, module, shape, suffix, block)


class Float8Tensors(FileTensors):
    def __init__(
        self, files: Files, module: str, shape: tuple[int, int], suffix: str, block: Block | None
    ) -> None:
        super().__init__(files, module, Scheme("float8", block[1] if block else None), shape)
        self._suffix = suffix
        self._block = block

    def stored(self) -> dict[str, Stored]:
        out, _ = self.shape
        scales: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (out,), (out, 1))
        if self._block:
            scales = ((-(-out // self._block[0]), self.count),)
        return {
            ".weight": Stored((self.shape,), (FLOAT8.name,)),
            self._suffix: Stored(scales, SCALES),
        }

    def codes(self, rows: slice, columns: slice) -> NDArray[np.uint8]:
        codes: NDArray[np.uint8] = self.fetch(".weight", FLOAT8, rows, columns).view(np.uint8)
        if ((codes & 127) == 127).any():
            raise self.error(".weight", "holds values that are not numbers")
        return codes

    def scales(self, rows: slice, groups: slice) -> NDArray[np.float32]:
        return row_scales(self.fetch_all(self._suffix, np.float32), rows, groups, self._block)


def row_scales(
    scales: NDArray[np.float32], rows: slice, groups: slice, block: Block | None
) -> NDArray[np.float32]:
    """Scales as stored (one, one a row, one a block, or `[out, groups]`) as those of a slice."""
    if block:
        return scales[np.arange(rows.start, rows.stop) // block[0], groups]
    if scales.size == 1:
        return np.full((rows.stop - rows.start, 1), scales.reshape(()))
    return scales.reshape(len(scales), -1)[rows, groups]
