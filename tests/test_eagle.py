"""EAGLE and EAGLE-3 on a CPU shard: their guesses are the papers', the tokens those without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.eagle_files import PlainEagle, write_eagle
from helpers.paged_run import PagedRun
from helpers.running import Arrival, load, run
from helpers.tiny_models import directory
from helpers.torch_files import torch_bytes
from safetensors.numpy import load_file, save_file
from test_speculative import arrivals, compare, generate, start

from tensorray.actors.drafter import Guess
from tensorray.actors.eagle import EagleDraft
from tensorray.actors.protocol import Sampling
from tensorray.actors.speculative_config import parse_speculative_config
from tensorray.builder.checkpoint import CheckpointError
from tensorray.builder.model import Model, ModelConfigError
from tensorray.builder.models.eagle import Eagle, Eagle3
from tensorray.builder.models.llama import Llama
from tensorray.cluster.draft_length import DraftLength
from tensorray.cluster.llm import LLM, SamplingParams

METHODS = ["eagle", "eagle3"]
HIDDEN, VOCAB = 32, 272


@pytest.fixture(autouse=True)
def cheap_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if drafts took no time, so that a layer for a model of two pays too."""
    cost = property(lambda self: 0.0, lambda self, value: None)
    monkeypatch.setattr(EagleDraft, "cost", cost)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many guesses as there can be, wrong as they are."""
    monkeypatch.setattr(DraftLength, "length", lambda self, s: self._drafting.max_tokens)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Drafts of random weights, which guess little right; "speculators" is an EAGLE-3 draft as that
    library writes them."""
    made = tmp_path_factory.mktemp("drafts")
    drafts = {name: write_eagle(made / name, eagle3=name == "eagle3") for name in METHODS}
    path = drafts["speculators"] = write_eagle(made / "speculators", eagle3=True)
    layer = json.loads((path / "config.json").read_text())
    moved = ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids")
    config = {key: layer.pop(key) for key in moved} | {
        "architectures": ["Eagle3Speculator"],
        "norm_before_residual": True,
        "speculators_model_type": "eagle3",
        "target_hidden_size": None,
        "transformer_layer_config": layer,
    }
    (path / "config.json").write_text(json.dumps(config))
    return drafts


def using(method: str, path: Path, tokens: int = 3) -> dict[str, Any]:
    return {"method": method, "model": str(path), "num_speculative_tokens": tokens}


# --- what is guessed ------------------------------------------------------------------------------


class Recorded:
    """Every guess that a drafter reads, beside what was known then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[int, int, list[np.ndarray]]] = []  # sequence, known tokens, logits
        draft = EagleDraft.draft

        def recording(
            drafter: EagleDraft, seqs: Any, rooms: Any, tables: Any, guess: Guess
        ) -> list[list[int]]:
            rows: dict[int, list[np.ndarray]] = {seq: [] for seq in seqs}

            def heard(seq: int, ahead: int, row: np.ndarray) -> int:
                assert ahead == len(rows[seq])
                rows[seq].append(row.copy())
                return int(row.argmax())

            found = draft(drafter, seqs, rooms, tables, heard)
            assert [len(tokens) for tokens in found] == [len(rows[seq]) for seq in seqs]
            self.read += [(seq, drafter._reached[seq].positions + 1, rows[seq]) for seq in seqs]
            return found

        monkeypatch.setattr(EagleDraft, "draft", recording)


def states_of(model: Model, weights: Any, tokens: list[int]) -> list[np.ndarray]:
    """What each layer reads of a sequence that runs at once, and what comes out of the last."""
    paged = PagedRun(model, weights)
    batch = paged.ops.batch = paged._pack([("all", np.array(tokens, np.int32))])
    states = [model.embed(paged.ops, weights.embed, batch.tokens)]
    for layer, layer_weights in weights.layers.items():
        states.append(model.layer(paged.ops, layer_weights, states[-1], layer))
    return states


def expected(method: str, path: Path, tokens: list[int], count: int) -> list[np.ndarray]:
    """The logits that the plain draft reads its guesses after `tokens` from."""
    model, weights = load(directory("llama3"))
    *before, last = states_of(model, weights, tokens[:-1])
    if method == "eagle":
        norm = np.asarray(weights.head.norm, np.float64)
        states = last / np.sqrt((last**2).mean(-1, keepdims=True) + 1e-6) * norm
    else:
        states = np.concatenate([*before, last], axis=-1)
    draft = PlainEagle(
        load_file(path / "model.safetensors"),
        eagle3=method == "eagle3",
        adds_to_normed=path.name == "speculators",
    )
    projection = np.asarray(weights.head.tokens, np.float64)
    return draft.guesses(tokens, states.astype(np.float64), projection, count)[1]


def assert_guesses(method: str, path: Path, recorded: Recorded, known: list[list[int]]) -> None:
    assert len(recorded.read) > 20
    assert {len(rows) for _, _, rows in recorded.read} >= {3}
    for seq, count, rows in recorded.read[:: max(1, len(recorded.read) // 15)]:
        plain = expected(method, path, known[seq][:count], len(rows))
        for ours, row in zip(rows, plain, strict=True):
            assert (np.isinf(ours) == np.isinf(row)).all()
            seen = np.isfinite(row)
            scale = np.abs(row[seen]).max()
            np.testing.assert_allclose(ours[seen] / scale, row[seen] / scale, atol=2e-3)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", [*METHODS, "speculators"])
def test_guesses_are_read_from_what_the_papers_say(
    kind: str, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through prompts in chunks, wrong guesses, batches, and blocks that are lost to others."""
    recorded = Recorded(monkeypatch)
    method = "eagle" if kind == "eagle" else "eagle3"
    how = using(method, drafts[kind])
    settings = {"max_num_batched_tokens": 16, "num_kv_blocks": 34}
    shard, scheduler = start("llama3", how, **settings)
    asked = arrivals()
    outcomes = run(shard, scheduler, asked)
    stats = scheduler.stats()
    assert stats.preemptions > 0
    assert stats.draft_tokens > stats.accepted_tokens
    known = [each.prompt + outcome.tokens for each, outcome in zip(asked, outcomes, strict=True)]
    assert_guesses(method, drafts[kind], recorded, known)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("method", METHODS)
def test_other_names_shapes_and_files_of_the_same_draft_guess_the_same(
    method: str, drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save's files, vLLM's names, and the model's own embedding where the draft has none."""
    _, weights = load(directory("llama3"))
    table = np.asarray(weights.embed.tokens)
    shared = write_eagle(
        tmp_path / "shared", eagle3=method == "eagle3", **{"embed_tokens.weight": table}
    )
    without = write_eagle(
        tmp_path / "without", eagle3=method == "eagle3", **{"embed_tokens.weight": None}
    )
    prefixed = tmp_path / "prefixed"
    prefixed.mkdir()
    tensors = load_file(without / "model.safetensors")
    for name in tensors.keys() - {"lm_head.weight", "d2t", "t2d"}:
        tensors[f"model.{name.replace('midlayer', 'layers.0')}"] = tensors.pop(name)
    save_file(tensors, prefixed / "model.safetensors")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    plain = {k: t for k, t in load_file(shared / "model.safetensors").items() if k != "t2d"}
    (pickled / "pytorch_model.bin").write_bytes(torch_bytes(plain))
    for path in (prefixed, pickled):
        (path / "config.json").write_bytes((shared / "config.json").read_bytes())

    def read(path: Path) -> list[Any]:
        with monkeypatch.context() as patch:
            recorded = Recorded(patch)
            shard, scheduler = start("llama3", using(method, path))
            (outcome,) = run(shard, scheduler, arrivals()[:1])
            known = [arrivals()[0].prompt + outcome.tokens]
            if path is shared:
                assert_guesses(method, path, recorded, known)
            assert shard._speculation is not None
            assert shard._speculation._drafter._parts.embedder is shard._model  # type: ignore
        return [row for _, _, rows in recorded.read for row in rows]

    first = read(shared)
    for path in (without, prefixed, pickled):
        np.testing.assert_array_equal(read(path), first)


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_no_token_changes(name: str, method: str, drafts: dict[str, Path]) -> None:
    _, counted = compare(name, using(method, drafts[method]))
    assert counted["drafted"] > counted["accepted"]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("method", "name"), [("eagle", "gemma3"), ("eagle3", "llama3")])
def test_preemption_and_prefix_reuse_change_no_token_either(
    method: str, name: str, drafts: dict[str, Path]
) -> None:
    how = using(method, drafts[method])
    plain = run(*start(name, None), arrivals())
    blocks = {"gemma3": 60, "llama3": 30}[name]
    shard, scheduler = start(name, how, num_kv_blocks=blocks, max_num_batched_tokens=20)
    assert run(shard, scheduler, arrivals()) == plain
    assert scheduler.stats().preemptions > 0
    shard, scheduler = start(name, how)
    twice = [replace(each, step=after) for after in (0, 60) for each in arrivals()]
    assert run(shard, scheduler, twice) == plain * 2
    assert scheduler.stats().prefix_hits > 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("method", METHODS)
def test_what_the_drafts_cache_holds_changes_no_token(method: str, drafts: dict[str, Path]) -> None:
    """As where blocks come from another replica: whatever is found beside them."""
    plain = run(*start("llama3", None), arrivals())
    shard, scheduler = start("llama3", using(method, drafts[method]))
    assert run(shard, scheduler, arrivals()) == plain
    assert shard._speculation is not None
    for layer in shard._speculation._drafter._cache.ops.kv.values():  # type: ignore
        layer.k_pages[...] = layer.v_pages[...] = np.nan
    again = [replace(each, step=0) for each in arrivals()]
    assert run(shard, scheduler, again) == plain
    assert scheduler.stats().prefix_hits > 0


@pytest.mark.usefixtures("always")
def test_sequences_longer_than_the_draft_can_follow_go_on_without(tmp_path: Path) -> None:
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 30}
    path = write_eagle(tmp_path / "short", config=scaled)
    asked = [
        Arrival(0, [20, 21, 22, 23] * 3, Sampling(temperature=0.0), 40),
        Arrival(0, [30, 31, 32, 33] * 9, Sampling(temperature=0.0), 20),
    ]
    shard, scheduler = start("llama3", using("eagle", path))
    outcomes = run(shard, scheduler, asked)
    assert outcomes == run(*start("llama3", None), asked)
    assert 0 < scheduler.stats().draft_tokens < 3 * 20


def write_target(path: Path, window: int) -> dict[str, Any]:
    """A one-layer model without biases, all of whose tokens' embeddings are equally long."""
    rng = np.random.default_rng(3)
    kv = 16

    def matrix(rows: int, columns: int) -> Any:
        return rng.normal(0, 0.3, (rows, columns)).astype(np.float32)

    embedding = matrix(VOCAB, HIDDEN)
    embedding /= np.sqrt((embedding**2).mean(-1, keepdims=True))
    at = "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": embedding,
        f"{at}.input_layernorm.weight": rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
        f"{at}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
        f"{at}.self_attn.k_proj.weight": matrix(kv, HIDDEN),
        f"{at}.self_attn.v_proj.weight": matrix(kv, HIDDEN),
        f"{at}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
        f"{at}.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
        f"{at}.mlp.gate_proj.weight": matrix(48, HIDDEN),
        f"{at}.mlp.up_proj.weight": matrix(48, HIDDEN),
        f"{at}.mlp.down_proj.weight": matrix(HIDDEN, 48),
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": matrix(VOCAB, HIDDEN),
    }
    config = json.loads((directory("mistral") / "config.json").read_text())
    config |= {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
        "sliding_window": window,
        "tie_word_embeddings": False,
    }
    config.pop("rope_parameters", None)
    config["rope_theta"] = 10000.0
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return tensors


def accepted(model: Path, how: dict[str, Any]) -> tuple[float, set[int]]:
    """The share of guesses that were right, and all tokens of the answers: greedy ones, to prompts
    longer than a window, each twice, so that the second time they are found in the cache."""
    asked = [
        Arrival(step + i, list(range(10 * i, 10 * i + 14)), Sampling(temperature=0.0), 30)
        for step in (0, 40)
        for i in range(4)
    ]
    plain = run(*start(str(model), None), asked)
    shard, scheduler = start(str(model), how, max_num_batched_tokens=13)
    assert run(shard, scheduler, asked) == plain
    stats = scheduler.stats()
    assert stats.draft_tokens > 100
    assert stats.prefix_hits > 0
    share = stats.accepted_tokens / stats.draft_tokens
    return share, {token for outcome in plain for token in outcome.tokens}


@pytest.mark.usefixtures("always")
def test_a_draft_that_computes_the_models_own_states_is_always_right(tmp_path: Path) -> None:
    """It takes the next token alone; the model's norm before attention is in its projections. One
    place earlier in the draft than in the model, all tokens see the same others, in a window."""
    target = write_target(tmp_path / "target", window=6)
    norm = target["model.layers.0.input_layernorm.weight"]
    own = {
        name.removeprefix("model."): tensor * norm if "qkv".count(name[-13:-12]) else tensor
        for name, tensor in target.items()
        if ".self_attn." in name or ".mlp." in name or "post_attention" in name
    }
    changes = {
        **own,
        "fc.weight": np.eye(HIDDEN, 2 * HIDDEN, dtype=np.float32),
        "fc.bias": None,
        "embed_tokens.weight": None,
    }
    path = write_eagle(tmp_path / "draft", **changes)
    assert accepted(tmp_path / "target", using("eagle", path))[0] > 0.97
    # The same draft that saw hidden states in place of tokens would be lost.
    turned = np.roll(changes["fc.weight"], HIDDEN, axis=1)
    path = write_eagle(tmp_path / "turned", **changes | {"fc.weight": np.ascontiguousarray(turned)})
    assert accepted(tmp_path / "target", using("eagle", path))[0] < 0.5


@pytest.mark.usefixtures("always")
def test_an_eagle3_draft_that_computes_the_models_own_states_is_always_right(
    tmp_path: Path,
) -> None:
    """Of a model whose tokens see themselves only; what the draft goes on from is nothing, so that
    attention has to bring the token's embedding too."""
    target = write_target(tmp_path / "target", window=1)
    at = "model.layers.0"
    norm = target[f"{at}.input_layernorm.weight"]
    values = target[f"{at}.self_attn.v_proj.weight"].reshape(2, 8, HIDDEN).repeat(2, 0)
    through = target[f"{at}.self_attn.o_proj.weight"] @ values.reshape(HIDDEN, HIDDEN)
    nothing = np.zeros((HIDDEN, 2 * HIDDEN), np.float32)
    changes = {
        "midlayer.self_attn.q_proj.weight": nothing,
        "midlayer.self_attn.k_proj.weight": nothing,
        "midlayer.self_attn.v_proj.weight": (
            (through + np.diag(1 / norm)) @ np.eye(HIDDEN, 2 * HIDDEN)
        ).astype(np.float32),
        "midlayer.self_attn.o_proj.weight": np.eye(HIDDEN, dtype=np.float32),
        "midlayer.input_layernorm.weight": norm,
        "midlayer.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
        "fc.weight": np.zeros((HIDDEN, 3 * HIDDEN), np.float32),
        "norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": target["lm_head.weight"],
        "d2t": None,
        "embed_tokens.weight": None,
    }
    for name in ("gate", "up", "down"):
        changes[f"midlayer.mlp.{name}_proj.weight"] = target[f"{at}.mlp.{name}_proj.weight"]
    settings = {"num_key_value_heads": 4, "eagle_aux_hidden_state_layer_ids": [0, 1, 1]}
    path = write_eagle(
        tmp_path / "draft", eagle3=True, draft_vocab=VOCAB, config=settings, **changes
    )
    share, needed = accepted(tmp_path / "target", using("eagle3", path, 1))
    assert share > 0.97
    # Nor does it take tokens that never come; but it does take those that do.
    for known, right in ((needed | set(range(0, VOCAB, 3)), True), (range(VOCAB), False)):
        rows = np.array(sorted(known if right else set(known) - needed))
        few = changes | {"lm_head.weight": target["lm_head.weight"][rows]}
        few["d2t"] = rows - np.arange(len(rows))
        path = write_eagle(
            tmp_path / f"few {right}", eagle3=True, draft_vocab=len(rows), config=settings, **few
        )
        share, _ = accepted(tmp_path / "target", using("eagle3", path, 1))
        assert share > 0.97 if right else share == 0


def test_tensor_parallel_ranks_run_the_same_drafts(drafts: dict[str, Path]) -> None:
    """The rank that guesses has a part of the model's head only, and reads the whole one too."""
    prompts = [each.prompt for each in arrivals()][:3]
    params = SamplingParams(temperature=0.6, max_tokens=16, seed=1, ignore_eos=True)

    def ask(llm: LLM) -> Any:
        outputs = llm.generate(prompts, params)
        rejected = sum(output.usage.rejected_prediction_tokens for output in outputs)
        return [output.outputs[0].token_ids for output in outputs], rejected

    alone, _ = generate({}, ask)
    for method in METHODS:
        tokens, drafted = generate(using(method, drafts[method]), ask, tensor_parallel_size=2)
        assert tokens == alone
        assert drafted > 0


# --- what does not fit ----------------------------------------------------------------------------


def load_with(path: Path, method: str, name: str = "llama3", **settings: Any) -> None:
    start(name, using(method, path), **settings)


@pytest.mark.parametrize(
    ("method", "made", "message"),
    [
        ("eagle", {"hidden": 16}, r"hidden_size: the draft was made for a model of 16; .* 32"),
        ("eagle", {"vocab": 280}, r"vocab_size: the draft was made for 280 tokens; .* 272"),
        ("eagle", {"config": {"num_hidden_layers": 2}}, "an EAGLE draft has 1, not 2"),
        ("eagle", {"fc.weight": None}, "'?fc.weight'?"),
        ("eagle", {"eagle3": True}, r"shape \[32, 96\]"),
        ("eagle3", {}, "eagle_aux_hidden_state_layer_ids"),
        (
            "eagle3",
            {"eagle3": True, "config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}},
            r"must be three layers of the model's 2, not \[0, 1, 3\]",
        ),
        (
            "eagle3",
            {"eagle3": True, "config": {"target_hidden_size": 64}},
            r"target_hidden_size: the draft was made for a model of 64",
        ),
        ("eagle3", {"eagle3": True, "hidden": 16}, r"for a model of 16; this one has 32"),
        (
            "eagle3",
            {
                "eagle3": True,
                "hidden": 16,
                "config": {"target_hidden_size": 32},
                "embed_tokens.weight": None,
            },
            "needs an embedding of its own",
        ),
        ("eagle3", {"eagle3": True, "d2t": None}, "no tensor 'd2t'"),
        ("eagle3", {"eagle3": True, "d2t": np.zeros(7, np.int64)}, r"'d2t' has shape \[7\]"),
        (
            "eagle3",
            {"eagle3": True, "d2t": np.full(120, 200)},
            "does not name 120 different tokens of 272",
        ),
        (
            "eagle3",
            {"eagle3": True, "config": {"norm_before_fc": True}},
            "norm_before_fc",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, method: str, made: dict[str, Any], message: str
) -> None:
    path = write_eagle(tmp_path / "draft", **made)
    with pytest.raises((ModelConfigError, CheckpointError), match=message):
        load_with(path, method)


@pytest.mark.parametrize("method", METHODS)
def test_an_eagle_draft_is_not_taken_for_a_model(
    method: str, drafts: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever prefix its names have, and whether or not it guesses all tokens."""
    tensors = load_file(drafts[method] / "model.safetensors")
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items() if name != "d2t"}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((drafts[method] / "config.json").read_bytes())
    for path in (drafts[method], tmp_path):
        with pytest.raises(ModelConfigError, match=f'an EAGLE draft: add "method": "{method}"'):
            start("llama3", {"model": str(path)})
    one = parse_speculative_config(using(method, drafts[method]))
    vllms = {**using(method, drafts[method]), "draft_tensor_parallel_size": 1}
    assert parse_speculative_config(vllms) == one


def test_a_model_that_does_not_say_what_its_head_is_made_of_has_no_eagle_draft(
    drafts: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from tensorray.builder.model import Model\n"
        "from tensorray.builder.models.llama import Llama\n"
        "class Own(Llama):\n"
        "    project = Model.project\n"
    )
    with pytest.raises(ModelConfigError, match=r"Own does not say .* \(Model.project\)"):
        load_with(drafts["eagle"], "eagle", model_class=f"{file}:Own")


def test_layers_are_the_authors_or_the_configs() -> None:
    class Deep(Llama):
        def __init__(self, layers: int) -> None:
            config = json.loads((directory("llama3") / "config.json").read_text())
            super().__init__(config | {"num_hidden_layers": layers})

    config = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_act": "silu",
        "max_position_embeddings": 48,
    }

    def layers(kind: type[Eagle], deep: int, **more: Any) -> tuple[int, ...]:
        return kind({**config, **more}, Deep(deep), set()).reads

    assert layers(Eagle, 32) == (32,)
    assert layers(Eagle3, 32) == (2, 16, 29)
    assert layers(Eagle3, 32, eagle_aux_hidden_state_layer_ids=[1, 5, 9]) == (1, 5, 9)
    nested = {"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}
    assert layers(Eagle3, 32, eagle_config=nested) == (2, 16, 29)
    with pytest.raises(ModelConfigError, match="layers 2, n/2 and n-3"):
        layers(Eagle3, 6)
