"""Megatron and NeMo models in Hugging Face's layout: Llama, Qwen 2 and GPT-2's families.

Tensor names are Megatron Core's (`decoder.layers.0.self_attention.linear_qkv.weight`), or those of
NeMo before it (`language_model.encoder.layers.0.self_attention.query_key_value.weight`). Layers may
be stacked along a first axis, as distributed checkpoints have them. Transformer Engine's layers
hold the norm before a projection under that projection's name. The config is `model_config.yaml`
of a .nemo archive, or `context/model.yaml` of NeMo 2.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.mapping import Conversion, Source, head_rows
from tensorray.builder.checkpoint.tensor import StoredTensor

_PREFIX = re.compile(r"^((model|module|state_dict|language_model)\.)+")
_IGNORED = re.compile(r"_extra_state|rotary_pos_emb\.|^(optimizer|opt_state|rng_state|args)\b")
_LAYER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?(.+)$")

#: NeMo's names before Megatron Core's.
_OLDER = (
    ("encoder.layers.", "decoder.layers."),
    ("encoder.final_layernorm.", "decoder.final_layernorm."),
    ("self_attention.query_key_value.", "self_attention.linear_qkv."),
    ("self_attention.dense.", "self_attention.linear_proj."),
    ("mlp.dense_h_to_4h.", "mlp.linear_fc1."),
    ("mlp.dense_4h_to_h.", "mlp.linear_fc2."),
)
#: A layer's norms, by all their names.
_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": ("attention", "weight"),
    "self_attention.linear_qkv.layer_norm_bias": ("attention", "bias"),
    "input_layernorm.weight": ("attention", "weight"),
    "input_layernorm.bias": ("attention", "bias"),
    "mlp.linear_fc1.layer_norm_weight": ("mlp", "weight"),
    "mlp.linear_fc1.layer_norm_bias": ("mlp", "bias"),
    "pre_mlp_layernorm.weight": ("mlp", "weight"),
    "pre_mlp_layernorm.bias": ("mlp", "bias"),
    "post_attention_layernorm.weight": ("mlp", "weight"),
    "post_attention_layernorm.bias": ("mlp", "bias"),
}
_LLAMA_NORMS = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
_GPT2_NORMS = {"attention": "ln_1", "mlp": "ln_2"}


def is_megatron(names: list[str]) -> bool:
    """Whether these are the tensors of a Megatron model."""
    return any(_canonical(name).startswith("embedding.word_embeddings.") for name in names)


def convert(
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
    where: str,
    vocab_size: int | None = None,
) -> Conversion:
    """The model in Hugging Face's layout.

    `config` is the trainer's, `where` names it in messages. `vocab_size` (None: what the config
    says, else all rows) cuts off the rows that the trainer padded the vocabulary with. Raises
    CheckpointError naming the key or tensor that can't be served.
    """
    reader = _Config(config, where)
    ignored: list[str] = []
    sources = _sources(tensors, ignored)
    family: _Family = _Gpt2(reader) if reader.is_gpt2() else _Llama(reader)
    conversion = Conversion({}, ignored=ignored)
    embedding = sources.get("embedding.word_embeddings.weight")
    if embedding is None:
        raise CheckpointError(f"{where}: no tensor embedding.word_embeddings.weight")
    padded = embedding.shape[0]
    vocab = vocab_size or reader.vocab_size() or padded
    if vocab > padded:
        raise CheckpointError(
            f"{embedding.label}: {padded} rows, fewer than the vocabulary's {vocab}"
        )
    if vocab == padded:
        conversion.notes.append(
            f"the vocabulary is taken to be all {padded} rows of the embedding; if the trainer "
            f"padded it, give its size with --vocab-size"
        )
    conversion.config = family.config(vocab, tied="output_layer.weight" not in sources)
    family.convert(conversion, sources, np.arange(vocab) if vocab < padded else None)
    return conversion


def _canonical(name: str) -> str:
    name = _PREFIX.sub("", name)
    for old, new in _OLDER:
        name = name.replace(old, new)
    return name


def _sources(tensors: Mapping[str, StoredTensor], ignored: list[str]) -> dict[str, Source]:
    """Tensors by their names in Megatron Core, layer by layer."""
    found: dict[str, Source] = {}

    def add(name: str, source: Source) -> None:
        if name in found:
            raise CheckpointError(f"{source.label} and {found[name].label} are the same tensor")
        found[name] = source

    for label, tensor in tensors.items():
        name = _canonical(label)
        layer = _LAYER.match(name)
        if _IGNORED.search(label) or _IGNORED.search(name):
            ignored.append(label)
        elif layer and layer[1] is None:
            for i in range(tensor.shape[0]):
                source = Source(f"{label}[{i}]", tensor.slab(i))
                add(f"decoder.layers.{i}.{layer[2]}", source)
        else:
            add(name, Source(label, tensor))
    return found


class _Config:
    """A trainer's config: NeMo 1's keys at the top, NeMo 2's under `config`."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        inner = config.get("config")
        self._config = {**config, **(inner if isinstance(inner, Mapping) else {})}
        self._where = where
        for key, fine in (
            ("num_moe_experts", (0, 1)),
            ("layernorm_zero_centered_gamma", (False,)),
            ("qk_layernorm", (False,)),
            ("rotary_interleaved", (False,)),
            ("window_size", ()),
            ("multi_latent_attention", (False,)),
        ):
            if self._config.get(key) is not None and self._config[key] not in fine:
                raise self.error(key, f"{self._config[key]!r} is not supported")
        self.layers = self.integer("num_layers")
        self.hidden = self.integer("hidden_size")
        self.heads = self.integer("num_attention_heads")
        self.inner = self.integer("ffn_hidden_size", default=4 * self.hidden)
        self.groups = self.integer("num_query_groups", default=self.heads)
        self.head_dim = self.integer("kv_channels", default=self.hidden // self.heads)
        self.positions = self.integer("max_position_embeddings", "seq_length", "encoder_seq_length")
        self.eps = self.number("layernorm_epsilon", default=1e-5)
        if self.heads % self.groups:
            raise self.error(
                "num_query_groups", f"{self.groups} does not divide {self.heads} heads"
            )

    def get(self, *keys: str) -> Any:
        return next((self._config[k] for k in keys if self._config.get(k) is not None), None)

    def integer(self, *keys: str, default: int | None = None) -> int:
        value = self.get(*keys)
        value = default if value is None else value
        if value is None:
            raise self.error(keys[0], "is missing; add it to a copy and pass that with --config")
        if type(value) is not int or value < 1:
            raise self.error(keys[0], f"must be a whole number of at least 1, not {value!r}")
        return value

    def number(self, *keys: str, default: float) -> float:
        value = self.get(*keys)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(keys[0], f"must be a number, not {value!r}")
        return float(value)

    def vocab_size(self) -> int | None:
        value = self.get("override_vocab_size", "vocab_size")
        return value if type(value) is int and value > 0 else None

    def word(self, key: str, default: str) -> str:
        """A name, of a function as well: NeMo 2 writes activations as what to import."""
        value = self.get(key)
        if isinstance(value, Mapping):
            value = value.get("_target_")
        return str(default if value is None else value).rpartition(".")[2].lower()

    def is_gpt2(self) -> bool:
        return self.word("position_embedding_type", "learned_absolute") != "rope"

    def require(self, key: str, value: str, *accepted: str) -> None:
        if value not in accepted:
            raise self.error(
                key, f"{value!r} is not supported for this model, only {', '.join(accepted)}"
            )

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: {key}: {problem}")


class _Family(ABC):
    """What the families share: the walk over the tensors."""

    def __init__(self, reader: _Config) -> None:
        self.c = reader
        self.qkv = head_rows(reader.heads, reader.groups, reader.head_dim)

    @abstractmethod
    def config(self, vocab: int, *, tied: bool) -> dict[str, Any]:
        """The model's config.json."""

    @abstractmethod
    def top(self) -> dict[str, str]:
        """Names of the tensors outside layers."""

    @abstractmethod
    def layer(self, out: Conversion, layer: int, name: str, source: Source) -> bool:
        """Add what a layer's tensor becomes; False if it is none of this family's."""

    def convert(
        self, out: Conversion, sources: dict[str, Source], vocabulary: np.ndarray[Any, Any] | None
    ) -> None:
        top = self.top()
        unknown = []
        for name, source in sources.items():
            match = _LAYER.match(name)
            if name in top:
                by_token = name in ("embedding.word_embeddings.weight", "output_layer.weight")
                rows = vocabulary if by_token else None
                note = "" if rows is None else f"rows 0 to {len(rows) - 1}"
                out.add(top[name], source, rows=rows, note=note)
            elif match is None or not self.layer(out, int(match[1]), match[2], source):
                unknown.append(source.label)
        if unknown:
            raise CheckpointError(
                f"{len(unknown)} tensors have no place in a {type(self).__name__[1:]} model: "
                f"{', '.join(unknown[:5])}"
            )

    def check_rows(self, source: Source, rows: int) -> None:
        if source.shape[0] != rows:
            raise CheckpointError(
                f"{source.label}: {source.shape[0]} rows, but by its config it has {rows}"
            )


class _Llama(_Family):
    """Rotary positions, RMS norms, a gated MLP; Qwen 2 where only q, k and v have biases."""

    def __init__(self, reader: _Config) -> None:
        super().__init__(reader)
        reader.require("normalization", reader.word("normalization", "layernorm"), "rmsnorm")
        activation = reader.word("activation", "") or reader.word("activation_func", "")
        gated = "swiglu" in activation or (bool(reader.get("gated_linear_unit")))
        if not gated or not ("swiglu" in activation or activation in ("silu", "swish")):
            raise reader.error("activation", f"{activation!r} is not supported here, only swiglu")

    def config(self, vocab: int, *, tied: bool) -> dict[str, Any]:
        c = self.c
        every_bias = bool(c.get("bias", "add_bias_linear"))
        qwen2 = bool(c.get("qkv_bias", "add_qkv_bias")) and not every_bias
        config: dict[str, Any] = {
            "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"],
            "model_type": "qwen2" if qwen2 else "llama",
            "hidden_act": "silu",
            "hidden_size": c.hidden,
            "intermediate_size": c.inner,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.groups,
            "head_dim": c.head_dim,
            "max_position_embeddings": c.positions,
            "rms_norm_eps": c.eps,
            "rope_theta": c.number("rotary_base", default=10000.0),
            "tie_word_embeddings": tied,
            "vocab_size": vocab,
        }
        if every_bias:
            config.update(attention_bias=True, mlp_bias=True)
        share = c.number("rotary_percentage", "rotary_percent", default=1.0)
        if share != 1.0:
            config["partial_rotary_factor"] = share
        if c.get("seq_len_interpolation_factor") is not None:
            factor = c.number("seq_len_interpolation_factor", default=1.0)
            config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        if c.get("old_context_len", "scale_positional_embedding"):  # Llama 3.1's frequencies
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": c.number("scale_factor", default=8.0),
                "low_freq_factor": c.number("low_freq_factor", default=1.0),
                "high_freq_factor": c.number("high_freq_factor", default=4.0),
                "original_max_position_embeddings": c.integer("old_context_len", default=8192),
            }
        return config

    def top(self) -> dict[str, str]:
        return {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "output_layer.weight": "lm_head.weight",
        }

    def layer(self, out: Conversion, layer: int, name: str, source: Source) -> bool:
        at = f"model.layers.{layer}"
        if name in _NORMS:
            which, kind = _NORMS[name]
            out.add(f"{at}.{_LLAMA_NORMS[which]}.{kind}", source)
            return kind == "weight"
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return False
        if module == "self_attention.linear_qkv":
            self.check_rows(source, sum(map(len, self.qkv)))
            for letter, rows in zip("qkv", self.qkv, strict=True):
                note = f"{letter} of {self.c.groups} query groups"
                out.add(f"{at}.self_attn.{letter}_proj.{kind}", source, rows=rows, note=note)
        elif module == "mlp.linear_fc1":
            inner = self.c.inner
            self.check_rows(source, 2 * inner)
            out.add(f"{at}.mlp.gate_proj.{kind}", source, rows=np.arange(inner), note="first half")
            out.add(
                f"{at}.mlp.up_proj.{kind}",
                source,
                rows=np.arange(inner, 2 * inner),
                note="second half",
            )
        elif module == "self_attention.linear_proj":
            out.add(f"{at}.self_attn.o_proj.{kind}", source)
        elif module == "mlp.linear_fc2":
            out.add(f"{at}.mlp.down_proj.{kind}", source)
        else:
            return False
        return True


class _Gpt2(_Family):
    """Learned positions, layer norms, biases; projections are stored as [in, out]."""

    def __init__(self, reader: _Config) -> None:
        super().__init__(reader)
        c = reader
        kind = c.word("position_embedding_type", "learned_absolute")
        c.require("position_embedding_type", kind, "learned_absolute")
        c.require("normalization", c.word("normalization", "layernorm"), "layernorm")
        activation = c.word("activation", "") or c.word("activation_func", "gelu")
        c.require("activation", activation, "gelu", "openai_gelu", "openai-gelu", "fast-gelu")
        fused = c.get("bias_activation_fusion", "bias_gelu_fusion")
        if activation == "gelu" and fused is False:
            raise c.error("bias_activation_fusion", "without it gelu is exact; only tanh's is here")
        if (c.groups, c.head_dim * c.heads) != (c.heads, c.hidden):
            raise c.error("num_query_groups", "a GPT-2 has as many as heads, of hidden_size in all")

    def config(self, vocab: int, *, tied: bool) -> dict[str, Any]:
        c = self.c
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.eps,
            "n_embd": c.hidden,
            "n_head": c.heads,
            "n_inner": c.inner,
            "n_layer": c.layers,
            "n_positions": c.positions,
            "tie_word_embeddings": tied,
            "vocab_size": vocab,
        }

    def top(self) -> dict[str, str]:
        return {
            "embedding.word_embeddings.weight": "transformer.wte.weight",
            "embedding.position_embeddings.weight": "transformer.wpe.weight",
            "decoder.final_layernorm.weight": "transformer.ln_f.weight",
            "decoder.final_layernorm.bias": "transformer.ln_f.bias",
            "output_layer.weight": "lm_head.weight",
        }

    def layer(self, out: Conversion, layer: int, name: str, source: Source) -> bool:
        at = f"transformer.h.{layer}"
        if name in _NORMS:
            which, kind = _NORMS[name]
            out.add(f"{at}.{_GPT2_NORMS[which]}.{kind}", source)
            return True
        module, _, kind = name.rpartition(".")
        modules = {
            "self_attention.linear_qkv": "attn.c_attn",
            "self_attention.linear_proj": "attn.c_proj",
            "mlp.linear_fc1": "mlp.c_fc",
            "mlp.linear_fc2": "mlp.c_proj",
        }
        if module not in modules or kind not in ("weight", "bias"):
            return False
        rows, note = None, ""
        if module == "self_attention.linear_qkv":
            self.check_rows(source, sum(map(len, self.qkv)))
            rows, note = np.concatenate(self.qkv), "all of q, then k, then v"
        transpose = kind == "weight"
        note = ", ".join(filter(None, (note, "transposed" if transpose else "")))
        out.add(f"{at}.{modules[module]}.{kind}", source, rows=rows, transpose=transpose, note=note)
        return True
