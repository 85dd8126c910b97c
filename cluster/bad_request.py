"""The one error for what a user got wrong."""

from __future__ import annotations


class BadRequest(ValueError):
    """The request can't be served as it is; the message says what to change.

    `param` names the request's field at fault, where it is one. Over HTTP this is a 400.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
