"""Which shape an error has: each protocol's clients read their own."""

from __future__ import annotations

import re

from tensorray.cluster.errors import ApiError
from tensorray.cluster.messages_errors import MessagesError
from tensorray.cluster.triton_errors import TritonError

_TRITON = re.compile(r"/v2(/health|/models|/?$)")  # /v2/rerank has another protocol


def for_path(path: str, error: ApiError) -> ApiError:
    """The error in the shape that clients of that path read."""
    if _TRITON.match(path):
        return TritonError.of(error)
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return MessagesError.of(error)
    return error
