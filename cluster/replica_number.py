"""Which of its deployment's replicas this process is, as Serve counts them."""

from __future__ import annotations

from ray import serve


def replica_number() -> int:
    """From 0 on; a replica that is replaced leaves its number to its successor."""
    rank = getattr(serve.get_replica_context(), "rank", 0)
    return int(getattr(rank, "rank", rank) or 0)
