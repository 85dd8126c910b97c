"""How a model pools hidden states, where a request does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

PoolingType = Literal["last", "mean", "cls"]

# Sentence Transformers' file beside a checkpoint, its keys, and what they are called here.
_POOLING_FILE = Path("1_Pooling") / "config.json"
_MODES: dict[str, PoolingType] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}


def find_pooling_type(asked: Literal["auto"] | PoolingType, model: Path) -> PoolingType:
    """What `--pooling-type` comes to: "auto" is what a Sentence Transformers checkpoint says, or
    the last token. Raises ValueError for a checkpoint that wants what is not supported."""
    if asked != "auto":
        return asked
    path = model / _POOLING_FILE
    if not path.is_file():
        return "last"
    try:
        config = json.loads(path.read_text())
        wanted = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not Sentence Transformers' JSON: {error}") from None
    if len(wanted) == 1 and wanted[0] in _MODES:
        return _MODES[wanted[0]]
    raise ValueError(
        f"{path}: {' and '.join(wanted) or 'no pooling mode'} is not supported; choose one with "
        "--pooling-type"
    )
