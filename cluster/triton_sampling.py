"""From TensorRT-LLM's inputs to sampling parameters.

Defaults are TensorRT-LLM's, not the model's own: without top_k and top_p the most likely token is
taken, the seed is 0, and a stop word stays in the text. With a beam_width above 1 all beams are
returned; they are ranked without a length penalty, and the first beam_width to end are the answer.
"""

from __future__ import annotations

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.structured_outputs import StructuredOutputs
from tensorray.cluster.tokenizer import Tokenizer
from tensorray.cluster.triton_fields import Fields

# What the sampling parameters are called here.
THEIR_NAMES = {
    "n": "num_return_sequences",
    "use_beam_search": "beam_width",
    "stop": "stop_words",
    "logit_bias": "embedding_bias_weights",
    "stop_token_ids": "end_id",
    "prompt": "text_input",
    "structured_outputs": "guided_decoding_guide",
}

# What kinds of guides are called here; "json" has none.
_GUIDES = {"json": "json", "json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}


def sampling(fields: Fields, tokenizer: Tokenizer, *, log_probs: bool) -> Fields:
    """SamplingParams' fields, every one that the model's own defaults could set.

    Raises BadRequest for words and guides that can't be followed.
    """
    top_k, top_p = fields.get("top_k") or 0, fields.get("top_p") or 0.0
    greedy = not top_k and not top_p
    end_id = fields.get("end_id")
    seed: int = fields["seed"] if "seed" in fields else fields.get("random_seed", 0)
    found: Fields = {
        "temperature": 0.0 if greedy else fields.get("temperature", 1.0),
        "top_k": top_k,
        "top_p": top_p or 1.0,
        "min_p": 0.0,
        "repetition_penalty": fields.get("repetition_penalty", 1.0),
        "presence_penalty": fields.get("presence_penalty", 0.0),
        "frequency_penalty": fields.get("frequency_penalty", 0.0),
        "seed": seed - (1 << 64) if seed >= 1 << 63 else seed,
        "n": fields.get("num_return_sequences", 1),
        "max_tokens": fields.get("max_tokens", 16),
        "min_tokens": fields.get("min_tokens", fields.get("min_length", 0)),
        "stop": [word for word in fields.get("stop_words", []) if word],
        "include_stop_str_in_output": True,
        "bad_words": _bad_words(fields),
        "no_repeat_ngram_size": fields.get("no_repeat_ngram_size", 0),
        "logit_bias": _bias(fields, tokenizer),
        "logprobs": 0 if log_probs else None,
    }
    found |= _beams(fields)
    guide = _guide(fields)
    if guide is not None:
        found["structured_outputs"] = guide
    if end_id is None:
        return found
    found["stop_token_ids"] = [end_id] if end_id >= 0 else []
    if guide is None:
        found["ignore_eos"] = True  # it takes the place of the model's own; -1: nothing does
    elif end_id < 0:
        raise BadRequest(
            "end_id: -1 can't go with guided_decoding_guide, whose text ends where it is complete",
            param="end_id",
        )
    return found


def _beams(fields: Fields) -> Fields:
    """What a beam search needs, if one is asked for."""
    width: int = fields.get("beam_width") or 1
    if width == 1:
        for name, off in (("length_penalty", (0, 1)), ("beam_search_diversity_rate", (0,))):
            if fields.get(name, 0) not in off:
                raise BadRequest(f"{name} needs a beam_width above 1", param=name)
        return {}
    if any(fields.get("stop_words", [])):
        raise BadRequest(
            "stop_words can't go with beam_width; the token end_id ends a beam", param="stop_words"
        )
    return {
        "use_beam_search": True,
        "beam_width": width,
        "n": fields.get("num_return_sequences", width),
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "length_penalty": fields.get("length_penalty", 0.0),
        "early_stopping": fields.get("early_stopping", True),
        "beam_search_diversity_rate": fields.get("beam_search_diversity_rate", 0.0),
    }


def _guide(fields: Fields) -> StructuredOutputs | None:
    """What the text must match, of TensorRT-LLM's kinds of guides."""
    kind, guide = fields.get("guided_decoding_guide_type"), fields.get("guided_decoding_guide")
    if not kind:
        if guide:
            raise BadRequest(
                "guided_decoding_guide_type is missing; send one of " + ", ".join(_GUIDES),
                param="guided_decoding_guide_type",
            )
        return None
    if kind not in _GUIDES:
        raise BadRequest(
            f"guided_decoding_guide_type: {kind[:40]!r} is not supported; there are "
            + ", ".join(_GUIDES),
            param="guided_decoding_guide_type",
        )
    if kind == "json":  # any at all
        if guide:
            raise BadRequest(
                "guided_decoding_guide: a guide of type json has none; for a schema, the type is "
                "json_schema",
                param="guided_decoding_guide",
            )
        return StructuredOutputs(json={})
    if not guide:
        raise BadRequest(
            f"guided_decoding_guide is missing; send the text of the {kind}",
            param="guided_decoding_guide",
        )
    return StructuredOutputs(**{_GUIDES[kind]: guide})


def _bad_words(fields: Fields) -> list[str | list[int]]:
    """The words' texts, and those that came as tokens: an array of two rows, the words' tokens end
    to end and where each word ends, padded with -1 (TensorRT-LLM's `to_word_list_format`)."""
    words: list[str | list[int]] = [word for word in fields.get("bad_words", []) if word]
    flat: list[int] = fields.get("bad_words_list", [])
    tokens, ends = flat[: len(flat) // 2], flat[len(flat) // 2 :]
    ends = [end for end in ends if end >= 0]
    starts = [0, *ends]
    if len(flat) % 2 or sorted({*starts}) != starts or starts[-1] > len(tokens):
        raise BadRequest(
            "bad_words_list has two rows of equal length: the words' tokens, and rising places "
            "where each word ends, padded with -1",
            param="bad_words_list",
        )
    return [*words, *(tokens[a:b] for a, b in zip(starts, ends, strict=False))]


def _bias(fields: Fields, tokenizer: Tokenizer) -> dict[int, float]:
    words, weights = (
        fields.get("embedding_bias_words", []),
        fields.get("embedding_bias_weights", []),
    )
    if words == [""]:
        words = []
    if len(words) != len(weights):
        raise BadRequest(
            f"embedding_bias_words has {len(words)} words and embedding_bias_weights "
            f"{len(weights)} weights; send one for each",
            param="embedding_bias_weights",
        )
    bias: dict[int, float] = {}
    for word, weight in zip(words, weights, strict=True):
        for token in set(_tokens(word, tokenizer)):
            bias[token] = bias.get(token, 0.0) + weight
    return bias


def _tokens(word: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(word, add_special_tokens=False) if word else []
