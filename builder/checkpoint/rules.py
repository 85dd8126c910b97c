"""Rules by which quantization configs name modules."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase


def names_module(entry: str, module: str) -> bool:
    """Whether an entry of a list of modules ("lm_head", "mlp.gate", "*.router*") is about one.

    It is if its dotted parts are somewhere among the module's, in one run, or if as a pattern it
    matches all of the module's name.
    """
    for name in spellings(module):
        if f".{entry}." in f".{name}." or ("*" in entry and fnmatchcase(name, entry)):
            return True
    return False


def matches_target(target: str, module: str) -> bool:
    """Whether a target of compressed-tensors ("Linear", "re:.*q_proj", a name) is about a linear
    module: by its class, by a regular expression from the name's start on, or by the name."""
    if target.startswith("re:"):
        pattern = re.compile(target.removeprefix("re:"))
        return any(pattern.match(name) for name in spellings(module))
    return target == "Linear" or target in spellings(module)


def spellings(module: str) -> list[str]:
    """A module's name, and what it is called inside a multimodal model (see names.py)."""
    return [
        module,
        f"language_model.{module}",
        f"model.language_model.{module.removeprefix('model.')}",
    ]
