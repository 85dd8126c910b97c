"""Prompts in a JSON-lines file: one object a line, for batches and benchmarks alike."""

from __future__ import annotations

from pathlib import Path

import msgspec


class PromptLine(msgspec.Struct):
    """`{"prompt": "text"}`, or `{"prompt_token_ids": [1, 2]}`, which wins where both are given.

    `max_tokens` overrides the run's own for this prompt; other keys are ignored.
    """

    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    max_tokens: int | None = None

    @property
    def content(self) -> str | list[int]:
        return self.prompt_token_ids if self.prompt_token_ids is not None else self.prompt or ""


def read_prompts(path: str | Path) -> list[PromptLine]:
    """All prompts of a file; blank lines are skipped.

    Raises ValueError naming file and line, and OSError when the file can't be read.
    """
    prompts = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=PromptLine)
        except msgspec.DecodeError as error:  # ValidationError is one
            raise ValueError(f"{path}:{number}: {error}") from None
        if entry.prompt is None and entry.prompt_token_ids is None:
            raise ValueError(f'{path}:{number}: needs a "prompt" or "prompt_token_ids"')
        prompts.append(entry)
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts
