"""From a checkpoint's config, or a user's own choice, to the definition that runs it."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tensorray.builder.model import Model, ModelConfigError
from tensorray.builder.models.gemma2 import Gemma2
from tensorray.builder.models.gemma3 import Gemma3
from tensorray.builder.models.gpt2 import GPT2
from tensorray.builder.models.llama import Llama
from tensorray.builder.models.mistral import Mistral
from tensorray.builder.models.mixtral import Mixtral
from tensorray.builder.models.qwen2 import Qwen2
from tensorray.builder.models.qwen3 import Qwen3
from tensorray.builder.models.qwen3_moe import Qwen3Moe

DEFINITIONS: tuple[type[Model], ...] = (
    Llama,
    Mistral,
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma2,
    Gemma3,
    GPT2,
)

#: Hugging Face `architectures` entry -> definition.
ARCHITECTURES: dict[str, type[Model]] = {
    name: definition for definition in DEFINITIONS for name in definition.architectures
}


def resolve(config: Mapping[str, Any], model_class: str | None = None) -> type[Model]:
    """The definition for a config's `architectures`, or the one that `model_class` names.

    `model_class` is `pkg.module:Class` or `path/to/file.py:Class`. Raises ModelConfigError saying
    what there is to choose from.
    """
    if model_class is not None:
        return load_class(model_class)
    names = config.get("architectures") or []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelConfigError("model config: architectures: must be a list of names")
    for key, unlike in (("is_causal", False), ("use_bidirectional_attention", True)):
        if config.get(key) is unlike:
            raise ModelConfigError(
                f"model config: {key}: {str(unlike).lower()} is not supported: tokens attend to "
                "earlier ones only"
            )
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    known = ", ".join(ARCHITECTURES)
    if not names:
        raise ModelConfigError(
            f"model config: architectures: is missing; supported: {known}. "
            "A model of your own runs with --model-class"
        )
    near = difflib.get_close_matches(str(names[0]), ARCHITECTURES, n=2, cutoff=0.75)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ModelConfigError(
        f"model config: architectures: {', '.join(map(str, names))} is not supported{hint}; "
        f"supported: {known}. A model of your own runs with --model-class"
    )


def load_class(model_class: str) -> type[Model]:
    """A definition outside this package; raises ModelConfigError saying what is wrong with it."""
    where, separator, name = model_class.rpartition(":")
    if not separator or not where or not name:
        raise ModelConfigError(
            f"--model-class {model_class}: must be pkg.module:Class or path/to/file.py:Class"
        )
    try:
        module = load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except FileNotFoundError:
        raise ModelConfigError(f"--model-class {model_class}: there is no file {where}") from None
    except ModuleNotFoundError as error:
        raise ModelConfigError(f"--model-class {model_class}: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Model)):
        there = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, Model)
            and value.__module__ == module.__name__
        ]
        problem = "is not a subclass of tensorray.builder.model.Model" if found else "is not there"
        raise ModelConfigError(
            f"--model-class {model_class}: {name} {problem}; models in {where}: {', '.join(there)}"
        )
    return found


def load_file(path: Path) -> ModuleType:
    """Import a file under a name of its own; the same module when it is asked for unchanged.

    Raises whatever reading and running it raises.
    """
    path = path.expanduser().resolve()
    source = path.read_bytes()
    name = f"tensorray_user_{path.stem}_{hashlib.sha256(source).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles of the module's classes look it up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
