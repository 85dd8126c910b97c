"""Mixture of experts: choose experts by row, run each expert once over the rows that chose it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensorray.kernels.device import is_cuda
from tensorray.kernels.linear import linear


def route(logits: Any, top_k: int, renormalize: bool) -> tuple[Any, Any]:
    """Top-k expert choice (Shazeer et al., arXiv 1701.06538).

    logits `[T, experts]` -> weights float32 `[T, top_k]`, ids int32 `[T, top_k]`, the likeliest
    first and ties to the lower id. Weights are softmax probabilities over all experts; with
    `renormalize` the chosen ones are scaled to sum to one.
    """
    if is_cuda(logits):
        from tensorray.kernels.cuda import moe as cuda

        return cuda.route(logits, top_k, renormalize)
    return route_numpy(logits, top_k, renormalize)


def route_numpy(logits: Any, top_k: int, renormalize: bool) -> tuple[Any, Any]:
    """The twin of `route`."""
    logits = logits.astype(np.float32, copy=False)
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.take_along_axis(weights, ids, axis=-1)
    weights /= weights.sum(axis=-1, keepdims=True) if renormalize else total
    return weights, ids.astype(np.int32)


def experts(
    x: Any, weights: Any, ids: Any, gate_up: Any, down: Any, first_expert: int | None = None
) -> Any:
    """Gated-SiLU experts: the weighted sum of each token's chosen experts (arXiv 2401.04088).

    x `[T, hidden]`; weights and ids `[T, k]` as `route` gives them; gate_up
    `[experts, 2 * inner, hidden]`, gate rows first; down `[experts, hidden, inner]` -> new
    `[T, hidden]`. A token's experts are summed in the order of their ids; on a GPU, of its choices.
    Given `first_expert`, the weights hold only some experts, from that one on, and choices of
    others count nothing.
    """
    if is_cuda(x):
        from tensorray.kernels.cuda import moe as cuda

        return cuda.experts(x, weights, ids, gate_up, down, first_expert)
    return experts_numpy(x, weights, ids, gate_up, down, first_expert or 0)


def experts_numpy(
    x: Any, weights: Any, ids: Any, gate_up: Any, down: Any, first_expert: int = 0
) -> Any:
    """The twin of `experts`; its products are as `linear` makes them."""
    out = np.zeros_like(x)
    for expert in np.unique(ids):
        if not first_expert <= expert < first_expert + len(down):
            continue
        own = expert - first_expert
        rows, choice = np.nonzero(ids == expert)
        hidden = linear(x[rows], gate_up[own], gate="silu")
        out[rows] += weights[rows, choice, None] * linear(hidden, down[own])
    return out
