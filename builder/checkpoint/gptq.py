"""GPTQ checkpoints (arXiv 2210.17323), as AutoGPTQ and GPTQModel write them.

A layer has `qweight` int32 `[in * bits / 32, out]`, inputs packed lowest bits first; `scales`
`[groups, out]`; `qzeros` int32 `[groups, out * bits / 32]`; and `g_idx` int32 `[in]`, which group
each input is of. Format "gptq" (v1) stores zeros less one, modulo 2^bits; "gptq_v2" as they are.
With `desc_act` groups are of inputs in the order of their activations, else of neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
from tensorray.builder.quantization import Scheme

_SUPPORTED = "GPTQ of 4 or 8 bits in format gptq or gptq_v2"


class GPTQ(Quantization):
    """The config's keys; GPTQModel's `dynamic` overrides them by module."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(where)
        form = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if config.get("is_marlin_format"):
            form = "marlin"
        if form not in ("gptq", "gptq_v2"):
            raise self.refusal(f"GPTQ in format {form!r}", _SUPPORTED)
        if str(config.get("pack_dtype", "int32")) != "int32":
            raise self.refusal(f"GPTQ packed in {config['pack_dtype']}", _SUPPORTED)
        self.zero_offset = 1 if form == "gptq" else 0
        self.config = config
        self.dynamic: Mapping[str, Mapping[str, Any]] = config.get("dynamic") or {}
        self._scheme(config)

    def scheme(self, module: str) -> Scheme | None:
        name = module.rpartition(".")[2]
        if name == "lm_head" and not self.config.get("lm_head"):
            return None
        if name == "gate":  # of experts; AutoGPTQ leaves routers alone
            return None
        return self._scheme_in_files(module)

    def tensor(self, files: Files, module: str, shape: tuple[int, int]) -> FileTensors | None:
        scheme = self._scheme_in_files(module)
        if scheme is None or not files.has(f"{module}.qweight"):
            return None
        return GPTQTensors(files, module, scheme, shape, self.zero_offset)

    def _scheme_in_files(self, module: str) -> Scheme | None:
        """With the first rule of `dynamic` that matches; those with a minus leave modules alone."""
        for pattern, changes in self.dynamic.items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), module):
                if pattern.startswith("-:"):
                    return None
                return self._scheme({**self.config, **changes})
        return self._scheme(self.config)

    def _scheme(self, config: Mapping[str, Any]) -> Scheme:
        bits, group = config.get("bits"), config.get("group_size", -1)
        if bits not in (4, 8):
            raise self.refusal(f"GPTQ of {bits} bits", _SUPPORTED)
        if not isinstance(group, int) or (group < 1 and group != -1) or (group % 2 and group > 0):
            raise self.refusal(f"GPTQ in groups of {group!r}", "even group sizes, and -1")
        return Scheme(
            kind="int4" if bits == 4 else "int8",
            group=None if group == -1 else group,
            zeros=not config.get("sym", True),
            ordered=bool(config.get("desc_act", False)) and group != -1,
        )


class GPTQTensors(Ordered):
    by_inputs = True

    def __init__(
        self,
        files: Files,
        module: str,
        scheme: Scheme,
        shape: tuple[int, int],
        zero_offset: int,
    ) -> None:
        super().__init__(files, module, scheme, shape)
        self._bits = 4 if scheme.kind == "int4" else 8
        self._zero_offset = zero_offset

    def stored(self) -> dict[str, Stored]:
        (out, inputs), per_word = self.shape, 32 // self._bits
        stored = {
            ".qweight": Stored(((-(-inputs // per_word), out),), ("int32",)),
            ".scales": Stored(((self.count, out),), SCALES),
            ".qzeros": Stored(((self.count, -(-out // per_word)),), ("int32",)),
        }
        if self.scheme.ordered:
            stored[".g_idx"] = Stored(((inputs,),), ("int32", "int64"))
        return stored

    def codes(self, rows: slice, columns: slice) -> NDArray[np.int8]:
        words, inside = word_span(columns, 32 // self._bits)
        packed = self.fetch(".qweight", np.int32, words, rows)
        return signed(unpack(packed.T, self._bits)[:, inside], self._bits)

    def scales(self, rows: slice, groups: slice) -> NDArray[np.float32]:
        if not self.scheme.zeros:
            self._check_symmetric(rows, groups)
        scales: NDArray[np.float32] = self.fetch(".scales", np.float32, groups, rows).T
        return scales

    def zeros(self, rows: slice, groups: slice) -> NDArray[np.int8]:
        words, inside = word_span(rows, 32 // self._bits)
        zeros = unpack(self.fetch(".qzeros", np.int32, groups, words), self._bits)[:, inside]
        largest = np.uint8((1 << self._bits) - 1)
        centred: NDArray[np.int8] = signed(
            (zeros + np.uint8(self._zero_offset)) & largest, self._bits
        ).T
        return centred

    def _check_symmetric(self, rows: slice, groups: slice) -> None:
        if self.zeros(rows, groups).any():
            raise self.error(
                ".qzeros", "is not symmetric, but quantization_config says so (sym: true)"
            )
