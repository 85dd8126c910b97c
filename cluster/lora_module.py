"""How users name adapters: LoraModule in flags and config files, LoRARequest in calls of `LLM`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LoraModule(BaseModel):
    """`name=path`, or a mapping of these, in JSON on the command line (as vLLM's)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="What requests call it, as their model")
    path: str = Field(min_length=1, description="A directory, or a Hub id")
    base_model_name: str | None = Field(None, description="Taken as vLLM's; not used")

    @model_validator(mode="before")
    @classmethod
    def _spelled(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            try:
                return json.loads(value)
            except ValueError as error:
                raise ValueError(f"not JSON: {error}") from None
        name, separator, path = value.partition("=")
        if not separator:
            raise ValueError("an adapter is NAME=PATH, or JSON with name and path")
        return {"name": name.strip(), "path": path.strip()}


@dataclass(frozen=True)
class LoRARequest:
    """An adapter for a call of `LLM`, as vLLM spells it: it is loaded when first asked for. Another
    number or path under the same name is another version, which takes its place."""

    lora_name: str
    lora_int_id: int
    lora_path: str


def check_modules(modules: Iterable[LoraModule]) -> None:
    """Raise CheckpointError for an adapter on this machine that no model could be served with."""
    from tensorray.builder.checkpoint.peft import open_adapter

    for module in modules:
        path = Path(module.path).expanduser()
        if path.is_dir():
            open_adapter(path)
