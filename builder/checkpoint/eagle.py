"""EAGLE's drafts (arXiv 2401.15077, 2503.01840) as they are published.

The authors' files and vLLM's name the one layer `layers.0` (EAGLE) or `midlayer` (EAGLE-3), with or
without a prefix `model.`:

    fc.weight, fc.bias          [hidden, 2 * hidden]; EAGLE-3: [hidden, 3 * target hidden], no bias
    layers.0.self_attn.*, layers.0.mlp.*, layers.0.post_attention_layernorm.weight
    embed_tokens.weight         may be left out: the large model's own

and EAGLE-3's besides

    midlayer.input_layernorm.weight, midlayer.hidden_norm.weight, norm.weight
    lm_head.weight              [draft vocab, hidden]
    d2t                         int64 [draft vocab]: token i of the draft's is i + d2t[i]
    t2d                         bool [vocab]: which tokens these are, which d2t says already

The speculators library's files are EAGLE-3's, with the layer's config under a key of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import Checkpoint, CheckpointError
from tensorray.builder.checkpoint.tensor import TensorCheckpoint

_OFFSETS = "d2t"
_LEFT_OUT = (_OFFSETS, "t2d")
_LAYER = re.compile(r"^midlayer\.")
_STATES_NORM = "model.layers.0.hidden_norm.weight"  # EAGLE-3's alone
_PREFIXED = ("layers.", "norm.", "embed_tokens.")


def eagle_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A draft's config, all of it at the top level."""
    layer = config.get("transformer_layer_config") or {}
    return {**layer, **{key: value for key, value in config.items() if value is not None}}


def eagle_method(checkpoint: Checkpoint) -> str | None:
    """Which of "eagle" and "eagle3" the checkpoint is a draft of; None: of neither."""
    names = {_name(name) for name in checkpoint.names()}
    if "fc.weight" not in names:
        return None
    return "eagle3" if _STATES_NORM in names else "eagle"


def eagle_tensors(checkpoint: Checkpoint) -> TensorCheckpoint:
    """The checkpoint's weights, under the names that `builder.models.eagle` has for them."""
    assert isinstance(checkpoint, TensorCheckpoint)  # random weights are nobody's draft
    names = {_name(name): name for name in checkpoint.names() if name not in _LEFT_OUT}
    return checkpoint.renamed(names)


def draft_tokens(checkpoint: Checkpoint, count: int, vocab: int) -> NDArray[np.int64]:
    """The tokens that an EAGLE-3 draft's `count` logits are of, int64 [count].

    Raises CheckpointError for a table that does not fit.
    """
    tokens = np.arange(count)
    if _OFFSETS not in checkpoint.names():
        if count == vocab:
            return tokens
        raise CheckpointError(
            f"{checkpoint.path}: there is no tensor {_OFFSETS!r}, which says what the draft's "
            f"{count} tokens are of the model's {vocab}"
        )
    if checkpoint.shape(_OFFSETS) != (count,):
        raise CheckpointError(
            f"{checkpoint.file(_OFFSETS)}: tensor {_OFFSETS!r} has shape "
            f"{list(checkpoint.shape(_OFFSETS))}; the draft's config says {[count]}"
        )
    offsets = np.empty(count, np.int64)
    checkpoint.read(_OFFSETS, offsets, slice(None), slice(None), False)
    tokens += offsets
    if len(np.unique(tokens)) < count or tokens.min() < 0 or tokens.max() >= vocab:
        raise CheckpointError(
            f"{checkpoint.file(_OFFSETS)}: tensor {_OFFSETS!r} does not name {count} different "
            f"tokens of {vocab}"
        )
    return tokens


def _name(name: str) -> str:
    bare = _LAYER.sub("layers.0.", name.removeprefix("model."))
    return f"model.{bare}" if bare.startswith(_PREFIXED) else bare
