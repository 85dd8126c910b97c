"""A model's tokenizer from its files: a directory in Hub layout, or a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tensorray.builder.checkpoint.gguf_header import read_metadata
from tensorray.cluster import gguf_tokenizer
from tensorray.cluster.sentencepiece_tokenizer import read_model
from tensorray.cluster.tokenizer import Tokenizer, TokenizerError


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file, or of a directory that has one of

    - tokenizer.json, the `tokenizers` library's own format;
    - tokenizer.model, SentencePiece's (needs the extra `sentencepiece`);
    - vocab.json and merges.txt, GPT-2's byte-level BPE.

    A directory's tokenizer_config.json and special_tokens_map.json name the special tokens and
    hold chat templates; chat_template.jinja comes before the latter. Raises TokenizerError
    naming the file at fault.
    """
    if path.is_file():
        try:
            return gguf_tokenizer.from_metadata(read_metadata(path))
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None
    config = _read_json(path / "tokenizer_config.json")
    try:
        backend = _backend(path, config)
        return _with_conventions(backend, path, config)
    except TokenizerError as error:
        message = str(error)
        raise TokenizerError(
            message if message.startswith(str(path)) else f"{path}: {message}"
        ) from error.__cause__


def _backend(directory: Path, config: Mapping[str, Any]) -> Backend:
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            return Backend.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file}: not a valid tokenizer: {error}") from error
    sentencepiece = directory / "tokenizer.model"
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if sentencepiece.is_file():
        backend = read_model(sentencepiece)
    elif vocab.is_file() and merges.is_file():
        backend = _gpt2(vocab, merges, config)
    else:
        raise TokenizerError(
            f"{directory}: no tokenizer: neither tokenizer.json nor tokenizer.model nor "
            "vocab.json with merges.txt; pass --tokenizer"
        )
    _add_tokens(backend, directory, config)
    return backend


def _gpt2(vocab: Path, merges: Path, config: Mapping[str, Any]) -> Backend:
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:
        raise TokenizerError(f"{vocab}: not a valid vocabulary: {error}") from error
    backend = Backend(model)
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(backend: Backend, directory: Path, config: Mapping[str, Any]) -> None:
    """Tokens that formats without a place for them list beside the vocabulary."""
    listed: dict[int, AddedToken] = {
        int(id): AddedToken(token, special=False, normalized=False)
        for token, id in _read_json(directory / "added_tokens.json").items()
    }
    for id, fields in config.get("added_tokens_decoder", {}).items():
        known = {key: fields[key] for key in ("lstrip", "rstrip", "single_word") if key in fields}
        listed[int(id)] = AddedToken(
            fields["content"], special=bool(fields.get("special")), normalized=False, **known
        )
    for id, token in sorted(listed.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != id:
            raise TokenizerError(
                f"added token {token.content!r} has id {id} in tokenizer_config.json or "
                f"added_tokens.json, but {backend.token_to_id(token.content)} in the vocabulary"
            )
    named = _special_tokens(directory, config).values()
    backend.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in named
            if backend.token_to_id(name) is not None
        ]
    )


def _with_conventions(backend: Backend, directory: Path, config: Mapping[str, Any]) -> Tokenizer:
    names = _special_tokens(directory, config)
    bos, eos = (
        backend.token_to_id(names[name]) if name in names else None
        for name in ("bos_token", "eos_token")
    )
    prefix, suffix = _surroundings(backend)
    if bos is not None and set(prefix) <= {bos} and "add_bos_token" in config:
        prefix = [bos] if config["add_bos_token"] else []
    if eos is not None and set(suffix) <= {eos} and "add_eos_token" in config:
        suffix = [eos] if config["add_eos_token"] else []
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[] if eos is None else [eos],
        prefix_ids=prefix,
        suffix_ids=suffix,
        special_tokens=names,
        chat_templates=_chat_templates(directory, config),
    )


def _surroundings(backend: Backend) -> tuple[list[int], list[int]]:
    """What the tokenizer's post-processor puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    names = {}
    for source in (_read_json(directory / "special_tokens_map.json"), config):
        for key, value in source.items():
            token = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(token, str) and key.endswith("_token"):
                names[key] = token
    return names


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    found = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates["default"] = found
    elif isinstance(found, list):
        try:
            templates = {str(entry["name"]): str(entry["template"]) for entry in found}
        except (KeyError, TypeError):
            raise TokenizerError(
                f"{directory / 'tokenizer_config.json'}: chat_template must be a template, or a "
                "list of objects with a name and a template"
            ) from None
    legacy = _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(legacy, str):
        templates["default"] = legacy
    for name, file in _template_files(directory):
        templates[name] = file.read_text(encoding="utf-8")
    return templates


def _template_files(directory: Path) -> Iterable[tuple[str, Path]]:
    default = directory / "chat_template.jinja"
    if default.is_file():
        yield "default", default
    for file in sorted(directory.glob("additional_chat_templates/*.jinja")):
        yield file.stem, file


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
        json.dumps(value, ensure_ascii=False).encode()  # an unpaired surrogate is no text
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value
