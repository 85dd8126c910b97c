"""Other trainers' checkpoints: converted, they are the model they were made of, to the bit."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import yaml
from helpers import megatron_files, tiny_models, torch_files
from helpers.paged_run import PagedRun
from safetensors.numpy import load_file

from tensorray.builder.checkpoint import CheckpointError, open_checkpoint
from tensorray.builder.checkpoint.convert import plan, write
from tensorray.builder.load import load_weights
from tensorray.builder.registry import resolve
from tensorray.cluster.convert_command import run

Array = npt.NDArray[Any]
PADDED = 384  # rows of a vocabulary of 272, as a trainer pads it


def original(name: str) -> tuple[dict[str, Array], dict[str, Any]]:
    directory = tiny_models.directory(name)
    config = json.loads((directory / "config.json").read_text())
    return load_file(directory / "model.safetensors"), config


def assert_is(name: str, directory: Path) -> None:
    """The directory's model gives the fixture's logits."""
    checkpoint = open_checkpoint(str(directory))
    try:
        model = resolve(checkpoint.config)(checkpoint.config)
        weights = load_weights(model, checkpoint)
    finally:
        checkpoint.close()
    run = PagedRun(model, weights)
    for i, reference in enumerate(tiny_models.references(name)):
        [logits] = run.step([(str(i), reference.prompt)])
        assert np.abs(logits - reference.logits).max() < 1e-4


def convert(source: Path, target: Path, *, vocab_size: int | None = None) -> Path:
    write(plan(source, vocab_size=vocab_size), target)
    return target


def nemo_archive(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# --- NeMo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_nemo_llama(name: str, tmp_path: Path) -> None:
    """Grouped queries, a padded vocabulary, Transformer Engine's state beside the weights."""
    tensors, settings = megatron_files.llama(*original(name), PADDED)
    state = {**tensors, "model.decoder.layers.0.self_attention.core_attention._extra_state": None}
    files = {
        "model_config.yaml": yaml.safe_dump(settings).encode(),
        "model_weights.ckpt": torch_files.torch_bytes(state),
        "0123456789abcdef0123456789abcdef_tokenizer.model": b"a tokenizer",
    }
    source = nemo_archive(tmp_path / "tiny.nemo", files)
    result = convert(source, tmp_path / "result")
    assert_is(name, result)
    assert (result / "tokenizer.model").read_bytes() == b"a tokenizer"
    assert json.loads((result / "config.json").read_text())["vocab_size"] == 272


def test_nemo_gpt(tmp_path: Path) -> None:
    tensors, settings = megatron_files.gpt(*original("gpt2"), PADDED)
    files = {
        "model_config.yaml": yaml.safe_dump(settings).encode(),
        "model_weights.ckpt": torch_files.torch_bytes(tensors),
    }
    source = nemo_archive(tmp_path / "tiny.nemo", files)
    job = plan(source)
    assert job.conversion.config["vocab_size"] == PADDED
    assert "--vocab-size" in job.conversion.notes[0]
    assert_is("gpt2", convert(source, tmp_path / "result", vocab_size=272))


def pieces(array: Array, rows: int) -> list[tuple[tuple[int, ...], Array]]:
    """An array cut along its first two axes, as pipeline and tensor-parallel ranks would."""
    found = []
    for i in range(0, array.shape[0], rows):
        part = array[i : i + rows]
        if array.ndim == 1:
            found.append(((i,), part))
            continue
        half = array.shape[1] // 2
        rest = (0,) * (array.ndim - 2)
        found.append(((i, 0, *rest), np.ascontiguousarray(part[:, :half])))
        found.append(((i, half, *rest), np.ascontiguousarray(part[:, half:])))
    return found


@pytest.mark.parametrize("layout", ["torch_dist", "zarr"])
def test_distributed_llama(layout: str, tmp_path: Path) -> None:
    """Stacked layers in pieces, NeMo 2's folders and nested config."""
    tensors, settings = megatron_files.llama(*original("llama3"), PADDED)
    source = tmp_path / "nemo2"
    (source / "context").mkdir(parents=True)
    nested = {"_target_": "LlamaModel", "config": settings}
    (source / "context/model.yaml").write_text(yaml.safe_dump(nested))
    named = megatron_files.stacked(tensors)
    named = {name.replace("model.", "module.", 1): array for name, array in named.items()}
    if layout == "torch_dist":
        cut = {name: pieces(array, max(1, len(array) // 2)) for name, array in named.items()}
        torch_files.torch_dist(source / "weights", cut)
    else:
        for name, array in named.items():
            chunks = tuple(max(1, (size * 2) // 3) for size in array.shape)  # the last is padded
            torch_files.zarr(source / "weights" / name, array, chunks)
    job = plan(source)
    label = "module.decoder.layers.self_attention.linear_qkv.weight[1]"
    target = job.conversion.targets["model.layers.1.self_attn.k_proj.weight"]
    assert target.source.label == label
    assert_is("llama3", convert(source, tmp_path / "result"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "layernorm1p"}, "normalization: 'layernorm1p' is not supported"),
        ({"num_moe_experts": 8}, "num_moe_experts: 8 is not supported"),
        ({"activation": "squared-relu"}, "activation: 'squared-relu' is not supported"),
        ({"num_layers": None}, "num_layers: is missing"),
        ({"num_query_groups": 3}, "num_query_groups: 3 does not divide"),
        ({"ffn_hidden_size": 40}, "linear_fc1.weight: 64 rows, but by its config it has 80"),
        ({"num_layers": 3}, "nothing becomes model.layers.2."),
        ({"override_vocab_size": 999}, "fewer than the vocabulary's 999"),
    ],
)
def test_what_cannot_be_served_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tensors, settings = megatron_files.llama(*original("llama2"), PADDED)
    (tmp_path / "model_weights.ckpt").write_bytes(torch_files.torch_bytes(tensors))
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(settings | change))
    with pytest.raises(CheckpointError) as caught:
        plan(tmp_path)
    assert message in str(caught.value)


def test_ranks_and_compression_say_what_to_do(tmp_path: Path) -> None:
    config = yaml.safe_dump({"num_layers": 1}).encode()
    weights = torch_files.torch_bytes({"x": np.zeros(1, np.float32)})
    files = {"model_config.yaml": config}
    files |= {f"mp_rank_0{i}/model_weights.ckpt": weights for i in range(2)}
    with pytest.raises(CheckpointError, match="parallel sizes of 1"):
        plan(nemo_archive(tmp_path / "ranks.nemo", files))
    with pytest.raises(CheckpointError, match=r"tar xf packed\.nemo -C DIR"):
        plan(nemo_archive(tmp_path / "packed.nemo", files, "w:gz"))


# --- PyTorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_meta_llama(ranks: int, tmp_path: Path) -> None:
    shares, params = megatron_files.meta(*original("llama2"), ranks)
    source = tmp_path / "meta"
    source.mkdir()
    for i, share in enumerate(shares):
        (source / f"consolidated.0{i}.pth").write_bytes(torch_files.torch_bytes(share))
    (source / "params.json").write_text(json.dumps(params))
    assert_is("llama2", convert(source, tmp_path / "result"))


def hugging_face(directory: Path, name: str, shards: int) -> Path:
    """A model whose weights are pytorch_model.bin, or shards of it."""
    tensors, config = original(name)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        content = torch_files.torch_bytes(tensors)
        (directory / "pytorch_model.bin").write_bytes(content)
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-0000{i + 1}-of-0000{shards}.bin"
        part = {key: tensors[key] for key in sorted(tensors)[i::shards]}
        (directory / file).write_bytes(torch_files.torch_bytes(part))
        weight_map.update(dict.fromkeys(part, file))
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("shards", [1, 2])
def test_state_dicts_in_hugging_face_layout(shards: int, tmp_path: Path) -> None:
    """Converted, to shards with an index, or served as they are."""
    source = hugging_face(tmp_path / "source", "qwen2", shards)
    assert_is("qwen2", source)
    result = tmp_path / "result"
    write(plan(source), result, shard_bytes=20_000)
    assert len(list(result.glob("model-*.safetensors"))) > 2
    assert_is("qwen2", result)


def test_training_checkpoints_and_transposed_tensors(tmp_path: Path) -> None:
    tensors, config = original("llama2")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T).T
    wrapped = {"epoch": 3, "state_dict": tensors, "rates": [0.5, (1, None, True)]}
    (tmp_path / "last.pt").write_bytes(torch_files.torch_bytes(wrapped))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_is("llama2", convert(tmp_path / "last.pt", tmp_path / "result"))


def test_dtypes_stay(tmp_path: Path) -> None:
    tensors, config = original("llama2")
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    (tmp_path / "pytorch_model.bin").write_bytes(torch_files.torch_bytes(narrow))
    (tmp_path / "config.json").write_text(json.dumps(config))
    write(plan(tmp_path), tmp_path / "result")
    written = load_file(tmp_path / "result/model.safetensors")
    for name, array in narrow.items():
        assert written[name].dtype == array.dtype
        np.testing.assert_array_equal(written[name].view(np.uint16), array.view(np.uint16))


# --- the command ------------------------------------------------------------------------------


def command(source: Path, target: Path, **changes: Any) -> None:
    options: dict[str, Any] = {"config": None, "vocab_size": None, "shard_bytes": 1 << 30}
    run(source, target, **(options | {"dry_run": False, "as_json": False} | changes))


def test_the_mapping_is_shown_and_nothing_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, settings = megatron_files.llama(*original("llama3"), PADDED)
    source = tmp_path / "source"
    source.mkdir()
    (source / "model_weights.ckpt").write_bytes(torch_files.torch_bytes(tensors))
    (source / "model_config.yaml").write_text(yaml.safe_dump(settings))
    target = tmp_path / "result"
    command(source, target, dry_run=True)
    assert not target.exists()
    shown = capsys.readouterr().out
    for text in ("model.decoder.layers.0.mlp.linear_fc1.weight", "first half", "float32"):
        assert text in shown
    command(source, target, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    written = load_file(target / "model.safetensors")
    assert {each["target"]: each["target_shape"] for each in listed["tensors"]} == {
        name: list(array.shape) for name, array in written.items()
    }
    with pytest.raises(CheckpointError, match="exists already"):
        command(source, target)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "source", "llama2", 1)
    job = plan(source)
    with (source / "pytorch_model.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="truncated"):
        write(job, tmp_path / "result")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
