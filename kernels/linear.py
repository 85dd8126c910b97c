"""Linear layers: activations times a weight stored `[out, in]`."""

from __future__ import annotations

from typing import Any


def linear(x: Any, weight: Any, bias: Any | None = None) -> Any:
    """`x @ weight.T + bias`: x `[T, in]`, weight `[out, in]`, bias `[out]` -> new `[T, out]`."""
    y = x @ weight.T
    if bias is not None:
        y += bias
    return y
