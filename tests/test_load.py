"""The loader: declarations become arrays, sliced, stacked, transposed and shared as declared."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tensorray.builder.checkpoint import CheckpointError, open_checkpoint
from tensorray.builder.load import load_weights, plan_bytes
from tensorray.builder.model import KVSpec, Layout, Model, Part, ShardWeights, Weight, Weights

HIDDEN, INNER, VOCAB, EXPERTS = 8, 12, 20, 3


class Toy(Model):
    """Two layers that use every kind of declaration; it computes nothing."""

    def __init__(self, layout: Layout | None = None, vocab: int = VOCAB, hidden: int = HIDDEN):
        super().__init__({}, layout)
        self.num_layers = 2
        self.vocab_size = vocab
        self.hidden_size = hidden
        self.max_positions = 16

    def embed_weights(self) -> dict[str, Weight]:
        shape = (self.vocab_size, self.hidden_size)
        return {"table": Weight((Part("embed.weight", shape, "rows"),))}

    def layer_weights(self, layer: int) -> dict[str, Weight]:
        at, hidden = f"layers.{layer}", self.hidden_size
        experts = [
            Part(f"{at}.experts.{e}.{name}.weight", (INNER, hidden), "rows")
            for e in range(EXPERTS)
            for name in ("gate", "up")
        ]
        fused = [
            Part(f"{at}.fused", (hidden, 3 * hidden), "rows", (i * hidden, (i + 1) * hidden), True)
            for i in range(3)
        ]
        return {
            "norm": Weight((Part(f"{at}.norm.weight", (hidden,)),), add=1.0),
            "bias": Weight((Part(f"{at}.bias", (INNER,), "rows"),)),
            "qkv": Weight(tuple(fused)),
            "gate_up": Weight(tuple(experts), stack=EXPERTS),
            "down": Weight((Part(f"{at}.down.weight", (hidden, INNER), "columns"),)),
            "proj": Weight((Part(f"{at}.proj", (INNER, hidden), "columns", transpose=True),)),
            "grid": Weight((Part(f"{at}.grid", (4, 8, 5), "columns"),)),
        }

    def head_weights(self) -> dict[str, Weight]:
        return self.embed_weights()

    def kv_spec(self, layer: int) -> KVSpec:
        return KVSpec(1, 4)

    def embed(self, op: Any, w: Weights, tokens: Any) -> Any:
        raise AssertionError

    def layer(self, op: Any, w: Weights, x: Any, layer: int) -> Any:
        raise AssertionError

    def head(self, op: Any, w: Weights, x: Any) -> Any:
        raise AssertionError


Tensors = dict[str, np.ndarray[Any, Any]]


def tensors_of(model: Model) -> Tensors:
    rng = np.random.default_rng(0)
    groups = [model.embed_weights(), *map(model.layer_weights, range(model.num_layers))]
    parts = [part for group in groups for weight in group.values() for part in weight.parts]
    return {part.name: rng.random(part.shape, np.float32) - 0.5 for part in parts}


def save(directory: Path, tensors: Tensors) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return str(directory)


@pytest.fixture
def tensors() -> Tensors:
    return tensors_of(Toy())


@pytest.fixture
def saved(tmp_path: Path, tensors: Tensors) -> str:
    return save(tmp_path / "toy", tensors)


def load(directory: str, model: Model, **options: Any) -> ShardWeights:
    checkpoint = open_checkpoint(directory)
    try:
        return load_weights(model, checkpoint, **options)
    finally:
        checkpoint.close()


def expected_layer(tensors: Tensors, layer: int, rank: int, ranks: int) -> Tensors:
    """A layer's weights by plain NumPy, from whole tensors."""

    def rows(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.split(array, ranks, axis=0)[rank]

    def columns(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.split(array, ranks, axis=1)[rank]

    t = {name.removeprefix(f"layers.{layer}."): array for name, array in tensors.items()}
    experts = [
        np.concatenate([rows(t[f"experts.{e}.{name}.weight"]) for name in ("gate", "up")])
        for e in range(EXPERTS)
    ]
    return {
        "norm": t["norm.weight"] + 1,
        "bias": rows(t["bias"]),
        "qkv": np.concatenate([rows(part) for part in np.split(t["fused"].T, 3)]),
        "gate_up": np.stack(experts),
        "down": columns(t["down.weight"]),
        "proj": columns(t["proj"].T),
        "grid": columns(t["grid"]),
    }


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_every_kind_of_declaration(
    saved: str, tensors: Tensors, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ranks == 4:  # tiny tasks and pieces, so that their borders matter
        monkeypatch.setattr("tensorray.builder.load._TASK_BYTES", 64)
        monkeypatch.setattr("tensorray.builder.checkpoint.tensor.PIECE_VALUES", 24)
    weights = load(saved, Toy(Layout(tp_rank=rank, tp_size=ranks)))
    table = np.split(tensors["embed.weight"], ranks)[rank]
    np.testing.assert_array_equal(weights.embed.table, table)
    for layer in range(2):
        group = weights.layers[layer].arrays
        for name, array in expected_layer(tensors, layer, rank, ranks).items():
            np.testing.assert_array_equal(group[name], array, err_msg=name)
            assert group[name].flags.c_contiguous


def test_equal_declarations_share_one_array(saved: str) -> None:
    weights = load(saved, Toy())
    assert weights.head.table is weights.embed.table


def test_plan_is_what_is_loaded(saved: str) -> None:
    for layout in (Layout(), Layout(tp_rank=1, tp_size=2)):
        weights = load(saved, Toy(layout))
        groups = [weights.embed, *weights.layers.values()]  # the head is the embedding
        held = sum(array.nbytes for group in groups for array in group.arrays.values())
        assert plan_bytes(Toy(layout)) == held
    assert plan_bytes(Toy(), dtype=np.float16) * 2 == plan_bytes(Toy())


def test_a_stage_holds_its_layers_only(saved: str) -> None:
    first, last = load(saved, Toy(), layers=range(1)), load(saved, Toy(), layers=range(1, 2))
    assert list(first.layers) == [0]
    assert list(last.layers) == [1]
    assert first.embed.arrays
    assert not first.head.arrays
    assert not last.embed.arrays
    assert last.head.arrays
    assert plan_bytes(Toy(), layers=range(1)) < plan_bytes(Toy())


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes_convert(tmp_path: Path, tensors: Tensors, stored: Any, wanted: Any) -> None:
    narrow = {name: array.astype(stored) for name, array in tensors.items()}
    weights = load(save(tmp_path / "m", narrow), Toy(), dtype=wanted)
    table = weights.embed.table
    assert table.dtype == wanted
    np.testing.assert_array_equal(table, narrow["embed.weight"].astype(wanted))
    norm = narrow["layers.0.norm.weight"].astype(np.float32) + 1  # rounded once, after the sum
    np.testing.assert_array_equal(weights.layers[0].norm, norm.astype(wanted))


def test_progress_reaches_the_total(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorray.builder.load._TASK_BYTES", 128)
    steps: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        steps.append((done, total))
        threads.add(threading.get_ident())

    load(saved, Toy(), progress=progress)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert len(steps) > 20
    assert steps[-1] == (plan_bytes(Toy()), plan_bytes(Toy()))
    assert len(threads) == 1


def test_missing_tensors_are_all_named(tmp_path: Path, tensors: Tensors) -> None:
    del tensors["layers.1.down.weight"], tensors["embed.weight"]
    directory = save(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=r"m: 2 tensors .*embed\.weight, layers\.1\.down"):
        load(directory, Toy())


def test_a_wrong_shape_is_named_before_anything_is_read(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors["layers.1.down.weight"] = np.zeros((HIDDEN, INNER + 1), np.float32)
    directory = save(tmp_path / "m", tensors)
    monkeypatch.setattr(
        "tensorray.builder.checkpoint.tensor.StoredTensor.read", lambda *_: pytest.fail("read")
    )
    with pytest.raises(CheckpointError) as caught:
        load(directory, Toy())
    for word in ("model.safetensors", "'layers.1.down.weight'", "[8, 13]", "[8, 12]"):
        assert word in str(caught.value)


def test_unused_tensors_are_logged_unless_known(
    tmp_path: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    quiet = {"layers.0.rotary_emb.inv_freq": np.zeros(2), "vision_tower.x": np.zeros(2)}
    with caplog.at_level(logging.WARNING):
        load(save(tmp_path / "a", {**tensors, **quiet}), Toy())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        load(save(tmp_path / "b", {**tensors, "layers.0.extra": np.zeros(2)}), Toy())
    assert "layers.0.extra" in caplog.text


def test_a_split_that_does_not_divide_is_refused(saved: str) -> None:
    with pytest.raises(ValueError, match=r"embed\.weight: 20 rows .* 3 tensor-parallel ranks"):
        load(saved, Toy(Layout(tp_size=3)))


def test_random_weights_are_the_same_for_every_split(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": HIDDEN}))
    checkpoint = open_checkpoint(str(tmp_path), load_format="dummy")
    whole = load_weights(Toy(), checkpoint)
    for rank in range(2):
        half = load_weights(Toy(Layout(tp_rank=rank, tp_size=2)), checkpoint)
        np.testing.assert_array_equal(half.embed.table, np.split(whole.embed.table, 2)[rank])
        down = np.split(whole.layers[1].down, 2, axis=1)[rank]
        np.testing.assert_array_equal(half.layers[1].down, down)
        grid = np.split(whole.layers[1].grid, 2, axis=1)[rank]
        np.testing.assert_array_equal(half.layers[1].grid, grid)
    again = load_weights(Toy(), open_checkpoint(str(tmp_path), load_format="dummy"))
    np.testing.assert_array_equal(again.layers[0].qkv, whole.layers[0].qkv)
    assert not np.array_equal(whole.layers[0].qkv, whole.layers[1].qkv)
    for array in (whole.embed.table, whole.layers[0].gate_up):
        assert 0 < np.abs(array).max() < 0.1


PEAK_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_load import BIG, Toy, load, plan_bytes

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before = peak()
weights = load(sys.argv[2], Toy(**BIG))
print(peak() - before, plan_bytes(Toy(**BIG)))
"""
BIG: dict[str, Any] = {"vocab": 100_000, "hidden": 512}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_memory_stays_at_one_copy(tmp_path: Path) -> None:
    """A process's peak grows by the weights and a small constant, file pages included."""
    big = tensors_of(Toy(**BIG))
    directory = save(tmp_path / "m", {n: a.astype(ml_dtypes.bfloat16) for n, a in big.items()})
    done = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(Path(__file__).parent), directory],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, planned = map(int, done.stdout.split())
    assert planned > 200e6
    assert planned * 0.95 < grown < planned * 1.05 + (16 << 20)
