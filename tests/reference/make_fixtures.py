"""Make the tiny checkpoints of tests/fixtures/models, and what transformers computes with them.

Needs torch, transformers and tokenizers, which the project itself does not:

    python tests/reference/make_fixtures.py
    python tests/reference/make_fixtures.py --references  # anew, of the checkpoints as they are

Every family is random, a few layers deep, and saved by `save_pretrained`, so that its files are
what the Hub's are. Weights are large and windows, soft caps and rotary contexts short, so that
each of them shows in the logits; `matters` lists config changes, and the script fails if one of
them does not. Beside a checkpoint, reference.npz has, for each prompt i, `prompt_i` int32 `[n]`,
`logits_i` float32 `[n, vocab]`, and `greedy_i` int32 `[16]`, the greedy continuation. Weights are
float32; all else that leads to the references is computed in float64 (see `Float64`), and only
then are logits rounded to float32, so that what a test finds is the error of what it tests.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

FIXTURES = Path(__file__).parents[1] / "fixtures"
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]
BEGIN, END = 0, 1
VOCAB = 272
PROMPT_LENGTHS = (26, 3, 9)
GREEDY_TOKENS = 16
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = ["the rain in the thin train", "then the other one", "in and on and under it"]

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": None,
}

# The vision tower of a multimodal checkpoint, which is there to be left alone.
TINY_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 4,
    "patch_size": 2,
    "vision_use_head": False,
}


@dataclass
class Fixture:
    """A checkpoint to make. Keys of `config` come on top of COMMON's."""

    kind: str  # the transformers classes' prefix
    config: dict[str, Any]
    matters: list[dict[str, Any]] = field(default_factory=list)
    common: bool = True
    chat: bool = True
    seed: int = 0

    def config_of(self, **changes: Any) -> Any:
        keys = {**(COMMON if self.common else {}), **self.config, **changes}
        if self.kind == "Gemma3":
            return transformers.Gemma3Config(text_config=keys, vision_config=TINY_VISION)
        return getattr(transformers, f"{self.kind}Config")(**keys)


def rope(kind: str = "default", theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **parameters}


LLAMA3_ROPE = rope(
    "llama3",
    500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN_ROPE = rope("yarn", 1000.0, factor=4.0, original_max_position_embeddings=32)
GEMMA3_ROPES = {
    "full_attention": rope("linear", 1000000.0, factor=8.0),
    "sliding_attention": rope("default", 10000.0),
}

MODELS: dict[str, Fixture] = {
    "llama2": Fixture(
        "Llama",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_parameters": rope()},
        chat=False,
        seed=1,
    ),
    "llama3": Fixture(
        "Llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        [{"rope_parameters": rope(theta=500000.0)}],
        seed=2,
    ),
    "llama-biased": Fixture(
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rope_parameters": rope()},
        seed=3,
    ),
    "mistral": Fixture(
        "Mistral",
        {"sliding_window": 7, "rope_parameters": rope(theta=1000.0)},
        [{"sliding_window": None}, {"sliding_window": 8}],
        seed=4,
    ),
    "qwen2": Fixture(
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_parameters": rope(theta=1000000.0),
        },
        [{"use_sliding_window": False}, {"max_window_layers": 2}],
        seed=5,
    ),
    "qwen2-yarn": Fixture(
        "Qwen2",
        {"max_position_embeddings": 128, "use_sliding_window": False, "rope_parameters": YARN_ROPE},
        [{"rope_parameters": rope(theta=1000.0)}],
        seed=6,
    ),
    "qwen3": Fixture(
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": rope(theta=1000000.0)},
        seed=7,
    ),
    "qwen3-moe": Fixture(
        "Qwen3Moe",
        {
            "num_hidden_layers": 3,
            "head_dim": 8,
            "moe_intermediate_size": 12,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "rope_parameters": rope(),
        },
        [{"norm_topk_prob": True}, {"num_experts_per_tok": 2}],
        seed=8,
    ),
    "mixtral": Fixture(
        "Mixtral",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 16,
            "rope_parameters": rope(theta=1000000.0),
        },
        [{"num_experts_per_tok": 1}],
        seed=9,
    ),
    "gemma2": Fixture(
        "Gemma2",
        {
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": rope(),
        },
        [
            {"query_pre_attn_scalar": 12},
            {"sliding_window": 64},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
        ],
        seed=10,
    ),
    "gemma3": Fixture(
        "Gemma3Text",
        {
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "rope_parameters": GEMMA3_ROPES,
        },
        [
            {"query_pre_attn_scalar": 16},
            {"sliding_window": 64},
            {"sliding_window_pattern": 2},
            {"rope_parameters": {**GEMMA3_ROPES, "full_attention": rope(theta=1000000.0)}},
            {"rope_parameters": {**GEMMA3_ROPES, "sliding_attention": rope(theta=100.0)}},
        ],
        seed=11,
    ),
    "gemma3-multimodal": Fixture(
        "Gemma3",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": GEMMA3_ROPES,
        },
        seed=13,
    ),
    "gpt2": Fixture(
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "initializer_range": 0.3,
            "bos_token_id": BEGIN,
            "eos_token_id": END,
        },
        [{"scale_attn_by_inverse_layer_idx": True}],
        common=False,
        chat=False,
        seed=12,
    ),
}

# Rotary embeddings as published models' configs of either spelling ask for them.
ROPES: dict[str, dict[str, Any]] = {
    "llama 2": {"rope_theta": 10000.0, "max_position_embeddings": 4096, "head_dim": 128},
    "llama 3.1": {
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "head_dim": 128,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "linear, old key": {
        "rope_theta": 10000.0,
        "max_position_embeddings": 16384,
        "head_dim": 128,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "qwen 2.5 yarn": {
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "head_dim": 128,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "yarn, mscale": {
        "max_position_embeddings": 163840,
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 24,
            "beta_slow": 2,
        },
    },
    "yarn, attention factor": {
        "max_position_embeddings": 8192,
        "head_dim": 96,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 50000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.5,
        },
    },
}


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE with every byte, a few merges and the special tokens: VOCAB in all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return tokenizer


def save_tokenizer(directory: Path, chat: bool) -> None:
    tokenizer = make_tokenizer()
    if chat:  # the others, like GPT-2, begin with no token of their own
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[BEGIN]} $A",
            special_tokens=[(SPECIAL[BEGIN], BEGIN)],
        )
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BEGIN],
        "eos_token": SPECIAL[END],
        "add_bos_token": chat,
    }
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_model(fixture: Fixture) -> Any:
    """A model with random norms and biases too, which transformers would set to one and zero."""
    torch.manual_seed(fixture.seed)
    config = fixture.config_of()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


class Float64(TorchFunctionMode):
    """Within it, what asks torch for float32 gets float64.

    `model.double()` is not enough: rotary angles, norms, and the softmaxes of attention and of
    routers say float32 in transformers' code, whatever the weights are.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = tree_map(
            lambda each: torch.float64 if each is torch.float32 else each, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class OnlyFloat64(Float64):
    """Float64 which fails at any result of fewer bits, so that none comes in unseen."""

    def __torch_function__(self, *call: Any) -> Any:
        result = super().__torch_function__(*call)
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                assert each.dtype is torch.float64, f"{call[0]} gave {each.dtype}"
        return result


def load_float64(directory: Path) -> Any:
    """The checkpoint's model, its weights and its own constants (rotary frequencies) float64."""
    with Float64():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",  # torch's grouped products know no float64
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype is torch.float64 or not tensor.is_floating_point(), name
    return model.eval()


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
    return out.logits[0].numpy()


def greedy(model: Any, prompt: np.ndarray) -> np.ndarray:
    tokens = prompt
    for _ in range(GREEDY_TOKENS):
        tokens = np.append(tokens, np.int32(logits_of(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def references_of(directory: Path, prompts: list[np.ndarray]) -> dict[str, np.ndarray]:
    model = load_float64(directory)
    arrays: dict[str, np.ndarray] = {}
    with OnlyFloat64():
        for i, prompt in enumerate(prompts):
            arrays[f"prompt_{i}"] = prompt
            arrays[f"logits_{i}"] = logits_of(model, prompt).astype(np.float32)
            arrays[f"greedy_{i}"] = greedy(model, prompt)
    return arrays


def remake_references(name: str) -> None:
    """The references of a checkpoint that stays as it is, whose tokens must come out the same."""
    path = FIXTURES / "models" / name / "reference.npz"
    with np.load(path) as stored:
        old = dict(stored)
    indices = range(len(old) // 3)
    new = references_of(path.parent, [old[f"prompt_{i}"] for i in indices])
    before, after = (
        np.concatenate([arrays[f"logits_{i}"] for i in indices]).astype(np.float64)
        for arrays in (old, new)
    )
    for i in indices:
        assert np.array_equal(old[f"greedy_{i}"], new[f"greedy_{i}"]), f"{name}, prompt {i}"
    np.savez(path, **new)
    change = np.linalg.norm(after - before) / np.linalg.norm(after)
    print(f"{name}: logits change by {change:.1e}, at most by {np.abs(after - before).max():.1e}")


def make_fixture(name: str, fixture: Fixture) -> None:
    directory = FIXTURES / "models" / name
    shutil.rmtree(directory, ignore_errors=True)
    model = make_model(fixture)
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    save_tokenizer(directory, fixture.chat)
    generator = np.random.default_rng(fixture.seed)
    prompts = [
        generator.integers(len(SPECIAL), VOCAB, length).astype(np.int32)
        for length in PROMPT_LENGTHS
    ]
    arrays = references_of(directory, prompts)
    np.savez(directory / "reference.npz", **arrays)
    for changes in fixture.matters:
        config = fixture.config_of(**changes)
        changed = type(model)._from_config(config, attn_implementation="eager").eval()
        missing = changed.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert not missing, missing
        difference = np.abs(logits_of(changed, arrays["prompt_0"]) - arrays["logits_0"]).max()
        assert difference > 0.01, f"{name}: {changes} shows in no logit ({difference})"
    spread = arrays["logits_0"].std(axis=-1).mean()
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(f"{name}: logits' spread {spread:.2f}, {size / 1000:.0f} KB")


def make_ropes() -> None:
    """Frequencies and attention factors of ROPES, by transformers' own functions."""
    cases = []
    for name, keys in ROPES.items():
        config = transformers.LlamaConfig(**keys)
        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            dim = config.head_dim
            base = config.rope_parameters["rope_theta"]
            frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
            factor = 1.0
        else:
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        cases.append(
            {
                "name": name,
                "config": keys,
                "inverse_frequencies": frequencies.tolist(),
                "attention_factor": factor,
            }
        )
    (FIXTURES / "rope.json").write_text(json.dumps(cases) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--references", action="store_true", help="only make references anew")
    only_references = parser.parse_args().references
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name, fixture in MODELS.items():
        if only_references:
            remake_references(name)
        else:
            make_fixture(name, fixture)
    if not only_references:
        make_ropes()
