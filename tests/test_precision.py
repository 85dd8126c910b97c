"""Which dtypes a model computes in."""

from __future__ import annotations

import pytest
from helpers.tiny_models import NAMES, directory

from tensorray.builder.checkpoint import open_checkpoint
from tensorray.builder.graph import DTypes
from tensorray.builder.precision import choose_dtypes
from tensorray.builder.registry import resolve

WIDE = ("gemma2", "gemma3", "qwen2", "qwen3")  # and what is named after them


@pytest.mark.parametrize("name", NAMES)
def test_the_residual_stream_is_wide_where_float16_might_not_hold_it(name: str) -> None:
    checkpoint = open_checkpoint(str(directory(name)))
    checkpoint.close()
    wide = resolve(checkpoint.config).wide_residual
    assert wide == name.startswith(WIDE)
    found = choose_dtypes({"dtype": "float16"}, model=name, wide_residual=wide)
    assert found == DTypes("float16", "float32" if wide else "float16")


@pytest.mark.parametrize("wide", [False, True])
def test_what_is_asked_or_as_wide_as_that_stays(wide: bool) -> None:
    config = {"torch_dtype": "bfloat16"}
    assert choose_dtypes(config, model="m", wide_residual=wide) == DTypes("bfloat16", "bfloat16")
    asked = choose_dtypes({}, model="m", wide_residual=wide, dtype="float16", residual="bfloat16")
    assert asked == DTypes("float16", "bfloat16")


def test_a_checkpoint_that_says_nothing() -> None:
    with pytest.raises(ValueError, match="m says nothing usable of its dtype"):
        choose_dtypes({}, model="m", wide_residual=False)
    found = choose_dtypes({}, model="m", wide_residual=True, unstated="float16")
    assert found == DTypes("float16", "float32")
