"""gated_hopper.cu at work without a GPU: its own source over helpers/emulated_hopper."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tensorray.kernels.cuda import compiler
from tensorray.kernels.cuda.activation import KINDS
from tensorray.kernels.cuda.gated_hopper import Plan

_PRELUDE = Path(__file__).parent / "emulated_hopper" / "hopper.cuh"
#: NumPy's types by their names in C++.
TYPES: dict[str, Any] = {"__half": np.float16, "__nv_bfloat16": ml_dtypes.bfloat16}

_RUN = """
extern "C" const char* run_{number}(const void* x, const void* weight, void* y, int inner,
                                    int results, int rows, int gate, int ahead, int blocks,
                                    unsigned seed) {{
  static std::string error;
  using namespace variant_{number};
  const TensorMap x_map{{static_cast<const std::uint16_t*>(x), inner, rows, ROWS, true}};
  const TensorMap weight_map{{static_cast<const std::uint16_t*>(weight), inner, 2 * results,
                             RESULTS, false}};
  for (int i = 0; i < blocks; i++) {{
    error = run_block(
        i, WARPGROUP * (CONSUMERS + 1),
        [&] {{
          gated_product(x_map, weight_map, static_cast<ELEMENT*>(y), inner, results, rows, gate,
                        ahead);
        }},
        seed + i);
    if (!error.empty()) return error.c_str();
  }}
  return "";
}}
"""


@dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for."""

    plan: Plan
    element: str = "__half"
    edit: tuple[str, str] = ("", "")  # of the source: what to replace by what


class EmulatedGated:
    """Variants of the kernel, compiled into `folder` by g++ (C++17, GCC 12 or later)."""

    def __init__(self, variants: Sequence[Variant], folder: Path) -> None:
        self._numbers = {variant: number for number, variant in enumerate(variants)}
        source = folder / "gated.cpp"
        parts = [_PRELUDE.read_text(), *(_variant(i, v) for v, i in self._numbers.items())]
        source.write_text("\n".join(parts))
        library = folder / "gated.so"
        command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o", str(library)]
        subprocess.run([*command, str(source)], check=True)
        self._library = ctypes.CDLL(str(library))

    def run(
        self,
        variant: Variant,
        x: Any,
        weight: Any,
        gate: str,
        *,
        weight_ahead: bool = True,
        seed: int = 0,
    ) -> Any:
        """`gated_product` by one variant, NaN where it writes nothing. Raises AssertionError for
        what no GPU would forgive."""
        rows, inner = x.shape
        results = len(weight) // 2
        assert x.dtype == weight.dtype == TYPES[variant.element]
        y = np.full((rows, results), np.nan, x.dtype)
        run = self._library[f"run_{self._numbers[variant]}"]
        run.restype = ctypes.c_char_p
        problem = run(
            *(ctypes.c_void_p(each.ctypes.data) for each in (x, weight, y)),
            *(inner, results, rows, KINDS[gate], int(weight_ahead)),
            *(variant.plan.blocks(rows, results), seed),
        )
        assert not problem, problem.decode()
        return y


def _variant(number: int, variant: Variant) -> str:
    text = (compiler.SOURCES / "gated_hopper.cu").read_text()
    text = re.sub(r"(?m)^#(include|ifdef|endif).*$", "", text)
    edits = [
        ('extern "C" __global__', "__global__"),
        ("extern __shared__ unsigned char memory[];", "unsigned char* memory = shared_memory();"),
        variant.edit,
    ]
    for old, new in edits:
        assert not old or text.count(old) == 1
        text = text.replace(old, new) if old else text
    constants = variant.plan.constants(variant.element)
    lines = [line for name, value in constants.items() for line in _define(name, value)]
    product = (
        "template <int N> void multiply_rows(float* c, unsigned long long a, unsigned long long b, "
        "bool add) { multiply_elements<ELEMENT, N>(c, a, b, add); }"
    )
    body = f"namespace variant_{number} {{\n{product}\n{text}\n}}"
    return "\n".join([*lines, body, _RUN.format(number=number)])


def _define(name: str, value: int | str) -> list[str]:
    return [f"#undef {name}", f"#define {name} {value}"]
