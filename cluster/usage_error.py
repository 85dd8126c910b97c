"""What a command says to a user who asked for something that can't be."""

from __future__ import annotations


class UsageError(ValueError):
    """The command line or an input file is wrong; the message says what to change."""
