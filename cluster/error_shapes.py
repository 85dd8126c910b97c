"""Which shape an error has: each protocol's clients read their own."""

from __future__ import annotations

from tensorray.cluster.errors import ApiError
from tensorray.cluster.messages_errors import MessagesError
from tensorray.cluster.triton_errors import TritonError


def for_path(path: str, error: ApiError) -> ApiError:
    """The error in the shape that clients of that path read."""
    if path == "/v2" or path.startswith("/v2/"):
        return TritonError.of(error)
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return MessagesError.of(error)
    return error
