"""Checkpoints of compressed-tensors, which LLM Compressor writes.

`config_groups` have targets and the format of their weights; `ignore` is left alone. A layer has
`weight_scale` (one, or `[out, groups]`, or one a block), and by format

- pack-quantized: `weight_packed` int32 `[out, in * bits / 32]`, lowest bits first, offset by
  2^(bits - 1); asymmetric ones `weight_zero_point` likewise, packed along the outputs; with
  activation ordering by group, `weight_g_idx` `[in]`;
- int-quantized, naive-quantized: `weight` int8, `weight_zero_point` int8;
- float-quantized, naive-quantized: `weight` float8_e4m3fn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.float8 import float8_tensors, read_block, row_scales
from tensorray.builder.checkpoint.quantized import (
    SCALES,
    Files,
    FileTensors,
    Ordered,
    Quantization,
    Stored,
    signed,
    unpack,
    word_span,
)
from tensorray.builder.checkpoint.rules import matches_target
from tensorray.builder.quantization import Scheme

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_SUPPORTED = (
    "weights of 4 or 8 bits (pack-quantized), int8 (int-quantized) and float8 (float-quantized)"
)


class CompressedTensors(Quantization):
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(where)
        sparsity = config.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            raise self.refusal(f"sparsity in format {sparsity['format']!r}", "dense weights")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping):
            raise self.refusal("quantization_config without config_groups", _SUPPORTED)
        self.groups = [
            _Group(self, name, group, str(config.get("format"))) for name, group in groups.items()
        ]
        self.ignored = [str(each) for each in config.get("ignore") or []]

    def scheme(self, module: str) -> Scheme | None:
        group = self._group(module)
        return group.scheme if group else None

    def tensor(self, files: Files, module: str, shape: tuple[int, int]) -> FileTensors | None:
        group = self._group(module)
        return group.tensor(files, module, shape) if group else None

    def _group(self, module: str) -> _Group | None:
        """The group that names a module most closely: by name, by expression, by class."""
        if any(matches_target(each, module) for each in self.ignored):
            return None
        found = [
            (target == "Linear", target.startswith("re:"), index)
            for index, group in enumerate(self.groups)
            for target in group.targets
            if matches_target(target, module)
        ]
        return self.groups[min(found)[2]] if found else None


class _Group:
    """One of `config_groups`."""

    def __init__(self, config: Quantization, name: str, group: Any, default_format: str) -> None:
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise config.refusal(f"config_groups.{name} without weights", _SUPPORTED)
        weights = group["weights"]
        self.targets = [str(target) for target in group.get("targets") or []]
        self.format = str(group.get("format") or default_format)
        self.bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        size = weights.get("group_size")
        strategy = weights.get("strategy") or (
            "tensor" if size is None else "channel" if size == -1 else "group"
        )
        if self.format not in _FORMATS:
            raise config.refusal(f"format {self.format!r}", _SUPPORTED)
        packed = self.format == "pack-quantized"
        fits = (self.bits == 8 and not packed) if kind == "float" else self.bits in (4, 8)
        if kind not in ("int", "float") or not fits:
            raise config.refusal(
                f"{self.format} with {kind} weights of {self.bits} bits", _SUPPORTED
            )
        allowed = (
            ("tensor", "channel", "block") if kind == "float" else ("tensor", "channel", "group")
        )
        if strategy not in allowed:
            raise config.refusal(
                f"{kind} weights by strategy {strategy!r}", f"strategies {', '.join(allowed)}"
            )
        if strategy == "group" and (not isinstance(size, int) or size < 1 or size % 2):
            raise config.refusal(f"groups of {size!r}", "even group sizes")
        self.block = read_block(config, weights.get("block_structure"))
        if strategy == "block" and self.block is None:
            raise config.refusal("strategy 'block' without block_structure", _SUPPORTED)
        columns = {"group": size, "block": self.block and self.block[1]}.get(strategy)
        self.scheme = Scheme(
            kind="float8" if kind == "float" else "int4" if packed and self.bits == 4 else "int8",
            group=columns,
            zeros=kind == "int" and not weights.get("symmetric", True),
            ordered=packed
            and strategy == "group"
            and weights.get("actorder") in (True, "group", "dynamic"),
        )

    def tensor(self, files: Files, module: str, shape: tuple[int, int]) -> FileTensors | None:
        if self.format == "pack-quantized":
            if not files.has(f"{module}.weight_packed"):
                return None
            return PackedTensors(files, module, self.scheme, shape, self.bits)
        if self.scheme.kind == "float8":
            return float8_tensors(files, module, shape, ".weight_scale", self.block)
        name = f"{module}.weight"
        if not files.has(name) or files.dtype(name) != np.int8:
            return None
        return IntTensors(files, module, self.scheme, shape)


class PackedTensors(Ordered):
    groups_suffix = ".weight_g_idx"

    def __init__(
        self, files: Files, module: str, scheme: Scheme, shape: tuple[int, int], bits: int
    ) -> None:
        super().__init__(files, module, scheme, shape)
        self._bits = bits

    def stored(self) -> dict[str, Stored]:
        (out, inputs), per_word = self.shape, 32 // self._bits
        stored = {
            ".weight_packed": Stored(((out, -(-inputs // per_word)),), ("int32",)),
            ".weight_scale": _scales(self),
        }
        if self.scheme.zeros:
            shape = (-(-out // per_word), self.count)
            stored[".weight_zero_point"] = Stored((shape,), ("int32",))
        if self.scheme.ordered:
            stored[".weight_g_idx"] = Stored(((inputs,),), ("int32", "int64"))
        return stored

    def codes(self, rows: slice, columns: slice) -> NDArray[np.int8]:
        words, inside = word_span(columns, 32 // self._bits)
        packed = self.fetch(".weight_packed", np.int32, rows, words)
        return signed(unpack(packed, self._bits)[:, inside], self._bits)

    def scales(self, rows: slice, groups: slice) -> NDArray[np.float32]:
        if self.count > 1:
            return self.fetch(".weight_scale", np.float32, rows, groups)
        return row_scales(self.fetch_all(".weight_scale", np.float32), rows, groups, None)

    def zeros(self, rows: slice, groups: slice) -> NDArray[np.int8]:
        words, inside = word_span(rows, 32 // self._bits)
        packed = self.fetch(".weight_zero_point", np.int32, words, groups)
        return signed(unpack(packed.T, self._bits)[:, inside].T, self._bits)


class IntTensors(FileTensors):
    def stored(self) -> dict[str, Stored]:
        stored = {".weight": Stored((self.shape,), ("int8",)), ".weight_scale": _scales(self)}
        if self.scheme.zeros:
            shapes = _scales(self).shapes
            stored[".weight_zero_point"] = Stored(shapes, ("int8",))
        return stored

    def codes(self, rows: slice, columns: slice) -> NDArray[np.int8]:
        return self.fetch(".weight", np.int8, rows, columns)

    def scales(self, rows: slice, groups: slice) -> NDArray[np.float32]:
        return row_scales(self.fetch_all(".weight_scale", np.float32), rows, groups, None)

    def zeros(self, rows: slice, groups: slice) -> NDArray[np.int8]:
        zeros = self.fetch_all(".weight_zero_point", np.float32)
        return row_scales(zeros, rows, groups, None).astype(np.int8)


def _scales(tensors: FileTensors) -> Stored:
    out, _ = tensors.shape
    one: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1)) if tensors.scheme.group is None else ()
    rows = ((out,),) if tensors.count == 1 else ()
    return Stored(((out, tensors.count), *rows, *one), SCALES)
