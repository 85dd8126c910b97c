"""From a model's config to how its weights are quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tensorray.builder.checkpoint.awq import AWQ
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.compressed_tensors import CompressedTensors
from tensorray.builder.checkpoint.config import QUANTIZATION
from tensorray.builder.checkpoint.float8 import FP8, ModelOpt
from tensorray.builder.checkpoint.gptq import GPTQ
from tensorray.builder.checkpoint.quantized import Quantization
from tensorray.builder.quantization import SchemeOf

#: `quant_method` -> how to read the rest.
METHODS: dict[str, Callable[[Mapping[str, Any], str], Quantization]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "fp8": FP8,
    "modelopt": ModelOpt,
}


def read_quantization(
    config: Mapping[str, Any], where: object = "model config"
) -> Quantization | None:
    """How a config says that weights are quantized; None if they are not.

    Raises CheckpointError naming what is not supported, and what is.
    """
    section = config.get(QUANTIZATION)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{where}: {QUANTIZATION} must be a mapping, not {section!r}")
    method = str(section.get("quant_method", "unknown"))
    if method not in METHODS:
        raise CheckpointError(
            f"{where}: weights quantized by {method!r} are not supported; supported: "
            f"{', '.join(METHODS)}. Use a checkpoint quantized so, the unquantized model, or a "
            f"GGUF file of it"
        )
    return METHODS[method](section, str(where))


def schemes_of(config: Mapping[str, Any]) -> SchemeOf:
    """The schemes of a model's tensors, as far as its config tells."""
    quantization = read_quantization(config)

    def scheme_of(name: str) -> Any:
        if quantization is None or not name.endswith(".weight"):
            return None
        return quantization.scheme(name.removesuffix(".weight"))

    return scheme_of
