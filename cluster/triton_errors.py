"""Errors as Triton's clients read them: `{"error": "why"}`, where OpenAI's have an object."""

from __future__ import annotations

import msgspec

from tensorray.cluster.errors import ApiError


class TritonFault(msgspec.Struct):
    """What went wrong, and what to change."""

    error: str


class TritonError(ApiError):
    """An error in Triton's shape."""

    @classmethod
    def of(cls, error: ApiError) -> TritonError:
        return cls(error.status, error.message, headers=error.headers)

    def body(self) -> bytes:
        return msgspec.json.encode(TritonFault(self.message))
