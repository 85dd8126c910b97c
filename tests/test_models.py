"""Every family's definition against transformers, and the ways to choose and configure one."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_models
from helpers.paged_run import PagedRun

from tensorray.builder.array_ops import ArrayOps, LayerKV
from tensorray.builder.checkpoint.open import open_checkpoint
from tensorray.builder.load import load_weights
from tensorray.builder.model import Layout, Model, ModelConfigError, ShardWeights
from tensorray.builder.models.gemma3 import Gemma3
from tensorray.builder.models.llama import Llama
from tensorray.builder.ops import Ops, Tensor
from tensorray.builder.registry import ARCHITECTURES, DEFINITIONS, resolve

TOLERANCE = 1e-4


def config_of(name: str) -> dict[str, Any]:
    checkpoint = open_checkpoint(str(tiny_models.directory(name)))
    checkpoint.close()
    return checkpoint.config


def load(name: str, layout: Layout | None = None) -> tuple[Model, ShardWeights]:
    checkpoint = open_checkpoint(str(tiny_models.directory(name)))
    try:
        model = resolve(checkpoint.config)(checkpoint.config, layout)
        return model, load_weights(model, checkpoint)
    finally:
        checkpoint.close()


def assert_close(logits: Any, expected: Any) -> None:
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < TOLERANCE


# --- logits ----------------------------------------------------------------------------------


def test_fixtures_cover_every_definition() -> None:
    covered = {resolve(config_of(name)) for name in tiny_models.NAMES}
    assert covered == set(DEFINITIONS)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_prefill_logits(name: str) -> None:
    """All prompts whole, each in its own step."""
    run = PagedRun(*load(name))
    for i, reference in enumerate(tiny_models.references(name)):
        (logits,) = run.step([(str(i), reference.prompt)])
        assert_close(logits, reference.logits)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_chunked_logits(name: str) -> None:
    """Prompts in chunks and single tokens, other sequences' chunks packed around them."""
    prompts = tiny_models.references(name)
    generator = np.random.default_rng(1)
    cuts = {"0": (7, 8, 9, 17, 26), "1": (1, 2, 3), "2": (5, 6, 9)}
    run = PagedRun(*load(name), block_size=3, seed=2)
    done = dict.fromkeys(cuts, 0)
    found: dict[str, list[Any]] = {key: [] for key in cuts}
    for step in range(5):
        chunks = []
        for key, ends in cuts.items():
            if step < len(ends):
                chunks.append((key, prompts[int(key)].prompt[done[key] : ends[step]]))
                done[key] = ends[step]
        chunks.insert(step % 3, ("noise", generator.integers(0, 272, 1 + step).astype(np.int32)))
        for (key, _), logits in zip(chunks, run.step(chunks), strict=True):
            if key != "noise":
                found[key].append(logits)
    for key, pieces in found.items():
        assert_close(np.concatenate(pieces), prompts[int(key)].logits)


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_declared_weights_are_the_checkpoints_tensors(name: str) -> None:
    """No tensor goes unread, but for a vision tower's."""
    checkpoint = open_checkpoint(str(tiny_models.directory(name)))
    model = resolve(checkpoint.config)(checkpoint.config)
    groups = [model.embed_weights(), model.head_weights()]
    groups += [model.layer_weights(layer) for layer in range(model.num_layers)]
    declared = {
        part.name: part.shape
        for group in groups
        for weight in group.values()
        for part in weight.parts
    }
    stored = {
        tensor: checkpoint.shape(tensor)
        for tensor in checkpoint.names()
        if not tensor.startswith(("vision_tower.", "multi_modal_projector."))
    }
    checkpoint.close()
    assert declared == stored


# --- tensor parallelism ------------------------------------------------------------------------


class Group:
    """Tensor-parallel ranks as threads that meet at every collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.shared: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=120)
        self.collectives = 0

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.shared[rank] = x
        self.barrier.wait()
        everyones = list(self.shared)
        self.collectives += rank == 0
        self.barrier.wait()
        return everyones


class GroupOps(ArrayOps):
    def __init__(self, kv: list[LayerKV], group: Group, rank: int) -> None:
        super().__init__(np, kv)
        self.group = group
        self.rank = rank

    def all_reduce(self, x: Tensor) -> Tensor:
        return sum(self.group.exchange(self.rank, x))

    def all_gather(self, x: Tensor) -> Tensor:
        return np.concatenate(self.group.exchange(self.rank, x), axis=-1)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("llama2", 2),
        ("llama3", 2),  # one KV head: both ranks hold it
        ("llama-biased", 2),
        ("llama-biased", 4),  # two KV heads: each held by two ranks
        ("qwen2", 2),
        ("gemma2", 2),
        ("gemma3", 4),
        ("gpt2", 2),
        ("mixtral", 2),
        ("mixtral", 4),
        ("qwen3-moe", 4),
    ],
)
def test_tensor_parallel_ranks_together_equal_one(name: str, ranks: int) -> None:
    reference = tiny_models.references(name)[0]
    group = Group(ranks)
    logits: list[Any] = [None] * ranks
    bytes_held = [0] * ranks

    def run_rank(rank: int) -> None:
        try:
            model, weights = load(name, Layout(tp_rank=rank, tp_size=ranks))
            layers = weights.layers.values()
            bytes_held[rank] = sum(w.nbytes for layer in layers for w in layer.arrays.values())
            run = PagedRun(model, weights, make_ops=lambda kv: GroupOps(kv, group, rank))
            first = run.step([("a", reference.prompt[:9])])[0]
            second = run.step([("a", reference.prompt[9:])])[0]
            logits[rank] = np.concatenate([first, second])
        except BaseException:
            group.barrier.abort()
            raise

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in logits:
        assert found is not None
        assert_close(found, reference.logits)
    # Two sums a layer, one after the embedding, the logits put together; over two steps.
    assert group.collectives == 2 * (2 * len(load(name)[1].layers) + 2)
    whole = load(name)[1].layers.values()
    held_by_one = sum(w.nbytes for layer in whole for w in layer.arrays.values())
    assert max(bytes_held) < 0.8 * held_by_one


def test_a_vocabulary_the_ranks_do_not_divide_is_held_whole() -> None:
    config = {**config_of("llama2"), "vocab_size": 271}
    layout = Layout(tp_rank=1, tp_size=2)
    (part,) = Llama(config, layout).head_weights()["tokens"].parts
    assert part.shard == "all"
    (part,) = Llama({**config, "vocab_size": 270}, layout).head_weights()["tokens"].parts
    assert part.shard == "rows"


def test_tensor_parallel_sizes_that_do_not_divide_are_refused() -> None:
    config = {**config_of("llama2"), "num_key_value_heads": 2, "intermediate_size": 44}
    with pytest.raises(ModelConfigError, match=r"3 tensor-parallel ranks .* do: 1, 2, 4$"):
        Llama(config, Layout(tp_size=3))
    with pytest.raises(ModelConfigError, match="num_key_value_heads: 3 does not divide"):
        Llama({**config, "num_key_value_heads": 3})


# --- configs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("llama2", "hidden_size", None, "hidden_size: is missing"),
        ("llama2", "vocab_size", "many", "vocab_size: must be a whole number, not 'many'"),
        ("llama2", "num_hidden_layers", 0, "num_hidden_layers: must be at least 1, not 0"),
        ("llama2", "num_attention_heads", float("inf"), "num_attention_heads: must be a whole"),
        ("llama2", "rms_norm_eps", -1.0, "rms_norm_eps: must be a positive number"),
        ("llama2", "rms_norm_eps", float("nan"), "rms_norm_eps: must be a positive number"),
        ("llama2", "attention_bias", "yes", "attention_bias: must be true or false"),
        ("llama2", "hidden_act", "relu", "hidden_act: 'relu' is not supported; supported: silu"),
        ("llama2", "hidden_act", ["silu"], "hidden_act: ['silu'] is not supported"),
        ("llama2", "max_position_embeddings", None, "max_position_embeddings: is missing"),
        ("llama2", "rope_parameters", [], "rope_parameters: must be a mapping"),
        ("mistral", "sliding_window", 0, "sliding_window: must be at least 1"),
        ("mixtral", "hidden_act", "gelu_new", "hidden_act: 'gelu_new' is not supported"),
        ("mixtral", "num_experts_per_tok", 5, "num_experts_per_tok: must be at most"),
        ("qwen2", "layer_types", ["full_attention"], "layer_types: must be a list of 3 entries"),
        ("qwen2", "layer_types", ["chunked"] * 3, "layer_types: 'chunked' is not supported"),
        ("qwen2", "sliding_window", None, "sliding_window: is missing"),
        ("qwen3-moe", "mlp_only_layers", "1", "mlp_only_layers: must be a list of whole numbers"),
        ("gemma2", "hidden_activation", "gelu", "hidden_activation: 'gelu' is not supported"),
        ("gemma2", "use_bidirectional_attention", True, "use_bidirectional_attention: true is not"),
        ("gemma3", "attn_logit_softcapping", 50.0, "attn_logit_softcapping: 50.0 is not supp"),
        ("gpt2", "n_embd", 30, "n_head: 4 does not divide n_embd, 30"),
        ("gpt2", "add_cross_attention", True, "add_cross_attention: True is not supported"),
    ],
)
def test_configs_that_cannot_be_honoured_name_the_key(
    name: str, key: str, value: Any, message: str
) -> None:
    config = {**config_of(name), key: value}
    with pytest.raises(ModelConfigError, match=re.escape(message)):
        resolve(config)(config)


def test_context_length_and_windows_come_from_the_config() -> None:
    def windows(name: str, **changes: Any) -> list[int | None]:
        config = {**config_of(name), **changes}
        model = resolve(config)(config)
        return [model.kv_spec(layer).window for layer in range(model.num_layers)]

    assert resolve(config_of("gpt2"))(config_of("gpt2")).max_positions == 64
    assert resolve(config_of("llama2"))(config_of("llama2")).max_positions == 256
    assert windows("mistral") == [7, 7]
    assert windows("mistral", sliding_window=None) == [None, None]
    assert windows("qwen2") == [None, 6, 6]
    assert windows("qwen2", layer_types=None, max_window_layers=2) == [None, None, 6]
    assert windows("qwen2", use_sliding_window=False) == [None] * 3
    assert windows("qwen3-moe", use_sliding_window=True, sliding_window=9) == [9, 9, 9]
    assert windows("gemma2") == [6, None, 6]
    assert windows("gemma2", layer_types=None) == [6, None, 6]
    assert windows("gemma3") == [5, 5, None, 5, 5, None]
    assert windows("gemma3", layer_types=None, sliding_window_pattern=2) == [5, None] * 3


def test_dense_layers_of_a_mixture() -> None:
    config = config_of("qwen3-moe")

    def dense_layers(**changes: Any) -> list[int]:
        model = resolve(config)({**config, **changes})
        return [layer for layer in range(3) if "router" not in model.layer_weights(layer)]

    assert dense_layers() == [1]
    assert dense_layers(mlp_only_layers=[], decoder_sparse_step=2) == [0, 2]


def test_multimodal_gemma3_configs_may_leave_out_defaults() -> None:
    """As the published 4B checkpoint's does."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    model = Gemma3({"architectures": ["Gemma3ForConditionalGeneration"], **text})
    assert model.vocab_size == 262_208
    assert model.max_positions == 131_072
    assert model.kv_spec(0) == model.kv_spec(33)
    assert (model.kv_spec(5).window, model.kv_spec(5).kv_heads) == (None, 4)
    assert (model.rope.base, model.rope.factor) == (1e6, 8.0)
    assert (model.local_rope.base, model.local_rope.scaling) == (1e4, "none")
    with pytest.raises(ModelConfigError, match="vocab_size: is missing"):
        Gemma3({"architectures": ["Gemma3ForCausalLM"], **text})


# --- choosing a definition ---------------------------------------------------------------------


def test_unknown_architectures_list_those_known() -> None:
    with pytest.raises(ModelConfigError) as raised:
        resolve({"architectures": ["LlamaForCasualLM"]})
    assert "did you mean LlamaForCausalLM" in str(raised.value)
    assert all(name in str(raised.value) for name in ARCHITECTURES)
    with pytest.raises(ModelConfigError, match="architectures: is missing"):
        resolve({})


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    source = "from tensorray.builder.models.llama import Llama\nclass Mine(Llama):\n    pass\n"
    file = tmp_path / "mine.py"
    file.write_text(source)
    chosen = resolve({"architectures": ["Whatever"]}, f"{file}:Mine")
    assert issubclass(chosen, Llama)
    assert chosen is resolve({}, f"{file}:Mine")
    file.write_text(source + "    edited = True\n")
    assert resolve({}, f"{file}:Mine").edited  # type: ignore[attr-defined]
    assert resolve({}, "tensorray.builder.models.llama:Llama") is Llama


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        ("Llama", "must be pkg.module:Class or path/to/file.py:Class"),
        ("nowhere/model.py:Model", "there is no file nowhere/model.py"),
        ("no_such_package.models:Model", "No module named 'no_such_package'"),
        ("tensorray.builder.models.llama:Lama", "Lama is not there; models in .*: Llama"),
        ("tensorray.builder.rope:RopeSpec", "RopeSpec is not a subclass"),
    ],
)
def test_bad_model_classes_say_what_is_wrong(model_class: str, message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        resolve({}, model_class)


def test_documented_example_runs() -> None:
    """deploy/examples/custom_model.py serves a checkpoint that no built-in family does."""
    example = Path(__file__).parents[1] / "deploy" / "examples" / "custom_model.py"
    assert len(example.read_text().splitlines()) < 100
    definition = resolve({}, f"{example}:ParallelLlama")
    checkpoint = open_checkpoint(str(tiny_models.directory("llama2")))
    model = definition(checkpoint.config)
    weights = load_weights(model, checkpoint)
    checkpoint.close()
    prompt = tiny_models.references("llama2")[0].prompt
    whole = PagedRun(model, weights).step([("a", prompt)])[0]
    run = PagedRun(model, weights)
    pieces = [run.step([("a", piece)])[0] for piece in (prompt[:11], prompt[11:12], prompt[12:])]
    assert_close(np.concatenate(pieces), whole)
    assert_close(whole, _parallel_llama(checkpoint.config, weights, prompt))


def _parallel_llama(config: dict[str, Any], w: ShardWeights, prompt: Any) -> Any:
    """The example's math once more, plainly, for one sequence."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim, n = hidden // heads, len(prompt)

    def norm(x: Any, weight: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight

    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * np.arange(n)[:, None, None] * frequencies)

    def rotate(x: Any) -> Any:
        turned = (x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    x = w.embed.tokens[prompt].astype(np.float64)
    for layer in w.layers.values():
        y = norm(x, layer.norm)
        q, k, v = np.split((y @ layer.qkv.T).reshape(n, 3 * heads, head_dim), 3, axis=1)
        scores = np.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / np.sqrt(head_dim)
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weights, v).reshape(n, hidden)
        gate, up = np.split(y @ layer.gate_up.T, 2, axis=-1)
        mlp = (gate / (1 + np.exp(-gate)) * up) @ layer.down.T
        x = x + attended @ layer.o.T + mlp
    return norm(x, w.head.norm) @ w.head.tokens.T


# --- the interpreter ---------------------------------------------------------------------------


def test_every_op_has_a_kind_that_the_interpreter_keeps() -> None:
    ops = [name for name in dir(Ops) if not name.startswith("_")]
    kinds = {name: getattr(Ops, name).op_kind for name in ops}
    assert kinds["linear"] == "segment"
    assert kinds["attention"] == "kernel"
    assert kinds == {name: getattr(ArrayOps, name).op_kind for name in ops}


def test_rope_tables_stop_where_sequences_do() -> None:
    model, weights = load("llama2")
    prompt = tiny_models.references("llama2")[1].prompt
    bounded = PagedRun(model, weights, make_ops=lambda kv: ArrayOps(np, kv, max_positions=3))
    whole = PagedRun(model, weights)
    np.testing.assert_array_equal(bounded.step([("a", prompt)])[0], whole.step([("a", prompt)])[0])
    with pytest.raises((IndexError, ValueError)):  # NumPy's word, and the native kernel's
        bounded.step([("a", prompt)])


def test_fixture_files_are_small() -> None:
    sizes = [path.stat().st_size for path in tiny_models.MODELS.rglob("*") if path.is_file()]
    assert sum(sizes) < 3e6
    for name in tiny_models.NAMES:
        tokenizer = json.loads((tiny_models.directory(name) / "tokenizer.json").read_text())
        assert len(tokenizer["model"]["vocab"]) == config_of(name)["vocab_size"]
