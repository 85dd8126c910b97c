"""AWQ checkpoints (arXiv 2306.00978) in the layout of AutoAWQ's GEMM version.

A layer has `qweight` int32 `[in, out / 8]`, `scales` `[groups, out]` and, zeros being part of the
scheme, `qzeros` int32 `[groups, out / 8]`. The eight outputs of a word come in the order 0 2 4 6
1 3 5 7, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.quantized import (
    SCALES,
    Files,
    FileTensors,
    Quantization,
    Stored,
    signed,
    unpack,
    word_span,
)
from tensorray.builder.checkpoint.rules import names_module
from tensorray.builder.quantization import Scheme

_SUPPORTED = "AWQ of 4 bits in version gemm"
#: Where in a word each of its eight outputs lies.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


class AWQ(Quantization):
    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        super().__init__(where)
        bits = config.get("bits", config.get("w_bit"))
        version = str(config.get("version", "gemm")).lower()
        group = config.get("group_size", config.get("q_group_size", 128))
        if bits != 4:
            raise self.refusal(f"AWQ of {bits} bits", _SUPPORTED)
        if version != "gemm":
            raise self.refusal(f"AWQ in version {version!r}", _SUPPORTED)
        if config.get("backend", "autoawq") != "autoawq":
            raise self.refusal(f"AWQ of backend {config['backend']!r}", _SUPPORTED)
        if not isinstance(group, int) or (group < 1 and group != -1) or (group > 0 and group % 2):
            raise self.refusal(f"AWQ in groups of {group!r}", "even group sizes, and -1")
        self.excluded = list(config.get("modules_to_not_convert") or [])
        self._scheme = Scheme(
            kind="int4",
            group=None if group == -1 else group,
            zeros=bool(config.get("zero_point", True)),
        )

    def scheme(self, module: str) -> Scheme | None:
        name = module.rpartition(".")[2]
        if name == "lm_head" or any(names_module(each, module) for each in self.excluded):
            return None
        return self._scheme

    def tensor(self, files: Files, module: str, shape: tuple[int, int]) -> FileTensors | None:
        if not files.has(f"{module}.qweight"):
            return None
        return AWQTensors(files, module, self._scheme, shape)


class AWQTensors(FileTensors):
    by_inputs = True

    def stored(self) -> dict[str, Stored]:
        out, inputs = self.shape
        stored = {
            ".qweight": Stored(((inputs, -(-out // 8)),), ("int32",)),
            ".scales": Stored(((self.count, out),), SCALES),
        }
        if self.scheme.zeros:
            stored[".qzeros"] = Stored(((self.count, -(-out // 8)),), ("int32",))
        return stored

    def codes(self, rows: slice, columns: slice) -> NDArray[np.int8]:
        return self._outputs(".qweight", columns, rows)

    def scales(self, rows: slice, groups: slice) -> NDArray[np.float32]:
        scales: NDArray[np.float32] = self.fetch(".scales", np.float32, groups, rows).T
        return scales

    def zeros(self, rows: slice, groups: slice) -> NDArray[np.int8]:
        return self._outputs(".qzeros", groups, rows)

    def _outputs(self, suffix: str, span: slice, outputs: slice) -> NDArray[np.int8]:
        """Codes `[outputs, span]` of a tensor that has them `[span, outputs]`, packed."""
        words, inside = word_span(outputs, 8)
        codes = unpack(self.fetch(suffix, np.int32, span, words), 4)
        codes = codes.reshape(len(codes), -1, 8)[:, :, _PLACES].reshape(len(codes), -1)
        return signed(np.ascontiguousarray(codes[:, inside].T), 4)
