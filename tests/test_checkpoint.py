"""Opening directories of safetensors: slices, configs, and damage that is named before serving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from helpers import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tensorray.builder.checkpoint import (
    CheckpointError,
    eos_token_ids,
    open_checkpoint,
    open_files,
    resolve_path,
)
from tensorray.builder.checkpoint.config import flatten_config
from tensorray.builder.checkpoint.names import canonical_name, canonical_names
from tensorray.builder.checkpoint.tensor import DataFile, FileTensor
from tensorray.builder.load import load_weights
from tensorray.builder.model import ModelConfigError
from tensorray.builder.registry import resolve

Array = npt.NDArray[Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a tiny model's directory, to be damaged."""
    return Path(shutil.copytree(tiny_models.directory("llama2"), tmp_path / "model"))


def serve(directory: Path | str, **options: Any) -> None:
    """All that stands between a path and a loaded model."""
    checkpoint = open_checkpoint(str(directory), **options)
    try:
        load_weights(resolve(checkpoint.config)(checkpoint.config), checkpoint)
    finally:
        checkpoint.close()


# --- reading ----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_slice_of_any_layout(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Rows, columns, transposition, on tensors stored in order, permuted, or transposed."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    values = np.random.default_rng(0).random(shape, np.float32)
    path = tmp_path_factory.mktemp("slices") / "values"
    permuted = len(shape) < 3 and data.draw(st.booleans())
    swapped = len(shape) == 2 and not permuted and data.draw(st.booleans())
    order = np.array(data.draw(st.permutations(range(shape[0]))), np.intp) if permuted else None
    stored = np.empty_like(values)
    if order is None:
        stored = values.T if swapped else values
    else:
        stored[order] = values
    path.write_bytes(b"xyz" + np.ascontiguousarray(stored).tobytes())
    file = DataFile(path)
    tensor = FileTensor(
        stored=stored.shape,
        file=file,
        offset=3,
        row_bytes=4 * (stored.shape[-1] if len(shape) > 1 else 1),
        decode=lambda raw: raw.view(np.float32),
        order=order,
        transposed=swapped,
    )
    assert tensor.shape == shape
    transpose = len(shape) == 2 and data.draw(st.booleans())
    seen = values.T if transpose else values

    def cut(size: int) -> slice:
        start = data.draw(st.integers(0, size))
        return slice(start, data.draw(st.integers(start, size)))

    rows = cut(seen.shape[0])
    columns = cut(seen.shape[1]) if len(shape) > 1 else slice(None)
    expected = seen[rows] if len(shape) == 1 else seen[rows, columns]
    out = np.full(expected.shape, np.nan, np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorray.builder.checkpoint.tensor.PIECE_VALUES", 16)
        tensor.read(out, rows, columns, transpose)
    np.testing.assert_array_equal(out, expected)
    file.close()


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int64, np.uint8],
)
def test_dtypes(dtype: Any, tmp_path: Path) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    save_tensors(tmp_path, {"x": values, "scalar": np.array(7, np.float32)})
    checkpoint = open_checkpoint(str(tmp_path))
    out = np.empty((2, 3), np.float32)
    checkpoint.read("x", out, slice(1, 3), slice(0, 3), False)
    np.testing.assert_array_equal(out, values[1:3, :3].astype(np.float32))
    one = np.empty(1, np.float32)
    checkpoint.read("scalar", one, slice(None), slice(None), False)
    assert one == [7]
    checkpoint.close()


def save_tensors(directory: Path, tensors: dict[str, Array]) -> None:
    (directory / "config.json").write_text("{}")
    # The library's NumPy side has no float8, so its header is written by hand.
    header, data = {}, b""
    names = {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "uint8": "U8", "int64": "I64"}
    for name, array in tensors.items():
        kind = names.get(array.dtype.name, f"F{array.dtype.itemsize * 8}")
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": offsets}
        data += array.tobytes()
    head = json.dumps({**header, "__metadata__": {"format": "np"}}).encode()
    file = directory / "model.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def shard(directory: Path) -> list[Path]:
    """Split a directory's weights in two files under an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    files = []
    for i, part in enumerate((names[::2], names[1::2])):
        file = directory / f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, file)
        weight_map.update(dict.fromkeys(part, file.name))
        files.append(file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def test_shards_are_one_checkpoint(model: Path) -> None:
    whole = load_file(model / "model.safetensors")
    files = shard(model)
    checkpoint = open_checkpoint(str(model))
    assert set(checkpoint.names()) == set(whole)
    assert {checkpoint.file(name) for name in whole} == set(files)
    for name, array in whole.items():
        out = np.empty_like(array)
        checkpoint.read(name, out, slice(None), slice(None), False)
        np.testing.assert_array_equal(out, array)
    checkpoint.close()


def test_names_as_other_classes_saved_them() -> None:
    """A headless GPT-2, as the Hub has it, and both spellings of a wrapped text model."""
    assert canonical_name("h.0.ln_1.weight", "gpt2", False) == "transformer.h.0.ln_1.weight"
    assert canonical_name("h.0.ln_1.weight", "own", False) == "h.0.ln_1.weight"
    for name in ("language_model.model.norm.weight", "model.language_model.norm.weight"):
        assert canonical_name(name, None, False) == "model.norm.weight"


def test_a_model_saved_without_its_head_is_told_by_its_embedding() -> None:
    """One of another author may well call a layer `layers.0`: its names stay as they are."""
    names = ("layers.0.mlp.up_proj.weight", "norm.weight")
    headless = dict.fromkeys(("embed_tokens.weight", *names))
    assert set(canonical_names(headless, "qwen3")) == {f"model.{name}" for name in headless}
    own = dict.fromkeys(("embed.weight", *names))
    assert set(canonical_names(own, "toy")) == set(own)


def test_a_headless_gpt2_is_read(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_models.directory("gpt2"), tmp_path / "gpt2"))
    tensors = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    save_file(bare, directory / "model.safetensors")
    serve(directory)


# --- configs ----------------------------------------------------------------------------------


def test_text_config_is_lifted_and_overrides_win() -> None:
    config: dict[str, Any] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {"hidden_size": 8, "model_type": "gemma3_text", "architectures": ["X"]},
    }
    flat = flatten_config(config, {"hidden_size": 16})
    assert flat == {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3_text",
        "eos_token_id": [1, 106],
        "hidden_size": 16,
    }
    assert config["text_config"]["hidden_size"] == 8  # the input is left alone


def test_overrides_reach_the_config(model: Path) -> None:
    files = open_files(str(model), hf_overrides={"rope_theta": 5.0})
    assert files.config["rope_theta"] == 5.0
    assert not files.is_gguf
    checkpoint = open_checkpoint(str(model), hf_overrides={"vocab_size": 9})
    assert checkpoint.config["vocab_size"] == 9
    checkpoint.close()


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, {}, [2]),
        ({"eos_token_id": 2}, {"eos_token_id": [7, 8]}, [7, 8, 2]),
        ({"eos_token_id": [3, 2]}, {"eos_token_id": 3}, [3, 2]),
        ({"eos_token_id": None}, {"eos_token_id": None}, []),
        ({}, {}, []),
    ],
)
def test_every_eos_id_counts(
    config: dict[str, Any], generation: dict[str, Any], expected: list[int]
) -> None:
    assert eos_token_ids(config, generation) == expected


def test_generation_config_is_optional(model: Path) -> None:
    assert open_files(str(model)).generation_config["eos_token_id"] == 1
    (model / "generation_config.json").unlink()
    assert open_files(str(model)).generation_config == {}


def test_random_weights_need_the_config_only(tmp_path: Path) -> None:
    shutil.copy(tiny_models.directory("mixtral") / "config.json", tmp_path)
    serve(tmp_path, load_format="dummy")
    with pytest.raises(CheckpointError, match="no weights"):
        serve(tmp_path)


# --- what is wrong, named ---------------------------------------------------------------------


def rewrite_header(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])


def change_bytes(directory: Path, change: Callable[[bytes], bytes]) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))


def change_tensors(directory: Path, change: Callable[[dict[str, Array]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory: Path, **keys: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def only_pickles(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "weights.pth")


def lose_shard(directory: Path) -> None:
    shard(directory)[1].unlink()


def lose_from_shard(directory: Path) -> None:
    file = shard(directory)[0]
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file)


def lose_index(directory: Path) -> None:
    shard(directory)
    (directory / "model.safetensors.index.json").unlink()


def odd_index(directory: Path) -> None:
    shard(directory)
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


FILE = "model.safetensors"
NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "cut inside a tensor": (
        lambda d: change_bytes(d, lambda data: data[:-10]),
        [FILE, "tensor '", "truncated"],
    ),
    "cut inside the header": (
        lambda d: change_bytes(d, lambda data: data[:100]),
        [FILE, "truncated inside the header"],
    ),
    "empty file": (lambda d: change_bytes(d, lambda data: b""), [FILE, "0 bytes"]),
    "header is no JSON": (
        lambda d: change_bytes(d, lambda data: data[:8] + b"{nonsense" + data[17:]),
        [FILE, "header is not JSON"],
    ),
    "header is a list": (
        lambda d: change_bytes(d, lambda data: (2).to_bytes(8, "little") + b"[]"),
        [FILE, "not a JSON object"],
    ),
    "header of absurd length": (
        lambda d: change_bytes(d, lambda data: b"\xff" * 8 + data[8:]),
        [FILE, "not a safetensors file"],
    ),
    "unknown dtype": (
        lambda d: rewrite_header(d, lambda h: h[NORM].update(dtype="F4")),
        [FILE, NORM, "'F4'"],
    ),
    "offsets against the shape": (
        lambda d: rewrite_header(d, lambda h: h[NORM].update(shape=[31])),
        [FILE, NORM, "128 bytes", "[31]"],
    ),
    "offsets past the end": (
        lambda d: rewrite_header(d, lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 128])),
        [FILE, NORM, "truncated"],
    ),
    "offsets backwards": (
        lambda d: rewrite_header(d, lambda h: h[NORM].update(data_offsets=[128, 0])),
        [FILE, NORM, "impossible"],
    ),
    "entry without a shape": (
        lambda d: rewrite_header(d, lambda h: h[NORM].pop("shape")),
        [FILE, NORM, "malformed"],
    ),
    "wrong shape": (
        lambda d: change_tensors(d, lambda t: t.update({NORM: np.zeros(33, np.float32)})),
        [FILE, NORM, "[33]", "[32]"],
    ),
    "missing tensor": (
        lambda d: change_tensors(d, lambda t: t.pop(NORM)),
        [NORM, "missing"],
    ),
    "missing shard": (lose_shard, ["index.json", "1 of 2", "model-00002-of-00002.safetensors"]),
    "tensor of the index that its shard lacks": (
        lose_from_shard,
        ["model-00001-of-00002.safetensors", "lm_head.weight", "missing"],
    ),
    "shards without an index": (lose_index, ["2 safetensors files", "index.json"]),
    "index that leaves the directory": (odd_index, ["index.json", "lm_head.weight", "elsewhere"]),
    "index that is none": (
        lambda d: (shard(d), (d / "model.safetensors.index.json").write_text("[]")),
        ["index.json", "not a safetensors index"],
    ),
    "no config": (lambda d: (d / "config.json").unlink(), ["no config.json"]),
    "config is no JSON": (
        lambda d: (d / "config.json").write_text("{'a': 1}"),
        ["config.json", "not valid JSON"],
    ),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[1]"),
        ["config.json", "a JSON object was expected, not list"],
    ),
    "generation config is no JSON": (
        lambda d: (d / "generation_config.json").write_text("{"),
        ["generation_config.json", "not valid JSON"],
    ),
    "unknown architecture": (
        lambda d: edit_config(d, architectures=["MambaForCausalLM"]),
        ["MambaForCausalLM", "not supported", "LlamaForCausalLM"],
    ),
    "config of another size": (
        lambda d: edit_config(d, hidden_size=64),
        [FILE, "has shape", "[272, 32]", "[272, 64]"],
    ),
    "quantized by another tool": (
        lambda d: edit_config(d, quantization_config={"quant_method": "hqq"}),
        ["'hqq'", "not supported", "GGUF"],
    ),
    "pickles only": (only_pickles, ["pickles", "never loaded", "convert them to safetensors"]),
    "no weights": (lambda d: (d / FILE).unlink(), ["no weights"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each before a byte of any tensor is read."""
    change, words = DAMAGE[damage]
    change(model)
    monkeypatch.setattr(
        "tensorray.builder.checkpoint.tensor.StoredTensor.read",
        lambda *_: pytest.fail("a tensor was read"),
    )
    with pytest.raises((CheckpointError, ModelConfigError)) as caught:
        serve(model)
    for word in words:
        assert word in str(caught.value)


def test_a_file_that_shrinks_after_it_was_opened(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    change_bytes(model, lambda data: data[:4000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated.*tensor '"):
        load_weights(resolve(checkpoint.config)(checkpoint.config), checkpoint)
    checkpoint.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", ["no such file or directory", "org/name"]),
        ("file.txt", ["must be a .gguf file"]),
        ("model.safetensors", ["must be a .gguf file", "pass its directory"]),
        ("model.bin", ["pickles"]),
        ("garbage.gguf", ["not a GGUF file"]),
        ("several", ["several GGUF files", "a.gguf", "b.gguf"]),
        ("empty", ["no config.json"]),
    ],
)
def test_paths_that_are_no_model(name: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"not a model")
    elif name == "several":
        path.mkdir()
        (path / "a.gguf").write_bytes(b"")
        (path / "b.gguf").write_bytes(b"")
    elif name == "empty":
        path.mkdir()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    for word in (name, *words):
        assert word in str(caught.value)


def test_load_format_is_obeyed(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.gguf file"):
        resolve_path(str(model), load_format="gguf")
    gguf = model / "x.gguf"
    gguf.write_bytes(b"GGUF")
    assert resolve_path(str(model)) == model
    assert resolve_path(str(model), load_format="gguf") == gguf
    with pytest.raises(CheckpointError, match="load format asked for is safetensors"):
        resolve_path(str(gguf), load_format="safetensors")
