"""What an EAGLE draft is made of: a checkpoint's layer, and parts of the model it drafts for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import Checkpoint
from tensorray.builder.checkpoint.eagle import draft_tokens, eagle_config, eagle_tensors
from tensorray.builder.load import load_weights
from tensorray.builder.model import Model, ModelConfigError, ShardWeights, Weights
from tensorray.builder.models.eagle import Eagle, Eagle3


@dataclass(frozen=True)
class EagleParts:
    """A draft that is loaded, and what it takes of the model it drafts for, held whole."""

    draft: Eagle
    layer: Weights
    head: Weights  # an EAGLE-3 draft's own
    target: Model
    target_head: Weights  # empty for an EAGLE-3 draft
    #: The tokens that an EAGLE-3 draft's logits are of, int64 [draft vocab].
    tokens: NDArray[np.int64] | None
    #: Whose embedding is read, and its weights.
    embedder: Model
    embed: Weights

    @property
    def nbytes(self) -> int:
        """Bytes that a guess reads."""
        head = self.target_head if self.tokens is None else self.head
        return sum(array.nbytes for group in (self.layer, head) for array in group.arrays.values())


def load_eagle(
    kind: type[Eagle],
    checkpoint: Checkpoint,
    model: Model,
    weights: ShardWeights,
    open_model: Callable[[], Checkpoint],
) -> EagleParts:
    """The draft of a checkpoint, for a model that is loaded.

    `open_model` opens the model's checkpoint, for what a tensor-parallel rank has only a part of.
    Raises CheckpointError or ModelConfigError saying what does not fit.
    """
    if kind is Eagle:
        for part in ("final_norm", "project"):
            if getattr(type(model), part) is getattr(Model, part):
                raise ModelConfigError(
                    f"--speculative-config: {type(model).__name__} does not say what the parts of "
                    f"its head are (Model.{part}), which an EAGLE draft goes between"
                )
    tensors = eagle_tensors(checkpoint)
    draft = kind(eagle_config(checkpoint.config), model, set(tensors.names()))
    own = load_weights(draft, tensors, dtype=np.float32)
    tokens = None
    if isinstance(draft, Eagle3):
        tokens = draft_tokens(checkpoint, draft.draft_vocab_size, model.vocab_size)
    target, ends = model, weights
    if model.layout.size > 1:
        target = type(model)(model.config)
        whole = open_model()
        try:
            ends = load_weights(target, whole, layers=range(0), dtype=np.float32)
        finally:
            whole.close()
    embedder: Model = draft
    embed = own.embed
    if not draft.has_embedding or _is(embed.tokens, ends.embed.get("tokens")):
        embedder, embed = target, ends.embed  # no second copy of what training left as it is
    target_head = ends.head if tokens is None else Weights()
    return EagleParts(draft, own.layers[0], own.head, target, target_head, tokens, embedder, embed)


def _is(one: NDArray[np.float32], other: object) -> bool:
    """Whether two tables are the same numbers."""
    return isinstance(other, np.ndarray) and np.array_equal(one, other)
