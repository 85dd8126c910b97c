"""vLLM's `truncate_prompt_tokens`: prompts cut to what there is room for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field


def _some(most: int) -> int:
    if most == 0:
        raise ValueError("Input should be -1, for what the context has room for, or at least 1")
    return most


#: How many of a prompt's tokens to keep, at most; -1: as many as the context has room for.
TruncatePromptTokens = Annotated[int, Field(ge=-1), AfterValidator(_some)]


def shortened(
    tokens: Sequence[int], bare: Sequence[int], most: int, keep: Literal["start", "end"]
) -> list[int]:
    """The start, or the end, of a prompt: `most` tokens, as transformers' tokenizers cut them.

    `bare` are the prompt's tokens without those that the tokenizer adds (a beginning of sequence),
    which stay where they are and count.
    """
    size = len(bare)
    at = next((i for i in range(len(tokens) - size + 1) if [*tokens[i : i + size]] == [*bare]), -1)
    added = len(tokens) - size
    if at < 0 or most < added:  # what was added is not to be told apart, or does not fit
        at, size, added = 0, len(tokens), 0
    before, inside, after = tokens[:at], tokens[at : at + size], tokens[at + size :]
    room = min(most - added, size)
    cut = inside[:room] if keep == "start" else inside[size - room :]
    return [*before, *cut, *after]
