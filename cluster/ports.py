"""Whether a port is free to serve on."""

from __future__ import annotations

import socket

from tensorray.cluster.usage_error import UsageError


def require_free_port(
    host: str, port: int, remedy: str = "choose another by --port or --host"
) -> None:
    """Raises UsageError when something listens there already.

    Serve's proxy would listen beside it, and requests go to either.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UsageError(
            f"port {port} on {host} can't be used ({error.strerror}); {remedy}"
        ) from None
