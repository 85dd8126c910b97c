"""Why Serve could not deploy: the error that it keeps at the end of a traceback."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.schema import ServeStatus

# Of an exception, what stands before its message, and before those of errors that it quotes.
_KINDS = re.compile(r"\A(?:[A-Za-z_][\w.]*(?:Error|Exception|Failed|Exit): )+")

# The line before it, of a traceback's frames, which are indented.
_FRAME = re.compile(r"^[ \t].*\n(?=[A-Za-z_][\w.]*: )", re.MULTILINE)


def why_not_deployed(status: ServeStatus, application: str) -> str | None:
    """What the deployments of an application failed of; None if that is not known."""
    found = status.applications.get(application)
    deployments = found.deployments.values() if found is not None else ()
    reasons = [reason(each.message) for each in deployments if each.message]
    return "\n".join(dict.fromkeys(reasons)) or None


def reason(message: str) -> str:
    """The last exception's message in what Serve says of a deployment, or else all of it."""
    *_, last = _FRAME.split(message)
    return _KINDS.sub("", last, count=1).strip()
