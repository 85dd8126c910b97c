"""Reading a checkpoint's model config: typed values, and errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tensorray.builder.model import ModelConfigError
from tensorray.builder.rope import RopeScaling, RopeSpec

T = TypeVar("T")

_ROPE_TYPES: dict[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}


class ConfigReader:
    """Typed access to a config; every failure is a `ModelConfigError` naming the key.

    A value under several names (`num_experts`, `num_local_experts`) is read by giving them all:
    the first that is there and not null counts. Without a default, one of them must be there.
    `section` is the key the mapping was found under, for messages ("" at the top level).
    """

    def __init__(self, config: Mapping[str, Any], section: str = "") -> None:
        self.config = config
        self.section = section

    def integer(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """A whole number, at least `minimum`."""
        key, value = self._find(keys, default)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole:
            raise self.error(key, f"must be a whole number, not {value!r}")
        if value < minimum:
            raise self.error(key, f"must be at least {minimum}, not {value}")
        return int(value)

    def number(self, *keys: str, default: float | None = None) -> float:
        """A positive, finite number."""
        key, value = self._find(keys, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"must be a number, not {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise self.error(key, f"must be a positive number, not {value}")
        return float(value)

    def boolean(self, *keys: str, default: bool | None = None) -> bool:
        key, value = self._find(keys, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def choice(self, *keys: str, among: Mapping[str, T], default: str | None = None) -> T:
        """What `among` has for the value."""
        key, value = self._find(keys, default)
        if not isinstance(value, str) or value not in among:
            raise self.error(key, f"{value!r} is not supported; supported: {_listed(among)}")
        return among[value]

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.config.get(key) is not None

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if self.has(key) else None

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; empty if the key is missing or null."""
        value = self.config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.error(key, f"must be a list of whole numbers, not {value!r}")
        return value

    def refuse(self, key: str, *accepted: Any) -> None:
        """Raise unless the key is missing, null, or one of the values a definition can honour."""
        value = self.config.get(key)
        if value is not None and value not in accepted:
            raise self.error(
                key, f"{value!r} is not supported; supported: {_listed((*accepted, None))}"
            )

    def subsection(self, key: str) -> ConfigReader | None:
        """The mapping under a key; None if the key is missing or null."""
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be a mapping, not {value!r}")
        return ConfigReader(value, self._path(key))

    def layer_kinds(self, num_layers: int) -> list[str] | None:
        """`layer_types`, checked: one of full_attention, sliding_attention for each layer."""
        kinds = self.config.get("layer_types")
        if kinds is None:
            return None
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise self.error("layer_types", f"must be a list of {num_layers} entries")
        for kind in kinds:
            if kind not in known:
                raise self.error(
                    "layer_types", f"{kind!r} is not supported; supported: {_listed(known)}"
                )
        return kinds

    def error(self, key: str, problem: str) -> ModelConfigError:
        return ModelConfigError(f"model config: {self._path(key)}: {problem}")

    def _path(self, key: str) -> str:
        return f"{self.section}.{key}" if self.section else key

    def _find(self, keys: tuple[str, ...], default: T | None) -> tuple[str, Any]:
        for key in keys:
            if self.config.get(key) is not None:
                return key, self.config[key]
        if default is None:
            raise self.error(" or ".join(keys), "is missing")
        return keys[0], default


def rope_spec(
    c: ConfigReader,
    head_dim: int,
    *,
    layer_type: str | None = None,
    default_base: float = 10000.0,
) -> RopeSpec:
    """The rotary embedding a config asks for, in either of its spellings.

    Old: `rope_theta` beside `rope_scaling`. New (transformers 5): `rope_parameters` with both,
    or a mapping of those by layer type, of which `layer_type` picks one. Keys of `rope_scaling`
    win, so that it can be set on top of a new config.
    """
    rope = _rope_section(c, layer_type)
    scaling = rope.choice("rope_type", "type", among=_ROPE_TYPES, default="default")
    base_of = rope if rope.has("rope_theta") else c
    share_of = rope if rope.has("partial_rotary_factor") else c
    base = base_of.number("rope_theta", default=default_base)
    rotary_dim = int(head_dim * share_of.number("partial_rotary_factor", default=1.0))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise c.error("head_dim", f"gives {rotary_dim} rotary dims; they must be even, in a head")
    trained = c.integer("max_position_embeddings")
    if scaling == "none":
        return RopeSpec(rotary_dim, trained, base)
    factor = rope.number("factor")
    if scaling == "linear":
        return RopeSpec(rotary_dim, trained, base, scaling, factor)
    original_of = c if c.has("original_max_position_embeddings") else rope
    original = original_of.integer("original_max_position_embeddings", default=trained)
    if scaling == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.error("high_freq_factor", f"must be above low_freq_factor ({low})")
        return RopeSpec(
            rotary_dim,
            trained,
            base,
            scaling,
            factor,
            original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    rope.refuse("truncate", True)
    return RopeSpec(
        rotary_dim,
        # Published configs state the context before the stretch (Qwen 2.5) or after it.
        max(trained, int(original * factor)),
        base,
        scaling,
        factor,
        original,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _rope_section(c: ConfigReader, layer_type: str | None) -> ConfigReader:
    """The mapping that says which rotary embedding a type of layer has; empty if none does."""
    parameters, scaling = c.subsection("rope_parameters"), c.subsection("rope_scaling")
    if parameters is None:
        return scaling or ConfigReader({})
    if not any(isinstance(value, Mapping) for value in parameters.config.values()):
        merged = {**parameters.config, **(scaling.config if scaling else {})}
        return ConfigReader(merged, parameters.section)
    kinds = _listed(parameters.config)
    if layer_type is None:
        raise c.error(
            "rope_parameters", f"goes by layer type ({kinds}); this model has one for all"
        )
    if scaling is not None:
        raise c.error("rope_scaling", f"would not say which of rope_parameters ({kinds}) to change")
    return parameters.subsection(layer_type) or ConfigReader({})


def _yarn_attention_factor(rope: ConfigReader, factor: float) -> float:
    """YaRN's temperature, on cosines and sines (arXiv 2309.00071, section 3.4)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    # DeepSeek's pair of keys; as published, either one missing or zero means neither.
    if rope.config.get("mscale") and rope.config.get("mscale_all_dim"):
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)


def _listed(items: Iterable[Any]) -> str:
    return ", ".join("null" if item is None else str(item) for item in items)
