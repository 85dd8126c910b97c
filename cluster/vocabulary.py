"""A model's vocabulary, as guided decoding on its shards needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorray.actors.guidance import Vocabulary
    from tensorray.cluster.config import EngineConfig
    from tensorray.cluster.tokenizer import Tokenizer


def load_vocabulary(config: EngineConfig) -> Vocabulary:
    """That of the model a config names. Raises what `Frontend.load` raises."""
    from tensorray.cluster.frontend import Frontend

    frontend = Frontend.load(config)
    return vocabulary(frontend.tokenizer, frontend.eos_token_ids)


def vocabulary(tokenizer: Tokenizer, ends: Sequence[int]) -> Vocabulary:
    """A tokenizer's, with the tokens that end a text."""
    from tensorray.actors.guidance import Vocabulary

    spelled = tokenizer.token_bytes
    tokens = [spelled[token] for token in range(tokenizer.vocab_size)]
    control = frozenset(tokenizer.control_ids)
    by_bytes = {data: id for id, data in enumerate(tokens) if data and id not in control}
    longest = max(map(len, by_bytes), default=0)

    def encode(data: bytes) -> list[int]:
        try:
            ids = tokenizer.encode(data.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            ids = []
        if b"".join([tokens[id] for id in ids]) == data:
            return ids
        # The tokenizer has put a space before it, or these are parts of characters.
        ids, at = [], 0
        while at < len(data):
            pieces = (data[at:end] for end in range(min(at + longest, len(data)), at, -1))
            piece = next((piece for piece in pieces if piece in by_bytes), None)
            if piece is None:
                break  # the model can't write it
            ids.append(by_bytes[piece])
            at += len(piece)
        return ids

    return Vocabulary(tokens, sorted(control), list(ends), encode)
