"""Quantized checkpoints in each layout load to exactly the values they stand for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_models
from helpers.paged_run import PagedRun
from helpers.quantized_files import (
    Array,
    Layout,
    awq,
    float8_blocks,
    float8_compressed,
    float8_tensor,
    gptq,
    int8_channel,
    load_tensors,
    modelopt,
    packed,
    quantize_model,
    write_plain,
)
from safetensors.numpy import save_file

from tensorray.builder import model as definitions
from tensorray.builder.checkpoint import CheckpointError, open_checkpoint
from tensorray.builder.checkpoint.config import read_config
from tensorray.builder.checkpoint.quantization_config import read_quantization, schemes_of
from tensorray.builder.checkpoint.rules import matches_target, names_module
from tensorray.builder.load import load_weights, plan_bytes
from tensorray.builder.model import Model, ModelConfigError, ShardWeights
from tensorray.builder.quantization import weight_forms
from tensorray.builder.registry import resolve
from tensorray.kernels.quantized import QuantizedWeight, dequantize

LAYOUTS: dict[str, Layout] = {
    "gptq": gptq(),
    "gptq of 8 bits": gptq(bits=8),
    "gptq, a scale a row": gptq(group=-1),
    "gptq, asymmetric": gptq(symmetric=False),
    "gptq of 8 bits, asymmetric": gptq(bits=8, symmetric=False),
    "gptq, act-order": gptq(act_order=True, symmetric=False),
    "gptq of 8 bits, act-order": gptq(bits=8, act_order=True),
    "gptq v2": gptq(version=2),
    "gptq v2, asymmetric": gptq(version=2, symmetric=False),
    "awq": awq(),
    "awq, groups of 8": awq(group=8),
    "packed": packed(),
    "packed, asymmetric": packed(symmetric=False),
    "packed, a scale a row, asymmetric": packed(group=-1, symmetric=False),
    "packed, act-order": packed(act_order=True),
    "packed 8 bits": packed(bits=8, group=8),
    "int8": int8_channel(),
    "int8, asymmetric": int8_channel(symmetric=False),
    "float8 tensor": float8_compressed("tensor"),
    "float8 channel": float8_compressed("channel"),
    "float8 block": float8_compressed("block"),
    "modelopt": modelopt(),
    "modelopt in config.json": modelopt(in_config=True),
    "deepseek": float8_blocks(),
    "fp8": float8_tensor(),
}

#: Layouts whose groups ranks may cut anywhere.
ORDERED = [name for name in LAYOUTS if "act-order" in name]


def open_and_load(
    directory: Path, rank: int = 0, ranks: int = 1, **options: Any
) -> tuple[Model, ShardWeights]:
    checkpoint = open_checkpoint(str(directory))
    try:
        layout = definitions.Layout(tp_rank=rank, tp_size=ranks)
        model = resolve(checkpoint.config)(checkpoint.config, layout)
        return model, load_weights(model, checkpoint, **options)
    finally:
        checkpoint.close()


def both(tmp_path: Path, layout: Layout, name: str = "llama3") -> tuple[Path, Path]:
    """A model's directory in a layout, and one with the same values in float32."""
    source = tiny_models.directory(name)
    values = quantize_model(source, tmp_path / "quantized", layout)
    write_plain(source, tmp_path / "plain", values)
    return tmp_path / "quantized", tmp_path / "plain"


def pairs(found: ShardWeights, expected: ShardWeights) -> list[tuple[str, Any, Array]]:
    """All weights of two shards, by name."""
    groups = {"embed": (found.embed, expected.embed), "head": (found.head, expected.head)}
    for layer, weights in found.layers.items():
        groups[str(layer)] = (weights, expected.layers[layer])
    return [
        (f"{group}.{name}", array, theirs.arrays[name])
        for group, (ours, theirs) in groups.items()
        for name, array in ours.arrays.items()
    ]


def held_bytes(weights: ShardWeights) -> int:
    """What a shard's weights take; tied ones are one array."""
    return sum({id(array): array.nbytes for _, array, _ in pairs(weights, weights)}.values())


def assert_same(found: ShardWeights, expected: ShardWeights, *quantized: str) -> None:
    """Equal values; of each layer exactly the named weights are held quantized."""
    for name, ours, theirs in pairs(found, expected):
        layer, weight = name.split(".")
        assert isinstance(ours, QuantizedWeight) == (layer.isdigit() and weight in quantized), name
        values = dequantize(ours) if isinstance(ours, QuantizedWeight) else ours
        np.testing.assert_array_equal(values, theirs, err_msg=name)


LINEARS = ("qkv", "o", "gate_up", "down")


@pytest.mark.parametrize("name", LAYOUTS)
def test_loads_the_values_that_are_stored(tmp_path: Path, name: str) -> None:
    quantized, plain = both(tmp_path, LAYOUTS[name])
    model, weights = open_and_load(quantized)
    assert_same(weights, open_and_load(plain)[1], *LINEARS)
    assert plan_bytes(model) == held_bytes(weights)
    kinds = {array.kind for _, array, _ in pairs(weights, weights) if hasattr(array, "kind")}
    assert len(kinds) == 1
    codes = sum(a.values.nbytes for _, a, _ in pairs(weights, weights) if hasattr(a, "kind"))
    layers = [a for n, a, _ in pairs(*(open_and_load(plain)[1],) * 2) if n[0].isdigit()]
    floats = sum(array.nbytes for array in layers if array.ndim > 1)
    assert codes * (8 if kinds == {"int4"} else 4) == floats


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_hold_slices_of_the_whole(tmp_path: Path, name: str, rank: int) -> None:
    quantized, plain = both(tmp_path, LAYOUTS[name])
    model, weights = open_and_load(quantized, rank, 2)
    assert_same(weights, open_and_load(plain, rank, 2)[1], *LINEARS)
    layer = weights.layers[0]
    if name in ORDERED:  # a share of the inputs has some of every group's
        assert layer.o.groups is not None
        assert layer.qkv.groups is None
    assert plan_bytes(model) == held_bytes(weights)


@pytest.mark.parametrize("model_name", ["gpt2", "mixtral", "gemma3", "qwen2-yarn", "qwen3-moe"])
@pytest.mark.parametrize(
    "name", ["gptq, act-order", "awq", "packed, asymmetric", "float8 tensor", "deepseek"]
)
def test_other_families_load_the_same(tmp_path: Path, name: str, model_name: str) -> None:
    quantized, plain = both(tmp_path, LAYOUTS[name], model_name)
    _, found = open_and_load(quantized)
    _, expected = open_and_load(plain)
    held = [n for n, a, _ in pairs(found, expected) if isinstance(a, QuantizedWeight)]
    assert held
    for weight, ours, theirs in pairs(found, expected):
        values = dequantize(ours) if isinstance(ours, QuantizedWeight) else ours
        np.testing.assert_array_equal(values, theirs, err_msg=weight)


@pytest.mark.parametrize("model_name", ["llama3", "gpt2", "mixtral", "gemma3"])
@pytest.mark.parametrize(
    "name",
    ["gptq", "gptq, act-order", "awq", "packed 8 bits", "int8, asymmetric", "deepseek", "modelopt"],
)
def test_logits_are_those_of_the_values(tmp_path: Path, name: str, model_name: str) -> None:
    quantized, plain = both(tmp_path, LAYOUTS[name], model_name)
    runs = [PagedRun(*open_and_load(directory)) for directory in (quantized, plain)]
    generator = np.random.default_rng(0)
    vocab = runs[0].model.vocab_size
    for length in (5, 1, 100):  # a few rows go to the C kernel, many to its twin
        tokens = generator.integers(0, vocab, length).astype(np.int32)
        found, expected = (run.step([("a", tokens)])[0] for run in runs)
        assert np.abs(found - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())


def test_small_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorray.builder.checkpoint.quantized.PIECE_CODES", 200)
    monkeypatch.setattr("tensorray.builder.load_quantized._PIECE_CODES", 300)
    monkeypatch.setattr("tensorray.builder.checkpoint.tensor.PIECE_VALUES", 40)
    for i, name in enumerate(["gptq, asymmetric", "gptq, act-order", "awq", "packed", "deepseek"]):
        quantized, plain = both(tmp_path / str(i), LAYOUTS[name])
        for rank in range(2):
            _, weights = open_and_load(quantized, rank, 2)
            assert_same(weights, open_and_load(plain, rank, 2)[1], *LINEARS)


# --- which modules -----------------------------------------------------------------------------


def test_parts_in_different_schemes_are_dequantized(tmp_path: Path) -> None:
    """v is left alone, the ups have another group size; what joins them is held in float32."""
    small, large = packed(group=16), packed(group=32)

    def write(module: str, weight: Array) -> Any:
        return (large if module.endswith("up_proj") else small).write(module, weight)

    groups = {
        "all": small.config["config_groups"]["group_0"],
        "ups": {**large.config["config_groups"]["group_0"], "targets": ["re:.*up_proj$"]},
    }
    config = {**small.config, "config_groups": groups, "ignore": ["lm_head", "re:.*v_proj"]}
    quantized, plain = both(tmp_path, Layout(config, write, skip=("lm_head", "v_proj")))
    for ranks in (1, 2):
        _, weights = open_and_load(quantized, 0, ranks)
        assert_same(weights, open_and_load(plain, 0, ranks)[1], "o", "down")


def test_ordered_parts_can_be_dequantized(tmp_path: Path) -> None:
    layout = gptq(act_order=True, symmetric=False, dynamic={r"-:.*\.k_proj": {}})
    layout = Layout(layout.config, layout.write, skip=("lm_head", "k_proj"))
    quantized, plain = both(tmp_path, layout)
    _, weights = open_and_load(quantized)
    assert_same(weights, open_and_load(plain)[1], "o", "gate_up", "down")


def test_a_quantized_head(tmp_path: Path) -> None:
    layout = gptq(lm_head=True)
    quantized, plain = both(tmp_path, Layout(layout.config, layout.write, skip=()), "qwen2-yarn")
    _, weights = open_and_load(quantized)
    assert isinstance(weights.head.tokens, QuantizedWeight)
    expected = open_and_load(plain)[1].head.tokens
    np.testing.assert_array_equal(dequantize(weights.head.tokens), expected)


def test_dynamic_rules_change_modules(tmp_path: Path) -> None:
    four, eight = gptq(), gptq(bits=8, group=32)

    def write(module: str, weight: Array) -> Any:
        return (eight if module.endswith("down_proj") else four).write(module, weight)

    dynamic = {r"+:.*down_proj": {"bits": 8, "group_size": 32}}
    quantized, plain = both(tmp_path, Layout({**four.config, "dynamic": dynamic}, write))
    _, weights = open_and_load(quantized)
    assert_same(weights, open_and_load(plain)[1], *LINEARS)
    assert weights.layers[0].down.kind == "int8"
    assert weights.layers[0].o.kind == "int4"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("model_name", ["llama3", "mixtral"])
def test_the_config_alone_tells_the_same_forms(tmp_path: Path, name: str, model_name: str) -> None:
    """Plans are made from configs; the files must not turn out otherwise."""
    directory = tmp_path / "m"
    quantize_model(tiny_models.directory(model_name), directory, LAYOUTS[name])
    config = read_config(directory, {})
    model = resolve(config)(config)
    groups = [*map(model.layer_weights, range(model.num_layers)), model.head_weights()]
    declared = [weight for group in groups for weight in group.values()]
    forms = weight_forms(model, declared, schemes_of(config))
    _, weights = open_and_load(directory)
    held = [*weights.layers.values(), weights.head]
    assert forms
    for group, arrays in zip(groups, held, strict=True):
        for key, weight in group.items():
            array, form = arrays.arrays[key], forms.get(weight)
            assert isinstance(array, QuantizedWeight) == (form is not None), key
            if form is not None:
                assert (form.kind, form.shape, form.group) == (
                    array.kind,
                    array.shape,
                    array.group,
                )
                assert form.nbytes == array.nbytes


def test_module_rules() -> None:
    at = "model.layers.3.mlp.gate"
    assert names_module("gate", at)
    assert names_module("mlp.gate", at)
    assert names_module("model.layers.3", at)
    assert names_module("*.gate", at)
    assert not names_module("gat", at)
    assert not names_module("layers.33", at)
    assert matches_target("Linear", at)
    assert matches_target("re:.*gate$", at)
    assert matches_target(at, at)
    assert matches_target("re:language_model.*gate", at)
    assert not matches_target("re:gate", at)  # from the start on
    assert not matches_target("Embedding", at)


# --- what is wrong -----------------------------------------------------------------------------


def test_ranks_that_would_cut_groups_are_refused(tmp_path: Path) -> None:
    quantized, _ = both(tmp_path, gptq(group=32))
    with pytest.raises(ModelConfigError, match=r"o_proj\.weight: 2 .* groups of 32 .*: 1$"):
        open_and_load(quantized, 0, 2)


def edit(directory: Path, change: Callable[[dict[str, Array]], None]) -> None:
    tensors = load_tensors(directory)
    change(tensors)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, directory / "model.safetensors")


AT = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("layout", "change", "words"),
    [
        ("gptq", lambda t: t.pop(f"{AT}.scales"), ["1 tensors", f"missing: {AT}.scales"]),
        ("gptq", lambda t: t.pop(f"{AT}.qweight"), ["missing", f"{AT}.weight"]),
        (
            "gptq",
            lambda t: t.update({f"{AT}.qweight": t[f"{AT}.qweight"][:-1]}),
            ["model.safetensors", f"'{AT}.qweight' has shape", "needs"],
        ),
        (
            "gptq",
            lambda t: t.update({f"{AT}.qweight": t[f"{AT}.qweight"].astype(np.float32)}),
            [f"'{AT}.qweight' has dtype float32", "int32"],
        ),
        (
            "gptq",
            lambda t: t.update({f"{AT}.qzeros": t[f"{AT}.qzeros"] + 1}),
            [f"'{AT}.qzeros' is not symmetric", "sym: true"],
        ),
        (
            "gptq, act-order",
            lambda t: t.update({f"{AT}.g_idx": t[f"{AT}.g_idx"] + 1}),
            [f"'{AT}.g_idx' names groups outside 0 to"],
        ),
        (
            "gptq, act-order",
            lambda t: t.update({f"{AT}.g_idx": np.zeros_like(t[f"{AT}.g_idx"])}),
            [f"{AT}.weight", "not in groups of 16"],
        ),
        (
            "gptq, act-order",
            lambda t: t.update(
                {AT.replace("down", "up") + ".g_idx": t[AT.replace("down", "up") + ".g_idx"][::-1]}
            ),
            ["up_proj.weight and", "gate_proj.weight", "order their inputs differently"],
        ),
        ("awq", lambda t: t.pop(f"{AT}.qzeros"), [f"{AT}.qzeros"]),
        ("packed", lambda t: t.pop(f"{AT}.weight_scale"), [f"{AT}.weight_scale"]),
        ("float8 channel", lambda t: t.pop(f"{AT}.weight_scale"), [f"{AT}.weight_scale"]),
        (
            "deepseek",
            lambda t: t.update({f"{AT}.weight_scale_inv": t[f"{AT}.weight_scale_inv"][:-1]}),
            [f"'{AT}.weight_scale_inv' has shape"],
        ),
        (
            "modelopt",
            lambda t: t[f"{AT}.weight"].view(np.uint8).__setitem__((0, 3), 127),
            [f"'{AT}.weight' holds values that are not numbers"],
        ),
    ],
)
def test_damage_is_named(
    tmp_path: Path, layout: str, change: Callable[[dict[str, Array]], None], words: list[str]
) -> None:
    quantize_model(tiny_models.directory("llama3"), tmp_path / "m", LAYOUTS[layout])
    edit(tmp_path / "m", change)
    with pytest.raises(CheckpointError) as caught:
        open_and_load(tmp_path / "m")
    for word in words:
        assert word in str(caught.value)


def compressed(weights: dict[str, Any] | None = None, **config: Any) -> dict[str, Any]:
    base = packed().config
    group = base["config_groups"]["group_0"]
    changed = {**group, "weights": {**group["weights"], **(weights or {})}}
    return {**base, "config_groups": {"group_0": changed}, **config}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ["'bitsandbytes'", "gptq, awq, compressed-tensors"]),
        ({**gptq().config, "bits": 3}, ["GPTQ of 3 bits", "4 or 8"]),
        ({**gptq().config, "checkpoint_format": "marlin"}, ["format 'marlin'", "gptq_v2"]),
        ({**gptq().config, "is_marlin_format": True}, ["format 'marlin'"]),
        ({**gptq().config, "pack_dtype": "int16"}, ["int16"]),
        ({**gptq().config, "group_size": 0}, ["groups of 0"]),
        ({**awq().config, "bits": 8}, ["AWQ of 8 bits"]),
        ({**awq().config, "version": "gemv"}, ["version 'gemv'", "gemm"]),
        ({**awq().config, "backend": "llm-awq"}, ["'llm-awq'"]),
        (compressed(format="marlin-24"), ["'marlin-24'", "pack-quantized"]),
        (compressed(format="nvfp4-pack-quantized"), ["'nvfp4-pack-quantized'"]),
        (compressed({"num_bits": 3}), ["3 bits"]),
        (compressed({"strategy": "tensor_group"}), ["'tensor_group'"]),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), ["'sparse-24-bitmask'"]),
        (compressed(config_groups=None), ["without config_groups"]),
        ({**modelopt(in_config=True).config, "quant_algo": "NVFP4"}, ["NVFP4", "FP8"]),
        ({**float8_blocks().config, "fmt": "e5m2"}, ["'e5m2'", "e4m3"]),
        ({**float8_blocks().config, "weight_block_size": [128]}, ["[128]", "[128, 128]"]),
        ("int4", ["must be a mapping"]),
    ],
    ids=str,
)
def test_other_variants_are_refused_by_name(config: Any, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_quantization({"quantization_config": config}, "some/model")
    for word in ("some/model", *words):
        assert word in str(caught.value)


def test_older_tools_write_a_file_of_their_own(tmp_path: Path) -> None:
    layout = gptq()
    beside = {key: value for key, value in layout.config.items() if key != "quant_method"}
    quantized, plain = both(
        tmp_path, Layout({}, layout.write, files={"quantize_config.json": beside})
    )
    assert_same(open_and_load(quantized)[1], open_and_load(plain)[1], *LINEARS)


def test_scales_of_other_things_are_left_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized, _ = both(tmp_path, modelopt())
    with caplog.at_level(logging.WARNING):
        open_and_load(quantized)
    assert len(caplog.records) == 2
    assert "KV cache are not used" in caplog.text
    assert "only weights are quantized" in caplog.text


def test_unknown_tensors_are_still_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized, _ = both(tmp_path, gptq())
    edit(quantized, lambda t: t.update({f"{AT}.lora": np.zeros(2, np.float32)}))
    with caplog.at_level(logging.WARNING):
        open_and_load(quantized)
    assert f"1 tensors are not used by the model: {AT}.lora" in caplog.text


def test_random_weights_in_a_quantized_config(tmp_path: Path) -> None:
    """--load-format dummy: each rank has slices of the same weights."""
    source = tiny_models.directory("llama3")
    config = json.loads((source / "config.json").read_text())
    for i, name in enumerate(["gptq, act-order", "awq", "int8", "float8 channel", "deepseek"]):
        directory = tmp_path / str(i)
        directory.mkdir()
        changed = {**config, "quantization_config": LAYOUTS[name].config}
        (directory / "config.json").write_text(json.dumps(changed))
        checkpoint = open_checkpoint(str(directory), load_format="dummy")
        shards = []
        for rank, ranks in ((0, 1), (1, 2)):
            model = resolve(changed)(changed, definitions.Layout(rank, ranks))
            shards.append(load_weights(model, checkpoint))
        whole, half = (shard.layers[0] for shard in shards)
        down = dequantize(whole.down)
        np.testing.assert_array_equal(dequantize(half.down), np.split(down, 2, axis=1)[1])
        assert 0.005 < np.abs(down).mean() < 0.05
        assert down.min() < 0 < down.max()
