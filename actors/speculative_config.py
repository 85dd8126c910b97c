"""How to speculate: `--speculative-config`, whose keys are vLLM's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Method = Literal["ngram", "draft_model", "medusa", "eagle", "eagle3"]

_LONGEST = 5  # suffix that prompt lookup looks for, where nothing is said
_SHORTEST = 2
_TOKENS = 5  # with its last known token, a CPU's kernels run a sequence's drafts in one pass

_REFUSED = {
    "mlp_speculator": "MLP speculators are not supported",
    "suffix": "suffix decoding is not supported; ngram is close to it",
    "mtp": "multi-token prediction layers are not supported",
    "deepseek_mtp": "multi-token prediction layers are not supported",
}


@dataclass(frozen=True)
class SpeculativeConfig:
    """Who guesses tokens, and how many.

    method: "ngram" looks them up in the sequence itself (arXiv 2304.04487); "draft_model" has a
    small model of the same vocabulary write them (arXiv 2302.01318); "medusa" has heads of their
    own on the model's last hidden state (arXiv 2401.10774); "eagle" and "eagle3" have a layer that
    guesses the model's next hidden states (arXiv 2401.15077, 2503.01840).
    model: the draft model's or the heads' checkpoint, by path or Hub id.
    num_speculative_tokens: the most guesses a sequence and step.
    prompt_lookup_max, prompt_lookup_min: the longest and shortest suffix to look up, in tokens.
    disable_by_batch_size: no guesses while more sequences than this decode.
    """

    method: Method
    model: str | None = None
    num_speculative_tokens: int = _TOKENS
    prompt_lookup_max: int = _LONGEST
    prompt_lookup_min: int = _SHORTEST
    disable_by_batch_size: int | None = None


def parse_speculative_config(given: Mapping[str, Any]) -> SpeculativeConfig | None:
    """A config from its JSON; None from an empty one. Raises ValueError naming the key."""
    if not given:
        return None
    given = dict(given)
    size = given.pop("draft_tensor_parallel_size", None)
    if size not in (None, 1):
        raise ValueError(
            "speculative_config: draft_tensor_parallel_size must be 1, as one shard guesses for "
            f"its replica, not {size!r}"
        )
    known = {item.name for item in fields(SpeculativeConfig)}
    if unknown := given.keys() - known:
        raise ValueError(
            f"speculative_config: unknown {', '.join(sorted(unknown))}; "
            f"there are {', '.join(sorted(known))}"
        )
    method = given.get("method", "draft_model" if given.get("model") else None)
    if method in _REFUSED:
        raise ValueError(f"speculative_config: method {method!r}: {_REFUSED[method]}")
    if method not in get_args(Method):
        raise ValueError(
            f"speculative_config: method must be one of {', '.join(get_args(Method))}, "
            f"not {method!r}"
        )
    values = {key: value for key, value in given.items() if value is not None}
    values["method"] = method
    model = values.get("model")
    if (method != "ngram") != isinstance(model, str):
        needs = "has no model" if method == "ngram" else "needs model, a path or Hub id"
        raise ValueError(f"speculative_config: method {method!r} {needs} (got {model!r})")
    for key in known - {"method", "model"}:
        value = values.get(key, 1)
        if type(value) is not int or value < 1:
            raise ValueError(f"speculative_config: {key} must be a number from 1 on, not {value!r}")
        if key in values and key.startswith("prompt_lookup") and method != "ngram":
            raise ValueError(f"speculative_config: {key} is for method ngram")
    longest, shortest = values.get("prompt_lookup_max"), values.get("prompt_lookup_min")
    if longest is not None and shortest is None:
        values["prompt_lookup_min"] = min(longest, _SHORTEST)
    elif shortest is not None and longest is None:
        values["prompt_lookup_max"] = max(shortest, _LONGEST)
    elif longest is not None and shortest is not None and longest < shortest:
        raise ValueError(
            f"speculative_config: prompt_lookup_max ({longest}) is less than prompt_lookup_min "
            f"({shortest})"
        )
    return SpeculativeConfig(**values)
