"""Meta's own Llama files in Hugging Face's layout: `consolidated.NN.pth` and `params.json`.

Several files are the shares of tensor-parallel ranks. Meta rotates neighbouring values of a head's
queries and keys, Hugging Face those half a head apart, so their rows change order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.chunked import Chunk, join
from tensorray.builder.checkpoint.mapping import Conversion, Source
from tensorray.builder.checkpoint.tensor import FileTensor, StoredTensor

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
#: Tensors that ranks hold columns of; of other matrices they hold rows, of norms all.
_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")


def is_meta(names: list[str]) -> bool:
    """Whether these are the tensors of Meta's files."""
    return "tok_embeddings.weight" in names


def convert(
    ranks: list[dict[str, FileTensor]],
    params: Mapping[str, Any],
    where: str,
    vocab_size: int | None = None,
) -> Conversion:
    """The model in Hugging Face's layout.

    `ranks` are the files' tensors in their order, `params` is params.json, and `where` names it.
    Raises CheckpointError naming the key or tensor that doesn't fit.
    """
    try:
        hidden, layers, heads = (int(params[key]) for key in ("dim", "n_layers", "n_heads"))
        groups = int(params.get("n_kv_heads") or heads)
        eps, base = float(params["norm_eps"]), float(params.get("rope_theta") or 10000.0)
        if min(hidden, layers, heads, groups) < 1 or hidden % heads or heads % groups:
            raise ValueError("impossible sizes")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a params.json of Llama: {error!r}") from error
    head_dim = hidden // heads
    tensors = _merge(ranks, hidden, where)
    out = Conversion({})
    for name, tensor in tensors.items():
        source = Source(name, tensor)
        start, _, rest = name.partition(".")
        index, _, module = rest.partition(".")
        if name in _TOP:
            rows = None if name == "norm.weight" or not vocab_size else np.arange(vocab_size)
            out.add(_TOP[name], source, rows=rows)
        elif start == "layers" and index.isdigit() and module in _LAYER:
            turned = {"attention.wq.weight": heads, "attention.wk.weight": groups}
            new = f"model.layers.{int(index)}.{_LAYER[module]}"
            if module in turned:
                rows = _half_rotary(turned[module], head_dim)
                if len(rows) != tensor.shape[0]:
                    raise CheckpointError(f"{where}: {name} has {tensor.shape[0]} rows")
                out.add(new, source, rows=rows, note="rotary pairs half a head apart")
            else:
                out.add(new, source)
        elif name == "rope.freqs":
            out.ignored.append(name)
        else:
            raise CheckpointError(f"{where}: tensor {name!r} is none of Llama's")
    if "layers.0.feed_forward.w1.weight" not in tensors:
        raise CheckpointError(f"{where}: no tensor 'layers.0.feed_forward.w1.weight'")
    vocab = vocab_size or tensors["tok_embeddings.weight"].shape[0]
    scaled = bool(params.get("use_scaled_rope"))
    positions = 131072 if scaled else 8192 if vocab >= 128_000 else 4096
    out.notes.append(f"{where} names no context length; max_position_embeddings is {positions}")
    out.config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "rope_theta": base,
        "tie_word_embeddings": "output.weight" not in tensors,
        "vocab_size": vocab,
    }
    if scaled:
        # params.json does not say so, but Llama 3.2's small models stretch four times as far.
        factor = 32.0 if hidden in (2048, 3072) else 8.0
        out.notes.append(f"{where} names no rope factor; it is {factor:g}, as published")
        out.config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return out


def _half_rotary(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Rows in an order that has a head's even rows first, then its odd ones."""
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    turned: NDArray[np.intp] = rows.swapaxes(1, 2).reshape(-1)
    return turned


def _merge(ranks: list[dict[str, FileTensor]], hidden: int, where: str) -> dict[str, StoredTensor]:
    """The whole tensors of ranks' shares."""
    if len(ranks) == 1:
        return dict(ranks[0])
    whole: dict[str, StoredTensor] = {}
    for name, first in ranks[0].items():
        shares = [rank[name] for rank in ranks if name in rank]
        if len(shares) != len(ranks):
            raise CheckpointError(f"{where}: {name!r} is missing in some of {len(ranks)} files")
        if len(first.shape) < 2:
            whole[name] = first
            continue
        # Llama 2 split the embedding's columns, Llama 3 its rows.
        embedding_columns = name == "tok_embeddings.weight" and first.shape[1] != hidden
        axis = 1 if name.endswith(_BY_COLUMNS) or embedding_columns else 0
        chunks, at = [], 0
        for share in shares:
            chunks.append(Chunk((0, at) if axis else (at, 0), share.shape, share))
            at += share.shape[axis]
        shape = (first.shape[0], at) if axis else (at, first.shape[1])
        whole[name] = join(f"{where}: tensor {name!r}", shape, chunks)
    return whole
