"""What of Ray's errors says why: they tell much, over many lines, and guess at more."""

from __future__ import annotations

# What Ray says of every process that has ended, whatever it knows of this one.
_GUESSES = " Some common causes include"


def reason_of(error: BaseException) -> str:
    """The line that says why, which comes last among the first few, without Ray's guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if "exit detail" in line or "cause" in line.lower():
            return line.partition(_GUESSES)[0]
    return lines[0] if lines else type(error).__name__
