"""API keys as they are kept: SHA-256 digests, which are enough for random keys."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def new_key() -> str:
    """A random key, of 256 bits."""
    return f"tr-{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """A key as it is kept; a digest stays as it is."""
    if _DIGEST.fullmatch(key):
        return key
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: str | Path) -> dict[str, str]:
    """The keys of a file, digest to name: `sha256:HEX NAME` a line, `#` for comments.

    Raises ValueError for anything else, such as a key itself, and for a file without keys.
    """
    keys: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if not _DIGEST.fullmatch(words[0]) or len(words) > 2:
            raise ValueError(  # without the line, which may be a key
                f"{path}:{number}: a line is a key's digest, sha256:..., and a name; "
                "`tensorray api-key` makes both"
            )
        keys[words[0]] = words[-1] if len(words) == 2 else f"key {number}"
    if not keys:
        raise ValueError(f"{path}: holds no keys, so nobody could use the server")
    return keys


def add_key(path: str | Path, name: str) -> str:
    """Make a key, add its digest to a file, and return the key. Raises ValueError for a name that
    is no word or taken."""
    if not re.fullmatch(r"[^\s#]+", name):
        raise ValueError(f"a key's name is one word (got {name!r})")
    file = Path(path)
    if file.exists() and file.read_text().strip() and name in read_keys(file).values():
        raise ValueError(f"{path} has a key named {name} already; remove that line first")
    key = new_key()
    with open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as out:
        out.write(f"{digest(key)} {name}\n")
    return key
