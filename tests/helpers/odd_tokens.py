"""A logits processor of a user's, for the file that --logits-processors names."""

from __future__ import annotations

from typing import Any


class Odd:
    """Runs on the host: tokens are odd and even in turn."""

    def __call__(self, output: list[int], prompt: list[int], logits: Any) -> None:
        logits[len(output) % 2 :: 2] = float("-inf")
