"""Directories that `--load-format dummy` serves: a published config, and a tokenizer for it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tensorray.builder.checkpoint.config import flatten_config
from tensorray.cluster.token_bytes import byte_level_alphabet

from .published_configs import PUBLISHED


def make_dummy_model(name: str, parent: Path) -> Path:
    """A directory `parent / name` with the published config and a byte-level tokenizer.

    Every token id of the model's vocabulary has a text: the bytes, then numbered words.
    """
    directory = parent / name
    directory.mkdir(parents=True, exist_ok=True)
    config = PUBLISHED[name].config
    (directory / "config.json").write_text(json.dumps(config))
    size = flatten_config(config, {})["vocab_size"]
    alphabet = [*byte_level_alphabet().values()]
    words = [f"word{i}" for i in range(size - len(alphabet))]
    vocab = {text: i for i, text in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
