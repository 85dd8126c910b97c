"""An EAGLE draft that is a table: a token's hidden state is itself, and so is all that it guesses
from. What follows a token has the logits of its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.actors.drafter import Guess, Seen
from tensorray.actors.eagle import EagleDraft
from tensorray.actors.eagle_parts import EagleParts
from tensorray.actors.protocol import KVGroups
from tensorray.builder.model import Weights
from tensorray.builder.models.eagle import Eagle
from tensorray.builder.models.llama import Llama

BLOCK, WINDOW = 16, 4


class TableEagle:
    """Guesses for one sequence, whose tokens it is given anew each time."""

    def __init__(self, table: NDArray[np.float32], longest: int) -> None:
        """`table` float32 [vocab, vocab]."""
        vocab = len(table)
        sizes = {"vocab_size": vocab, "hidden_size": vocab, "intermediate_size": 2}
        config: dict[str, Any] = {
            **sizes,
            "num_attention_heads": 1,
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "max_position_embeddings": longest,
        }
        target = Llama(config)
        shapes = {"qkv": (3 * vocab, vocab), "o": (vocab, vocab), "gate_up": (4, vocab)}
        layer = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        layer["down"] = np.zeros((vocab, 2), np.float32)
        layer["mlp_norm"] = np.ones(vocab, np.float32)
        layer["fc"] = np.eye(vocab, 2 * vocab, dtype=np.float32)
        head = Weights({"norm": np.ones(vocab, np.float32), "tokens": table.T.copy()})
        embed = Weights({"tokens": np.eye(vocab, dtype=np.float32)})
        parts = EagleParts(
            Eagle(config, target, set()), Weights(layer), Weights(), target, head, None, target,
            embed,
        )  # fmt: skip
        blocks = -(-longest // BLOCK)
        groups = KVGroups([WINDOW], blocks, BLOCK)
        self._vocab = vocab
        self._draft = EagleDraft(parts, groups, cost=0.0, max_model_len=longest)
        self._draft.resize(blocks)
        self._tables = [np.arange(blocks, dtype=np.int32)[None]]
        self._known = 1

    def guesses(self, tokens: Sequence[int], room: int, guess: Guess) -> list[int]:
        """What may follow `tokens`, which begin with those of the call before."""
        if len(tokens) == 1:
            return []  # the first token has not run yet
        new = np.array(tokens[self._known :], np.int32)
        rows = np.zeros((len(new), self._vocab), np.float32)
        first = np.array([self._known - 1], np.int32)
        counts = np.array([len(new)], np.int32)
        self._draft.watch(Seen([0], counts, first, new, self._tables, {1: rows}))
        self._known = len(tokens)
        return self._draft.draft([0], [room], self._tables, guess)[0]
